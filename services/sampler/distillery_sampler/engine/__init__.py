"""Requests to results: checks, queues, batches, statistics. Knows no gRPC."""
