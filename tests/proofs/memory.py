"""`make prove-memory`: a sampler's memory stays where it was, whatever it is asked and however often models change.

    python -m tests.proofs.memory --requests 10000 --swaps 100 --out out/bench/memory.json

A real sampler process, where torch cannot be imported, serves a network of 1.0 million weights as ONNX. First it is
asked, by clients in closed loops, in several formats and sizes, now and then for what it must refuse; then its alias
moves to one new version after the other. Resident memory is read all along; the change is that of the mean of the
last tenth of the curve to the mean of the tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from distill_core.artifacts import ArtifactStore
from distill_core.errors import DistilleryError
from distillery_sampler.client import SamplerClient
from tests.services.sampler.helpers import SamplerProcess, class_means, publish_denoiser

WIDTH, LAYERS = 128, 7  # of the network: 1.03 million weights
CLIENTS = 4
WARM_UP = 0.2  # of what is done: arenas and pools grow to their size at first
# as torch exports them; the last one, to one channel, is rewritten by the sampler
CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "group": 1}
ALLOWED = 0.05
WRONG_EVERY = 50  # one call in so many names a class that does not exist
Say = Callable[[str], object]


def write_network(path: Path, version: int) -> None:
    """A convolutional denoiser around a pattern that changes sign with each version."""
    rng = np.random.default_rng(version)
    pattern = class_means()[3:4] * (1 if version % 2 else -1)
    constants = {"pattern": pattern, "zeroth": np.zeros((1, 1, 1, 1), np.float32)}
    nodes, last = [], "x_sigma"
    for layer in range(LAYERS + 1):
        shape = (1 if layer == LAYERS else WIDTH, 1 if layer == 0 else WIDTH, 3, 3)
        constants[f"kernel{layer}"] = rng.normal(scale=0.02, size=shape).astype(np.float32)
        nodes.append(helper.make_node("Conv", [last, f"kernel{layer}"], [f"y{layer}"], **CONV))
        last = f"y{layer}"
        if layer < LAYERS:
            nodes.append(helper.make_node("Tanh", [last], [f"h{layer}"]))
            last = f"h{layer}"
    nodes += [
        helper.make_node("Mul", [last, "zeroth"], ["nothing"]),
        helper.make_node("Add", ["nothing", "pattern"], ["x0"]),
    ]
    image = ["batch", 1, 8, 8]
    inputs = [
        helper.make_tensor_value_info("x_sigma", TensorProto.FLOAT, image),
        helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("class_label", TensorProto.INT64, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("x0", TensorProto.FLOAT, image)]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "denoiser", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def publish(store: ArtifactStore, folder: Path, version: int) -> None:
    """The next version of `digits`."""
    draft = publish_denoiser(ArtifactStore(folder / f"aside{version}"), folder / f"model{version}")
    write_network(folder / f"model{version}" / "exports" / "onnx-fp32" / "denoiser.onnx", version)
    store.publish(folder / f"model{version}", draft)


def resident(process: int) -> int:
    """Bytes of a process that are in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Curve:
    """What memory a process had after how many."""

    def __init__(self, process: int, what: str) -> None:
        self._process, self.what, self.points = process, what, [(0, resident(process))]

    def add(self, done: int) -> None:
        self.points.append((done, resident(self._process)))

    def summary(self) -> dict[str, Any]:
        """Bytes before and after, and the relative change."""
        values = [size for _, size in self.points]
        tenth = max(1, len(values) // 10)
        first = int(WARM_UP * len(values))
        before, after = np.mean(values[first : first + tenth]), np.mean(values[-tenth:])
        change = float(after / before - 1)
        return {
            "what": self.what,
            "count": self.points[-1][0],
            "start_bytes": values[0],
            "before_bytes": int(before),
            "after_bytes": int(after),
            "change": round(change, 4),
            "flat": abs(change) <= ALLOWED,
            "curve": self.points,
        }


def ask(sampler: SamplerProcess, count: int, curve: Curve) -> None:
    """`count` calls of several kinds, by a few clients; each kind is asked equally often."""
    done, lock = [0], threading.Lock()

    def client_loop(number: int) -> None:
        with sampler.client() as client:
            for index in range(number, count, CLIENTS):
                _one_call(client, index)
                with lock:
                    done[0] += 1
                    if done[0] % max(1, count // 200) == 0:
                        curve.add(done[0])

    threads = [threading.Thread(target=client_loop, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one_call(client: SamplerClient, index: int) -> None:
    if index % WRONG_EVERY == 0:
        with suppress(DistilleryError):
            client.generate("digits@prod", class_labels=[99])
        return
    labels = [index % 10] * (1 + index % 4)
    if index % 3 == 0:
        assert len(dict(client.generate_stream("digits@prod", class_labels=labels, seed=index))) == len(
            labels
        )
    else:
        assert len(client.generate("digits@prod", class_labels=labels, seed=index)) == len(labels)


def swap(sampler: SamplerProcess, store: ArtifactStore, folder: Path, count: int, curve: Curve) -> None:
    """`count` new versions, each waited for."""
    with sampler.client() as client:
        for done in range(1, count + 1):
            version = store.versions("digits")[-1] + 1
            publish(store, folder, version)
            store.set_alias("digits", "prod", version)
            until = time.monotonic() + 30
            while client.model("digits@prod").version != version:
                assert time.monotonic() < until, f"version {version} was not swapped in"
                time.sleep(0.02)
            client.generate("digits@prod", class_labels=[1])
            curve.add(done)


def measure(folder: Path, requests: int, swaps: int, say: Say) -> dict[str, Any]:
    """Seconds from a process's start to SERVING, and memory over `requests` calls and over `swaps` versions."""
    for name in ("torch", "diffusers"):
        (folder / "blocked" / name).mkdir(parents=True)
        (folder / "blocked" / name / "__init__.py").write_text("raise ImportError('blocked')\n")
    store = ArtifactStore(folder / "store")
    publish(store, folder, 1)
    store.set_alias("digits", "prod", 1)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder / "blocked"), os.environ.get("PYTHONPATH", "")]),
        "DISTILLERY_SAMPLER_PRELOAD": '["digits@prod"]',
        "DISTILLERY_SAMPLER_POLL_S": "0.1",
        "DISTILLERY_SAMPLER_KEEP_REPLACED_S": "1",
    }
    began = time.perf_counter()
    with SamplerProcess(store.url, environment) as sampler:
        start_s = time.perf_counter() - began
        say(f"SERVING {start_s:.2f} s after the process was started, with one model preloaded")
        calls, versions = (Curve(sampler.process.pid, what) for what in ("requests", "swaps"))
        ask(sampler, requests, calls)
        say(_said(calls.summary()))
        versions.points = [(0, resident(sampler.process.pid))]
        swap(sampler, store, folder, swaps, versions)
        say(_said(versions.summary()))
    return {"start_to_serving_s": round(start_s, 2), "memory": [calls.summary(), versions.summary()]}


def _said(summary: dict[str, Any]) -> str:
    before, after = (summary[key] / 2**20 for key in ("before_bytes", "after_bytes"))
    moved = f"{before:.1f} MiB -> {after:.1f} MiB, {100 * summary['change']:+.1f} %"
    return f"{summary['count']} {summary['what']}: {moved}"


def main() -> int:
    """Measure, write the curves, and say by the exit code whether memory is flat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/bench/memory.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distillery-memory-") as scratch:
        report = measure(Path(scratch), options.requests, options.swaps, print)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"the curves are in {options.out}")
    return 0 if all(part["flat"] for part in report["memory"]) else 1


if __name__ == "__main__":
    sys.exit(main())
