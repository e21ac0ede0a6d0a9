"""Tools that make the documents' figures, and what tests and benchmarks need; not in the wheel."""
