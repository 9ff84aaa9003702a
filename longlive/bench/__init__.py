"""Measurements behind `longlive bench`: what a figure of docs/performance.md was made with. Nothing else imports this package."""
