"""Real, tiny models in a store, and real sampler processes that serve them."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import InferenceServerClient

from distill_core.artifacts import ArtifactStore, CondSpec, ExportReport, ImageSpec, Manifest, SamplerSpec
from distill_core.kinds.denoiser.card import Card
from distillery.v1 import sampler_pb2_grpc
from distillery_sampler.client import SamplerClient, generate_request
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.services.jobs.jobs_stack import free_port, wait_for

NUM_CLASSES = 10
SIZE = 8
SPREAD2 = 0.01  # variance of the data around its class's mean
DATA_STD = 0.5
SLOW_STEPS = 60_000  # of the teacher: some seconds on one core, so that others queue behind it
PATIENT_S = (
    3600.0  # no deadline that a machine with other work would miss: refused is what may take half of it
)


def class_means() -> np.ndarray:
    """One pattern a class, and zeros for the null class: (11, 1, 8, 8) in [-0.8, 0.8]."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    waves = [np.sin(2 * np.pi * (rows * (k % 4) + columns * (k // 4)) + k) for k in range(NUM_CLASSES)]
    return np.concatenate([0.8 * np.stack(waves)[:, None], np.zeros((1, 1, SIZE, SIZE))]).astype(np.float32)


def write_denoiser(path: Path, means: np.ndarray, *, conditional: bool = True) -> None:
    """The exact denoiser of N(mean_class, SPREAD2 I): mean + (x - mean) s2 / (s2 + sigma^2).

    The convolution is the identity plus noise below one grey level: a batch could change its sums' order.
    """
    kernel = np.random.default_rng(0).normal(scale=1e-6, size=(1, 1, 3, 3)).astype(np.float32)
    kernel[0, 0, 1, 1] += 1
    nodes = [
        helper.make_node("Conv", ["x_sigma", "kernel"], ["x"], pads=[1, 1, 1, 1]),
        helper.make_node("Gather", ["means", "class_label" if conditional else "zero"], ["mean"]),
        helper.make_node("Mul", ["sigma", "sigma"], ["variance"]),
        helper.make_node("Add", ["variance", "spread"], ["total"]),
        helper.make_node("Div", ["spread", "total"], ["gain"]),
        helper.make_node("Unsqueeze", ["gain", "axes"], ["gain4"]),
        helper.make_node("Sub", ["x", "mean"], ["offset"]),
        helper.make_node("Mul", ["offset", "gain4"], ["part"]),
        helper.make_node("Add", ["mean", "part"], ["x0"]),
    ]
    constants = {
        "kernel": kernel,
        "means": means,
        "spread": np.array([SPREAD2], np.float32),
        "axes": np.array([1, 2, 3], np.int64),
        "zero": np.array([0], np.int64),
    }
    inputs = [
        helper.make_tensor_value_info("x_sigma", TensorProto.FLOAT, ["batch", *means.shape[1:]]),
        helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["batch"]),
    ]
    if conditional:
        inputs.append(helper.make_tensor_value_info("class_label", TensorProto.INT64, ["batch"]))
    output = helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["batch", *means.shape[1:]])
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "denoiser", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def student_spec() -> SamplerSpec:
    """A student of one to four steps."""
    return SamplerSpec(
        kind="few_step", sigmas=(80.0, 10.0, 2.0, 0.5), noise_scale=80.0, num_steps=1, max_steps=4
    )


def teacher_spec() -> SamplerSpec:
    """A teacher whose steps can be made as many, hence as slow, as a test needs."""
    return SamplerSpec(kind="heun", noise_scale=80.0, num_steps=8, max_steps=100_000)


def publish_denoiser(
    store: ArtifactStore,
    folder: Path,
    *,
    name: str = "digits",
    sampler: SamplerSpec | None = None,
    means: np.ndarray | None = None,
) -> Manifest:
    """Publish a class-conditional Gaussian as an ONNX model; `folder` must be new."""
    means = class_means() if means is None else means
    write_denoiser(folder / "exports" / "onnx-fp32" / "denoiser.onnx", means)
    channels, height, width = means.shape[1:]
    report = ExportReport(
        target="onnx-fp32",
        files=("exports/onnx-fp32/denoiser.onnx",),
        max_abs_difference=0.0,
        rel_l2=0.0,
        tolerance=1e-3,
        batches=(1,),
        seconds=0.0,
    )
    manifest = Manifest(
        name=name,
        kind="denoiser",
        method="dmd2",
        card=Card(
            image=ImageSpec(channels=channels, height=height, width=width, picture=(channels, height, width)),
            cond=CondSpec(kind="class_label", num_classes=NUM_CLASSES, null_label=NUM_CLASSES),
            sampler=sampler or student_spec(),
        ).model_dump(mode="json"),
        exports={"onnx-fp32": report},
    )
    return store.publish(folder, manifest)


@dataclass
class SamplerProcess:
    """`python -m distillery_sampler.server` on a free port; `events` are its log lines."""

    store_url: str
    environment: dict[str, str] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    port: int = 0

    def command(self) -> tuple[list[str], dict[str, str]]:
        """The process and its environment."""
        own = {
            "DISTILLERY_STORE_URL": self.store_url,
            "DISTILLERY_SAMPLER_PORT": "0",
            "DISTILLERY_SAMPLER_METRICS_PORT": "0",
            "DISTILLERY_SAMPLER_POLL_S": "0.2",
            "DISTILLERY_LOG_FORMAT": "json",
            "OMP_NUM_THREADS": "1",
        }
        return [sys.executable, "-m", "distillery_sampler.server"], {**os.environ, **own, **self.environment}

    def __enter__(self) -> "SamplerProcess":
        command, environment = self.command()
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(), self.events
        return self

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                self.events.append(event)
                if event.get("event") == "listening":
                    self.port = event["port"]
                if event.get("event") == "ready":
                    self._ready.set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, **options: object) -> SamplerClient:
        return SamplerClient(self.address, **{"timeout_s": PATIENT_S, **options})

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()

    def stub(self) -> sampler_pb2_grpc.SamplerServiceStub:
        """Without the shipped retry policy, so that a refusal is seen."""
        options = [("grpc.enable_retries", 0)]
        return sampler_pb2_grpc.SamplerServiceStub(grpc.insecure_channel(self.address, options))

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)


def executed(address: str, name: str) -> int:
    """How many images, or tiles of views, of a model were in batches so far."""
    with InferenceServerClient(address) as triton:
        (stats,) = triton.get_inference_statistics(name).model_stats
    return sum(batch.batch_size * batch.compute_infer.count for batch in stats.batch_stats)


def settled(sampler: SamplerProcess, name: str) -> int:
    """How much of a model was run, once that stands still."""
    deadline, before = time.monotonic() + 240, -1
    while (now := executed(sampler.address, name)) != before:
        assert time.monotonic() < deadline, f"{now} and still more"
        before = now
        time.sleep(0.7)
    return now


def metered() -> dict[str, str]:
    """The setting for a sampler whose figures a test waits for."""
    return {"DISTILLERY_SAMPLER_METRICS_PORT": str(free_port())}


def scraped(sampler: SamplerProcess) -> str:
    """The figures of a `metered` sampler."""
    port = sampler.environment["DISTILLERY_SAMPLER_METRICS_PORT"]
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()


def wait_until_shown(sampler: SamplerProcess, name: str, value: int, **labels: str) -> None:
    """Return when a figure of the teacher has this value."""
    of = {"backend": "onnxruntime", "model": "teacher", "version": "1", **labels}
    said = ",".join(f'{label}="{of[label]}"' for label in sorted(of))
    line = f"distillery_{name}{{{said}}} {value}.0"
    wait_for(lambda: line in scraped(sampler), line)


def wait_until_queued(sampler: SamplerProcess, images: int) -> None:
    """Return when so many images of the teacher wait."""
    wait_until_shown(sampler, "queue_images", images)


def wait_until_busy(sampler: SamplerProcess) -> None:
    """Return when one request is there, and runs."""
    wait_for(lambda: "distillery_inflight 1.0" in scraped(sampler), "the request to arrive")
    wait_until_queued(sampler, 0)


def wait_until_idle(sampler: SamplerProcess) -> None:
    """Return when nobody waits for anything, and the teacher's only thread has run what it had begun."""
    wait_for(lambda: "distillery_inflight 0.0" in scraped(sampler), "all requests to end")
    with sampler.client() as client:
        client.generate("teacher", class_labels=[1], num_steps=1, timeout_s=PATIENT_S)


def hold(sampler: SamplerProcess) -> grpc.Future:
    """Keep the teacher's only device busy for some seconds, and return when it is."""
    request = generate_request("teacher", class_labels=[0], num_steps=SLOW_STEPS)
    future = sampler.stub().Generate.future(request)
    wait_until_busy(sampler)
    return future


def answer(
    store: ArtifactStore, tmp_path: Path, *requests: GenerateRequest, **settings: object
) -> list[np.ndarray]:
    """The pictures of requests that are sent together, (B, C, H, W) each."""

    async def run() -> list[np.ndarray]:
        values = {"instances": 1, "max_batch": 8, **settings}
        engine = Engine(store, tmp_path, SamplerSettings(**values), Metrics())
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        await engine.close()
        return [np.stack([picture.pixels for picture in pictures]) for pictures, _ in answers]

    return asyncio.run(run())
