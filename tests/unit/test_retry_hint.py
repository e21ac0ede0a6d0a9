"""A failed job is only said to be worth another try where the same request could succeed."""

from __future__ import annotations

import pytest

from distillery.v1 import jobs_pb2
from distillery_cli.jobs.listing import exit_code


@pytest.mark.parametrize(
    ("kind", "error", "hinted"),
    [
        ("CONVERT", "ArtifactError", False),
        ("CONVERT", "ConfigError", False),
        ("CONVERT", "Unavailable", True),
        ("TRAIN", "ConfigError", False),
        ("TRAIN", "ArtifactError", True),  # a folder that can be mended
        ("TRAIN", "DataError", True),
    ],
)
def test_a_retry_is_hinted_at_where_it_can_help(kind, error, hinted, capsys):
    job = jobs_pb2.Job(
        id="j-7",
        kind=jobs_pb2.JobKind.Value(f"JOB_KIND_{kind}"),
        state=jobs_pb2.JOB_STATE_FAILED,
        error=jobs_pb2.JobError(type=error, message="it is so"),
    )
    assert exit_code(job) != 0
    said = capsys.readouterr()
    assert "it is so" in said.out + said.err
    assert ("distillery retry j-7" in said.out + said.err) is hinted
