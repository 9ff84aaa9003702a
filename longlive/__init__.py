"""LongLive: long, multi-shot video generation, chunk by chunk."""

__version__ = "0.1.0"
