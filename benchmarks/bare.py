"""ONNX Runtime alone, in a process of its own: `python bare.py GRAPH C,H,W THREADS SIGMA`.

It reads one JSON command a line, {"batch": 4, "seconds": 1}, and answers with the time of a forward.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import onnxruntime


def open_graph(path: str, threads: int) -> onnxruntime.InferenceSession:
    """A session as every server here is told to open it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(session: onnxruntime.InferenceSession, feed: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Forwards of one feed, one after the other."""
    batch, times = len(feed["sigma"]), []
    session.run(None, feed)
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        session.run(None, feed)
        times.append(time.perf_counter() - now)
    took = time.perf_counter() - began
    return {
        "batch": batch,
        "p50_ms": 1000 * statistics.median(times),
        "images_per_s": batch * len(times) / took,
    }


def main(path: str, shape: str, threads: str, sigma: str) -> None:
    """Answer commands until stdin ends."""
    session = open_graph(path, int(threads))
    sides = tuple(map(int, shape.split(",")))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        batch = command["batch"]
        noise = np.random.default_rng(0).standard_normal((batch, *sides)) * float(sigma)
        feed = {
            "x_sigma": noise.astype(np.float32),
            "sigma": np.full(batch, float(sigma), np.float32),
            "class_label": np.arange(batch, dtype=np.int64) % 10,
        }
        print(json.dumps(measure(session, feed, command["seconds"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
