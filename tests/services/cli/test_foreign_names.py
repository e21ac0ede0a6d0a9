"""Names that look like markup, from `submit` to every command that shows them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distill_service.settings import load_settings
from distillery_cli.stack.up import environment
from distillery_trainer.client import JobsClient
from tests.services.jobs.jobs_stack import processes, short_settings, wait_for
from tests.services.jobs.test_api import _answers

NAME = "run [/final] :smile: [bold]x"


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    settings = short_settings(folder / "state", broker_url=f"filesystem://{folder / 'broker'}")
    with processes(settings) as started:
        started.server()
        with JobsClient(f"127.0.0.1:{settings.jobs_port}") as jobs:
            wait_for(lambda: _answers(jobs), "the server to answer")
        yield {
            **os.environ,
            **environment(load_settings(**settings.model_dump(include={"state_dir", "jobs_port"}))),
        }


def distillery(values, *arguments: str) -> str:
    command = [sys.executable, "-m", "distillery_cli", *arguments]
    done = subprocess.run(command, env=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout


def test_a_job_of_any_name_is_queued_listed_shown_compared_and_cancelled(values):
    told = distillery(values, "submit", "judge_digits", "--name", NAME, "--label", "team=[/x]")
    assert NAME in told
    job = told.split()[0]
    for shown in (("jobs",), ("jobs", job), ("jobs", "--label", "team=[/x]")):
        assert NAME in distillery(values, *shown)
    assert job in distillery(values, "compare", "team=[/x]")
    assert "[/reason]" in distillery(values, "pause", "train", "--reason", "[/reason]")
    distillery(values, "cancel", job)
    assert "CANCELLED" in distillery(values, "jobs", job)
