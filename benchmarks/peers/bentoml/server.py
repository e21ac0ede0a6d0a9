"""BentoML: `python server.py GRAPH SIGMA THREADS PORT BATCH`; BATCH 1 is without adaptive batching.

One worker, since the model has one thread. Tensors travel as JSON, its own way; adaptive batching takes one parameter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import numpy as np
from student import Student as Model

GRAPH, SIGMA, THREADS, BATCH = (
    os.environ.get(f"STUDENT_{name}", "") for name in ("GRAPH", "SIGMA", "THREADS", "BATCH")
)
LATENCY_MS = 60_000  # a batch later than this is given up
BATCHING = {"batchable": True, "max_batch_size": int(BATCH or 1), "max_latency_ms": LATENCY_MS}


@bentoml.service(workers=1, traffic={"timeout": 60})
class Student:
    """The student as a service."""

    def __init__(self) -> None:
        self._model = Model(GRAPH, float(SIGMA), int(THREADS))

    @bentoml.api(**(BATCHING if int(BATCH or 1) > 1 else {}))  # type: ignore[untyped-decorator]
    def generate(self, asked: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C) of seeds and labels (B, 2)."""
        pictures: np.ndarray = self._model(asked[:, 0], asked[:, 1])
        return pictures


def main(graph: str, sigma: str, threads: str, port: str, batch: str) -> None:
    """Become `bentoml serve`, which imports this file."""
    variables = {"GRAPH": graph, "SIGMA": sigma, "THREADS": threads, "BATCH": batch}
    os.environ |= {f"STUDENT_{name}": value for name, value in variables.items()}
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(Path(sys.prefix) / "home")}
    program = Path(sys.executable).with_name("bentoml")
    where = ["--host", "127.0.0.1", "--port", port, "--working-dir", str(Path(__file__).parent)]
    os.execv(program, ["bentoml", "serve", "server:Student", *where])


if __name__ == "__main__":
    main(*sys.argv[1:6])
