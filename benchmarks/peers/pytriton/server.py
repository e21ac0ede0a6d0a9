"""PyTriton, Triton with a Python function: `python server.py GRAPH SIGMA THREADS PORT BATCH`.

Triton's dynamic batcher does not wait by default; BATCH 1 is without it.
"""

from __future__ import annotations

import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from student import Student


def main(graph: str, sigma: str, threads: str, port: str, size: str) -> None:
    """Serve until SIGTERM."""
    student = Student(graph, float(sigma), int(threads))
    channels, height, width = student.shape

    @batch  # type: ignore[untyped-decorator]
    def generate(seed: np.ndarray, class_label: np.ndarray) -> dict[str, np.ndarray]:
        return {"images": student(seed[:, 0], class_label[:, 0])}

    config = TritonConfig(
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        grpc_port=int(port),
        http_port=int(port) + 1,
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="student",
            infer_func=generate,
            inputs=[
                Tensor(name="seed", dtype=np.uint64, shape=(1,)),
                Tensor(name="class_label", dtype=np.int64, shape=(1,)),
            ],
            outputs=[Tensor(name="images", dtype=np.uint8, shape=(height, width, channels))],
            config=ModelConfig(batching=True, max_batch_size=int(size), batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    main(*sys.argv[1:6])
