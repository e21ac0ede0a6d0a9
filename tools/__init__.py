"""What the documents' figures are made with, and what tests and benchmarks need; not in the wheel."""
