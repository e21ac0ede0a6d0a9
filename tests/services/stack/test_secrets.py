"""No secret in a log: a stack with known secrets runs jobs and refuses calls, and what it wrote is searched."""

from __future__ import annotations

import getpass
import hashlib
import logging
import urllib.request
from pathlib import Path

import pytest
from sqlalchemy import make_url

from distill_core.errors import DistilleryError
from distill_service.jobs.database import Database
from distill_service.jobs.table import State
from distill_service.settings import Settings
from distillery_trainer.client import JobsClient, train_spec
from tests.services.jobs.jobs_stack import ended, processes, recipe, short_settings, wait_for

TOKEN, WRONG = "letmein-token-4f1c", "wrong-token-77aa"
PASSWORD, KEY, BROKER = "db-password-91be", "aws-secret-key-5d2e", "broker-password-c3d4"
SECRETS = (TOKEN, WRONG, PASSWORD, KEY, BROKER)


def written(folder: Path) -> dict[str, str]:
    """Everything in the state folder that is a log or a run's file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".db", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes().decode(errors="replace") for path in files}


def with_password(url: str) -> str:
    """The URL of a job table, with the password where its database takes one; `trust` lets any in."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        parsed = parsed.set(username=parsed.username or getpass.getuser(), password=PASSWORD)
    return parsed.render_as_string(hide_password=False)


@pytest.fixture
def stack(tmp_path, monkeypatch, table_url):
    """Server and worker at the most talkative level, with a token and secrets in their environment and settings.

    A job table in a file has no password. The broker with one is not there.
    """
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann:{hashlib.sha256(TOKEN.encode()).hexdigest()}:admin\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("DISTILLERY_TOKEN", TOKEN)
    values = short_settings(
        tmp_path / "state",
        tokens_file=tokens,
        log_level="debug",
        database_url=with_password(table_url),
        broker_url=f"redis://:{BROKER}@127.0.0.1:9/0",
    )
    with processes(values) as running:
        running.server()
        running.worker("train")
        yield running


def test_no_secret_is_in_the_logs_of_a_run(stack):
    address = f"127.0.0.1:{stack.settings.jobs_port}"
    with JobsClient(address, token=WRONG) as stranger:
        said = wait_for(lambda: refusal(stranger), "a refusal")
    with JobsClient(address, token=TOKEN) as client:
        good = client.submit(train_spec(recipe(steps=2)))
        bad = client.submit(train_spec(recipe(steps=2, config={"exit_at": 1, "exit_code": 3})))
        db = Database.open(stack.settings.database_url)
        states = [ended(db, job.id).state for job in (good, bad)]
        db.close()
    url = f"http://127.0.0.1:{stack.settings.jobs_metrics_port}/metrics"
    metrics = urllib.request.urlopen(url, timeout=10).read().decode()
    assert states == [State.SUCCEEDED, State.FAILED], stack.log()[-3000:]
    found = written(stack.settings.state_dir) | {"refusal": said, "metrics": metrics}
    assert "job ended" in found["services.log"]  # it did log
    assert any(name.endswith("spec.json") for name in found)
    for name, text in found.items():
        for secret in SECRETS:
            assert secret not in text, f"{name} holds a secret"


def refusal(client: JobsClient) -> str:
    try:
        client.list()
    except DistilleryError as error:
        return str(error) if "token" in str(error) else ""
    return ""


def test_settings_do_not_show_their_secrets(tmp_path):
    values = Settings(
        state_dir=tmp_path,
        token=TOKEN,
        database_url=f"postgresql://u:{PASSWORD}@h/d",
        broker_url=f"redis://:{BROKER}@h",
    )
    for text in (repr(values), str(values)):
        assert not any(secret in text for secret in SECRETS)
    logging.getLogger("test").info("%s", values)


def test_an_error_about_a_setting_does_not_show_a_secret(monkeypatch):
    from distill_core.errors import ConfigError
    from distill_service.settings import load_settings

    monkeypatch.setenv("DISTILLERY_LEASE_S", "-1")
    with pytest.raises(ConfigError) as caught:
        load_settings(token=TOKEN)
    assert TOKEN not in str(caught.value)
