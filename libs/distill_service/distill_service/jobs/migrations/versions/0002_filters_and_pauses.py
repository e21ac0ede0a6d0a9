"""Labels to filter by, owners, paused queues, and indexes with which a long queue costs what a short one does."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_sequence = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_CHUNK = 1000
_OPEN_PARENTS = """
    UPDATE jobs SET waits = (
        SELECT count(*) FROM job_parents JOIN jobs AS parent ON parent.id = job_parents.parent_id
        WHERE job_parents.job_id = jobs.id AND parent.state <> 'SUCCEEDED'
    )
"""
_OWNERS = """
    UPDATE jobs SET owner = coalesce(
        (SELECT who FROM job_events WHERE job_id = jobs.id AND what = 'submitted' ORDER BY id LIMIT 1), ''
    )
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("waits", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("owner", sa.String(255), nullable=False, server_default=""))
    op.execute(_OPEN_PARENTS)
    op.execute(_OWNERS)
    op.drop_index("ix_jobs_claim", "jobs")
    by_urgency = sa.text("priority DESC")
    op.create_index("ix_jobs_claimed", "jobs", ["queue", "state", "waits", by_urgency, "seq"])
    op.create_index("ix_jobs_listed", "jobs", ["state", "kind", "created", "seq"])
    op.create_index("ix_jobs_created", "jobs", ["created", "seq"])
    labels = op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(256), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("seq", _sequence, nullable=False),
    )
    _copy_labels(labels)
    op.create_index("ix_job_labels_found", "job_labels", ["key", "value", "created", "seq"])
    op.create_table(
        "job_queues",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("paused", sa.Boolean, nullable=False),
        sa.Column("reason", sa.String(255), nullable=False),
        sa.Column("who", sa.String(255), nullable=False),
        sa.Column("since", sa.Double, nullable=False),
    )


def _copy_labels(labels: sa.Table) -> None:
    jobs = sa.table(
        "jobs", sa.column("seq"), sa.column("id"), sa.column("labels", sa.JSON), sa.column("created")
    )
    connection, last = op.get_bind(), -1
    while True:
        query = sa.select(jobs).where(jobs.c.seq > last).order_by(jobs.c.seq).limit(_CHUNK)
        rows = connection.execute(query).all()
        if not rows:
            return
        last = rows[-1].seq
        found = [
            {"job_id": row.id, "key": key, "value": str(value), "created": row.created, "seq": row.seq}
            for row in rows
            for key, value in (row.labels or {}).items()
        ]
        if found:
            connection.execute(labels.insert(), found)


def downgrade() -> None:
    op.drop_table("job_queues")
    op.drop_table("job_labels")
    for index in ("ix_jobs_created", "ix_jobs_listed", "ix_jobs_claimed"):
        op.drop_index(index, "jobs")
    op.create_index("ix_jobs_claim", "jobs", ["state", "queue", "priority", "seq"])
    op.drop_column("jobs", "owner")
    op.drop_column("jobs", "waits")
