"""`utils` as the documented Python snippets import it."""
