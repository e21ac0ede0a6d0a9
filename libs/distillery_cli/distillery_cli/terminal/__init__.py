"""The terminal: what is read from it and printed on it."""
