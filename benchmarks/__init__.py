"""Measurements of speed, for `make bench`, `bench-serving` and `bench-queue`; not in the wheel."""
