"""Alembic's entry: migrates on the connection that `Database.migrate` gives."""

from alembic import context

from distill_service.jobs.table import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
