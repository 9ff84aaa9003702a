"""Number formats of a model's linear layers: which layers take part, and what computes them."""
