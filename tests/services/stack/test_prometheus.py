"""The dashboard and the rules against a real Prometheus that scrapes real services under load."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import yaml

from distill_core.artifacts import ArtifactStore
from distill_service.jobs.database import Database
from distill_service.settings import Settings
from distillery.v1 import sampler_pb2
from distillery_trainer.client import JobsClient
from tests.helpers import REPOSITORY
from tests.services.jobs.jobs_stack import (
    convert,
    ended,
    free_port,
    processes,
    short_settings,
    submit,
    train,
    wait_for,
)
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser, teacher_spec

PROMETHEUS = REPOSITORY / "deploy/prometheus"
DASHBOARD = REPOSITORY / "deploy/grafana/dashboards/distillery.json"
REFUSALS = ("refusals by a full queue", 'sum(rate(distillery_rejected_total{reason="queue"}[5m])) > 0')
SHOWN_S = 60.0


@pytest.fixture(scope="module")
def binaries() -> None:
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.skip("Prometheus is not installed; on Debian: apt-get install prometheus")


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("binaries")
def test_every_alert_fires_when_it_must_and_is_quiet_before():
    promtool("test", "rules", "rules_test.yml")
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


@pytest.mark.usefixtures("binaries")
def test_the_configuration_is_one_that_prometheus_takes():
    promtool("check", "config", "prometheus.yml")


class Prometheus:
    """A server with the deployment's configuration, but for its addresses and its pace."""

    def __init__(self, folder: Path, targets: dict[str, int]) -> None:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        self.port = free_port()
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(PROMETHEUS / "rules.yml")]
        ports = {**targets, "prometheus": self.port}
        assert {job["job_name"] for job in config["scrape_configs"]} == set(ports)
        config["scrape_configs"] = [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
            for name, port in ports.items()
        ]
        self.targets = len(ports)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        self.log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=folder)

    def ask(self, path: str, **query: str) -> dict:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def up(self) -> bool:
        """Whether it has scraped every target."""
        try:
            found = self.ask("query", query="count(up == 1)")["result"]
        except (urllib.error.URLError, ConnectionError):
            return False
        return bool(found) and int(found[0]["value"][1]) == self.targets

    def values(self, expression: str) -> list[float]:
        """What a panel shows now; numbers only."""
        found = self.ask("query", query=expression)["result"]
        return [value for series in found if math.isfinite(value := float(series["value"][1]))]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def panels() -> list[tuple[str, str]]:
    board = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())
    ]


class Stack(NamedTuple):
    prometheus: Prometheus
    sampler: SamplerProcess
    jobs: Settings


@pytest.fixture
def stack(tmp_path: Path, binaries: None) -> Iterator[Stack]:
    """Jobs API, two workers and a sampler, all scraped; and what puts load on the sampler."""
    store = ArtifactStore(str(tmp_path / "store"))
    publish_denoiser(store, tmp_path / "model")
    publish_denoiser(store, tmp_path / "slow", name="slow", sampler=teacher_spec())
    ports = {name: free_port() for name in ("trainer-worker", "converter", "sampler")}
    jobs = short_settings(
        tmp_path / "state",
        worker_metrics_port=ports["trainer-worker"],
        broker_url=f"filesystem://{tmp_path}/broker",
    )
    others = jobs.model_copy(update={"worker_metrics_port": ports["converter"]})
    environment = {
        "DISTILLERY_SAMPLER_METRICS_PORT": str(ports["sampler"]),
        "DISTILLERY_SAMPLER_PRELOAD": '["digits"]',
        "DISTILLERY_SAMPLER_MAX_QUEUE_IMAGES": "8",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        "DISTILLERY_CACHE_DIR": str(tmp_path / "cache"),
    }
    with processes(jobs) as running, processes(others) as converting:
        running.server()
        running.worker("train", "eval")
        converting.worker("convert")
        with SamplerProcess(store.url, environment) as sampler:
            prometheus = Prometheus(tmp_path, {"jobs": jobs.jobs_metrics_port, **ports})
            try:
                yield Stack(prometheus, sampler, jobs)
            finally:
                prometheus.close()


def load(sampler: SamplerProcess) -> None:
    """Pictures, and more of them at once than the queue takes."""
    with sampler.client() as client:
        client.generate("digits", class_labels=range(8), image_format="PNG")
    stub = sampler.stub()
    request = sampler_pb2.GenerateRequest(model="slow", class_labels=[1] * 6, num_steps=200)

    def ask(_index: int) -> None:
        with contextlib.suppress(grpc.RpcError):
            stub.Generate(request, timeout=240)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))


def test_no_panel_is_empty_after_a_load_run(stack):
    prometheus, sampler, jobs = stack
    wait_for(prometheus.up, "Prometheus to scrape all services")
    db = Database.open(jobs.database_url)
    for draft in (train(), train(config={"exit_at": 1, "exit_code": 2}), convert("digits@1")):
        ended(db, submit(db, draft).job.id)
    submit(db, train(steps=100_000, config={"step_s": 0.02}))
    empty: dict[str, str] = {}

    def all_shown() -> bool:
        load(sampler)
        with JobsClient(f"127.0.0.1:{jobs.jobs_port}") as client:
            client.list()
        empty.clear()
        empty.update(
            {
                expression: title
                for title, expression in [*panels(), REFUSALS]
                if not prometheus.values(expression)
            }
        )
        return not empty

    try:
        wait_for(all_shown, "no panel to be empty", SHOWN_S)
    except AssertionError:
        pytest.fail(f"empty panels: {empty}")
    finally:
        db.close()
    assert len(panels()) > 35
    groups = prometheus.ask("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    known = {
        'distillery_jobs{kind="train", state="FAILED"}': 1.0,
        'distillery_images_per_second{job="trainer-worker"}': 64.0,
        'distillery_export_parity_rel_l2{target="onnx-fp32"}': 2e-6,
    }
    for expression, value in known.items():
        wait_for(lambda: prometheus.values(expression) == [value], f"{expression} to be {value}")  # noqa: B023
