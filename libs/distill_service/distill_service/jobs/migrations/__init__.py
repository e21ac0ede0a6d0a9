"""Alembic migrations of the job table, run at every start."""
