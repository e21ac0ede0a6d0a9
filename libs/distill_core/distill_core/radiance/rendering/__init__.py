"""Volume rendering: marching through occupied cells, and the sum along a ray."""
