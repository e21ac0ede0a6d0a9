"""The figures that operators see: all of them there, under their names, and true."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ArtifactError, ConfigError, Overloaded
from distill_service.jobs.metrics import JobTableCollector, WorkerMetrics
from distill_service.jobs.queue import Claim
from distill_service.metrics import SECONDS, DiskCollector, serve_metrics
from distill_service.settings import load_settings
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.engine.statistics import ModelStats
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.services.jobs.jobs_stack import free_port
from tests.services.sampler.helpers import publish_denoiser

MODEL = {"model", "version", "backend"}
SAMPLER = {  # name -> labels
    "requests_total": {"method", "code"},
    "request_seconds_bucket": {"method", "le"},
    "queue_seconds_bucket": {*MODEL, "le"},
    "infer_seconds_bucket": {*MODEL, "le"},
    "encode_seconds_bucket": {"format", "le"},
    "batch_images_bucket": {*MODEL, "le"},
    "batch_release_total": {*MODEL, "reason"},
    "queue_images": MODEL,
    "inflight": set(),
    "rejected_total": {*MODEL, "reason"},
    "model_load_seconds_bucket": {"model", "le"},
    "model_reload_total": {"model", "result"},
    "padding_images_total": MODEL,
}
LOADED = {  # there while a version is loaded
    "model_info": {*MODEL, "kind", "method"},
    "model_instances": MODEL,
    "model_threads": MODEL,
    "model_max_batch": MODEL,
    "model_memory_bytes": MODEL,
}
JOBS = {
    "jobs": {"kind", "state"},
    "job_seconds_bucket": {"kind", "result", "le"},
    "job_attempts_total": {"reason"},
    "lease_expired_total": set(),
    "train_step": set(),
    "train_loss": {"term"},
    "images_per_second": set(),
    "gpu_memory_bytes": set(),
    "export_parity_rel_l2": {"target"},
}
DIGITS = {"model": "digits", "version": "1", "backend": "onnxruntime"}


def samples(registry: CollectorRegistry) -> dict[str, list]:
    found: dict[str, list] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("distillery_"), []).append(sample)
    return found


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(f"distillery_{name}", labels)
    assert found is not None, f"{name} {labels}"
    return found


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(str(tmp_path / "store"))
    publish_denoiser(store, tmp_path / "model")
    return store


def test_the_sampler_counts_what_happened(store, tmp_path):
    metrics = Metrics()
    settings = SamplerSettings(instances=1, max_batch=4, max_queue_images=8)

    async def run() -> None:
        engine = Engine(store, tmp_path / "cache", settings, metrics)
        request = GenerateRequest("digits", class_labels=(1,) * 8)
        answers = asyncio.gather(*(engine.generate(request) for _ in range(3)), return_exceptions=True)
        while not value(metrics.registry, "inflight"):
            await asyncio.sleep(0)
        assert [type(answer) for answer in await answers].count(Overloaded) == 2
        await engine.close()

    asyncio.run(run())
    metrics.on_call("/distillery.v1.SamplerService/Generate", "OK", 0.02)
    metrics.encode_seconds.labels("PNG").observe(0.01)

    def of(name: str, **labels: str) -> float:
        return value(metrics.registry, name, **DIGITS, **labels)

    assert of("batch_images_sum") == 8
    assert of("batch_images_count") == of("infer_seconds_count") == 2
    assert of("queue_seconds_count") == 8
    assert of("infer_seconds_sum") > 0
    assert of("batch_release_total", reason="full") == 2
    assert of("rejected_total", reason="queue") == 2
    assert of("rejected_total", reason="deadline") == 0
    assert of("queue_images") == 0
    assert of("padding_images_total") == 0
    assert value(metrics.registry, "inflight") == 0
    assert value(metrics.registry, "model_load_seconds_count", model="digits") == 1
    assert value(metrics.registry, "model_reload_total", model="digits", result="loaded") == 1
    shown = samples(metrics.registry)
    assert not LOADED.keys() & shown.keys()  # nothing is loaded any more
    for name, labels in SAMPLER.items():
        assert set(shown[name][0].labels) == labels, name
    bounds = {float(sample.labels["le"]) for sample in shown["request_seconds_bucket"]}
    assert bounds == {*SECONDS, float("inf")}


def test_a_loaded_version_is_named_and_a_refused_one_counted(store, tmp_path):
    metrics = Metrics()

    async def run() -> None:
        settings = SamplerSettings(instances=3, threads=2, max_batch=5)
        engine = Engine(store, tmp_path / "cache", settings, metrics)
        info = await engine.models.load("digits")
        labels = {**DIGITS, "kind": "denoiser", "method": "dmd2"}
        assert value(metrics.registry, "model_info", **labels) == 1
        shown = samples(metrics.registry)
        assert {name: set(shown[name][0].labels) for name in LOADED} == LOADED
        chosen = [shown[f"model_{name}"][0].value for name in ("instances", "threads", "max_batch")]
        assert chosen == [3, 2, 5]
        assert value(metrics.registry, "model_memory_bytes", **DIGITS) == info.memory > 0
        publish_denoiser(store, tmp_path / "second")
        (graph,) = (tmp_path / "store").rglob("versions/2/**/denoiser.onnx")
        graph.write_bytes(graph.read_bytes()[:-10])
        with pytest.raises(ArtifactError):
            await engine.models.load("digits@2")
        await engine.close()

    asyncio.run(run())
    assert value(metrics.registry, "model_reload_total", model="digits", result="refused") == 1


def test_a_sampler_that_swaps_for_weeks_has_no_more_series():
    metrics = Metrics()

    def swap(version: int) -> None:
        stats = ModelStats(metrics, ("digits", str(version), "onnxruntime"))
        stats.batch(2, "idle", [0.1, 0.2], 0.3, [stats.origin()] * 2)
        stats.padding(2)
        metrics.on_retired(stats.labels)

    swap(1)
    first = sum(map(len, samples(metrics.registry).values()))
    for version in range(2, 9):
        swap(version)
    shown = samples(metrics.registry)
    assert sum(map(len, shown.values())) == first
    assert {sample.labels["version"] for sample in shown["batch_images_sum"]} == {"8"}
    assert shown["padding_images_total"][0].value == 2

    ModelStats(metrics, ("digits", "8", "onnxruntime"))  # rolled back to: its series go on
    swap(9)
    kept = {sample.labels["version"] for sample in samples(metrics.registry)["batch_images_sum"]}
    assert kept == {"8", "9"}


def claim(kind: str, **spec: object) -> Claim:
    return Claim(id="j1", kind=kind, name="", spec=spec, attempt=1, crashes=0)


def test_a_worker_shows_its_jobs_figures_and_forgets_rates_with_them(tmp_path):
    worker = WorkerMetrics()
    job = claim("train")
    with worker.running(job):
        worker.observe(job, {"event": "metrics", "step": 3, "values": {"student_loss": 0.5}})
        told = {"step": 3, "rate": 2.0, "images_per_second": 128.0, "gpu_memory_bytes": 1024}
        worker.observe(job, {"event": "progress", **told})
        assert value(worker.registry, "train_step") == 3
        assert value(worker.registry, "train_loss", term="student_loss") == 0.5
        assert value(worker.registry, "images_per_second") == 128
        assert value(worker.registry, "gpu_memory_bytes") == 1024
        assert value(worker.registry, "worker_busy") == 1
    for name in ("worker_busy", "images_per_second", "gpu_memory_bytes", "train_steps_per_second"):
        assert value(worker.registry, name) == 0
    export = claim("convert", target="onnx-int8")
    worker.observe(export, {"event": "result", "metrics": {"rel_l2": 0.02, "tolerance": 1.0}})
    assert value(worker.registry, "export_parity_rel_l2", target="onnx-int8") == 0.02
    shown = samples(worker.registry)
    for name in ("train_step", "train_loss", "images_per_second", "gpu_memory_bytes", "export_parity_rel_l2"):
        assert set(shown[name][0].labels) == JOBS[name]


def test_the_job_table_shows_all_names_before_the_first_job(db):
    registry = CollectorRegistry()
    registry.register(JobTableCollector(db))
    shown = samples(registry)
    for name in ("jobs", "job_seconds_bucket", "lease_expired_total"):
        assert set(shown[name][0].labels) == JOBS[name]
    assert value(registry, "job_seconds_count", kind="train", result="FAILED") == 0


def test_the_disks_that_are_written_to_are_measured(tmp_path):
    settings = load_settings(state_dir=tmp_path, cache_dir="/proc/1/root/none", store_url="s3://bucket/x")
    registry = CollectorRegistry()
    registry.register(DiskCollector.of(settings))
    total = shutil.disk_usage(tmp_path).total
    assert value(registry, "disk_size_bytes", folder="runs") == total
    assert 0 < value(registry, "disk_free_bytes", folder="runs") <= total
    assert registry.get_sample_value("distillery_disk_free_bytes", {"folder": "store"}) is None


def test_metrics_are_served_with_those_of_the_process_and_a_taken_port_is_one_sentence(tmp_path):
    port = free_port()
    settings = load_settings(state_dir=tmp_path, sampler_metrics_port=port)
    registry = Metrics().registry
    serve_metrics(registry, settings, "sampler_metrics_port")
    assert value(registry, "disk_free_bytes", folder="store") > 0
    assert registry.get_sample_value("process_resident_memory_bytes") > 0
    with pytest.raises(ConfigError, match=f"{port}.*DISTILLERY_SAMPLER_METRICS_PORT"):
        serve_metrics(CollectorRegistry(), settings, "sampler_metrics_port")
    off = CollectorRegistry()
    serve_metrics(off, load_settings(sampler_metrics_port=0), "sampler_metrics_port")
    assert not samples(off)
