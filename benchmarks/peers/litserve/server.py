"""LitServe: `python server.py GRAPH SIGMA THREADS PORT BATCH`; BATCH 1 is without batching.

One worker, since the model has one thread; answers are the picture's bytes, not JSON.
"""

from __future__ import annotations

import sys

import litserve
import numpy as np
from fastapi import Response
from student import Student

WINDOW_S = 0.001
GRAPH, SIGMA, THREADS, PORT, BATCH = sys.argv[1:6]


class StudentAPI(litserve.LitAPI):  # type: ignore[misc]
    """Requests {"seed": 1, "class_label": 2}."""

    def setup(self, device: str) -> None:
        """Open the graph, in the worker's process."""
        self._student = Student(GRAPH, float(SIGMA), int(THREADS))

    def decode_request(self, request: dict[str, int]) -> tuple[int, int]:
        """Seed and label."""
        return request["seed"], request["class_label"]

    def predict(self, asked: list[tuple[int, int]] | tuple[int, int]) -> np.ndarray:
        """Pictures of a batch, or of one request."""
        pairs = np.array(asked).reshape(-1, 2)
        pictures: np.ndarray = self._student(pairs[:, 0], pairs[:, 1])
        return pictures if int(BATCH) > 1 else pictures[0]

    def encode_response(self, picture: np.ndarray) -> Response:
        """The picture's bytes."""
        return Response(picture.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    batching = {"max_batch_size": int(BATCH), "batch_timeout": WINDOW_S} if int(BATCH) > 1 else {}
    server = litserve.LitServer(StudentAPI(**batching), accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(PORT), generate_client_file=False, log_level="warning")
