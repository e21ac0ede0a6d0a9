"""Models of the sampler: found, loaded, verified, measured, swapped, and held within the memory limit."""
