"""MLServer with a custom runtime: `python server.py GRAPH SIGMA THREADS PORT BATCH`; BATCH 1 is without batching.

One inference worker, the default. Its adaptive batching waits for a full batch, at most WINDOW_S.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.codecs import decode_args
from student import Student

WINDOW_S = 0.001


class StudentRuntime(MLModel):  # type: ignore[misc]
    """The student as an inference runtime."""

    async def load(self) -> bool:
        """Open the graph, in the worker's process."""
        options = self.settings.parameters.extra
        self._student = Student(options["graph"], options["sigma"], options["threads"])
        return True

    @decode_args  # type: ignore[untyped-decorator]
    async def predict(self, seed: np.ndarray, class_label: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C) of seeds and labels (B, 1)."""
        pictures: np.ndarray = self._student(seed[:, 0], class_label[:, 0])
        return pictures


def main(graph: str, sigma: str, threads: str, port: str, batch: str) -> None:
    """Write the settings that `mlserver start` reads, and become it."""
    folder = Path(tempfile.mkdtemp(prefix="mlserver-"))
    settings: dict[str, Any] = {
        "host": "127.0.0.1",
        "grpc_port": int(port),
        "http_port": int(port) + 1,
        "metrics_port": int(port) + 2,
        "parallel_workers": 1,
    }
    model: dict[str, Any] = {
        "name": "student",
        "implementation": "server.StudentRuntime",
        "parameters": {"extra": {"graph": graph, "sigma": float(sigma), "threads": int(threads)}},
    }
    if int(batch) > 1:
        model |= {"max_batch_size": int(batch), "max_batch_time": WINDOW_S}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.execv(Path(sys.executable).with_name("mlserver"), ["mlserver", "start", str(folder)])


if __name__ == "__main__":
    main(*sys.argv[1:6])
