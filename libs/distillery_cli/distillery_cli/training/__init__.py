"""Training in this process, without the queue."""
