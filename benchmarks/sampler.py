"""How much of a bare forward's throughput the sampler delivers over gRPC; the clients use the same cores."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from distillery_cli.stack.demo import stack_settings
from distillery_cli.stack.up import Stack

LOADS = ((1, 1), (8, 1), (64, 1), (1, 64))  # clients, images in each request
BATCHES = (1, 2, 4, 8, 16, 32, 64)
NUM_CLASSES = 10
SIGMA = 80.0  # the level of a one-step student's only evaluation
BARE_S = 0.5  # of timing per batch size


class Subject(NamedTuple):
    """An untrained network that is served as a one-step student."""

    name: str
    shape: tuple[int, int, int]
    network: str
    args: dict[str, Any]


SUBJECTS = (
    Subject(
        "dit-8x8",
        (1, 8, 8),
        "DiTTransformer2DModel",
        {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 24, "patch_size": 8},
    ),
    Subject(
        "unet-32x32",
        (3, 32, 32),
        "UNet2DModel",
        {
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["DownBlock2D"] * 3,
            "up_block_types": ["UpBlock2D"] * 3,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    ),
)


def measure_sampler(state: Path, seconds: float, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Latency and throughput of each subject at each concurrency, against its own bare forward."""
    settings = stack_settings(state)
    measured = []
    with Stack(settings) as stack:
        stack.start()
        for subject in SUBJECTS:
            say(f"{subject.name}: converting")
            ref = converted(subject, settings.store_url, settings.jobs_address, state)
            bare = _bare(graph_of(settings.store_url, ref), subject)
            address = settings.sampler_address
            loads = []
            for clients, images in LOADS:
                say(f"{subject.name}: {clients} clients, {images} images a request, {seconds:g} s")
                load = _load(address, ref, clients, images, seconds)
                loads.append({**load, "ratio": load["images_per_s"] / bare["images_per_s"]})
            measured.append({"model": subject.name, "bare": bare, "loads": loads})
    return measured


def converted(subject: Subject, store_url: str, jobs: str, work: Path) -> str:
    """Publish the network and have the converter export it."""
    from distill_core.artifacts import ArtifactStore, Manifest
    from distill_core.diffusion.sampling import SamplerSpec
    from distill_core.errors import DistilleryError
    from distill_core.kinds.cards import described
    from distill_core.networks.diffusers_new import build_denoiser
    from distill_core.recipe.tables import NetworkConfig
    from distillery_trainer.client import JobsClient, convert_spec

    network = NetworkConfig(name=subject.network, args=subject.args)
    denoiser = build_denoiser(network, parameterisation="edm", shape=subject.shape, num_classes=NUM_CLASSES)
    folder = work / f"untrained-{subject.name}"
    denoiser.save(folder)
    denoiser.sampler = SamplerSpec.few_step((SIGMA,), noise_scale=SIGMA)
    draft = Manifest(name=subject.name, title="untrained, for timing", **described(denoiser))
    published = ArtifactStore(store_url).publish(folder, draft)
    with JobsClient(jobs) as api:
        job = api.wait(api.submit(convert_spec(published.ref, "onnx-fp32")).id)
    if not job.artifact:
        raise DistilleryError(f"the conversion failed: {job.error.message}")
    return job.artifact


def graph_of(store_url: str, ref: str) -> Path:
    from distill_core.artifacts import ArtifactStore

    return ArtifactStore(store_url).fetch(ref) / "exports" / "onnx-fp32" / "denoiser.onnx"


def _bare(graph: Path, subject: Subject) -> dict[str, Any]:
    """The best images per second of the runtime alone, over batch sizes and two ways to use the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rates: dict[tuple[int, int], float] = {}  # by batch and sessions
    for sessions in sorted({1, cores}):
        opened = [_session(graph, cores // sessions) for _ in range(sessions)]
        rates |= {(batch, sessions): _rate(opened, batch, subject.shape) for batch in BATCHES}
    (batch, sessions), best = max(rates.items(), key=lambda item: item[1])
    return {
        "batch": batch,
        "sessions": sessions,
        "images_per_s": best,
        "all": [{"batch": b, "sessions": s, "images_per_s": rate} for (b, s), rate in rates.items()],
    }


def _session(graph: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _rate(sessions: list[Any], batch: int, shape: tuple[int, int, int]) -> float:
    """Images per second of all sessions together, each in a thread of its own."""
    import numpy as np

    feed = {
        "x_sigma": np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32),
        "sigma": np.full(batch, 5.0, np.float32),
        "class_label": np.arange(batch, dtype=np.int64) % NUM_CLASSES,
    }
    for session in sessions:
        session.run(None, feed)
    began = time.perf_counter()

    def run(session: Any) -> int:
        runs = 0
        while time.perf_counter() - began < BARE_S:
            session.run(None, feed)
            runs += 1
        return runs

    with ThreadPoolExecutor(len(sessions)) as pool:
        runs = sum(pool.map(run, sessions))
    return runs * batch / (time.perf_counter() - began)


def _load(address: str, ref: str, clients: int, images: int, seconds: float) -> dict[str, Any]:
    """`clients` threads that each send one request after the other, over a connection of their own."""
    labels = [index % NUM_CLASSES for index in range(images)]
    latencies: list[list[float]] = [[] for _ in range(clients)]
    failures: list[BaseException] = []
    start = threading.Barrier(clients + 1)
    stop = threading.Event()

    def ask(own: list[float]) -> None:
        from distillery_sampler.client import SamplerClient

        try:
            with SamplerClient(address) as sampler:
                sampler.generate(ref, class_labels=labels, num_steps=1)  # connect, and load the model
                start.wait()
                while not stop.is_set():
                    began = time.perf_counter()
                    sampler.generate(ref, class_labels=labels, seed=len(own), num_steps=1)
                    own.append(time.perf_counter() - began)
        except BaseException as error:  # told by the main thread
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=ask, args=(own,)) for own in latencies]
    for thread in threads:
        thread.start()
    try:
        start.wait()
        began = time.perf_counter()
        time.sleep(seconds)
    except threading.BrokenBarrierError:
        began = time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
    every = sorted(latency for own in latencies for latency in own)
    return {
        "concurrency": clients,
        "images_per_request": images,
        "p50_ms": 1000 * statistics.median(every),
        "p95_ms": 1000 * every[int(0.95 * (len(every) - 1))],
        "images_per_s": images * len(every) / (time.perf_counter() - began),
        "requests": len(every),
    }
