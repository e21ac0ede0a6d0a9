"""Queued jobs: submitted, listed, compared, and what an operator does to the queues."""
