"""Models: in the store, and what a running sampler makes of them."""
