"""What every peer serves: a one-step student over the same ONNX file, with the sampler's own noise.

A request's picture is to_uint8(D(x, sigma)), x = sigma * unit_normal(seed), for its class label: byte for byte what
the sampler answers. Runs in a peer's environment: NumPy, ONNX Runtime and the noise function are all it imports.
"""

from __future__ import annotations

import numpy as np
import onnxruntime

from distill_core.diffusion.noise import unit_normal


class Student:
    """The graph, opened as the sampler opens it."""

    def __init__(self, graph: str, sigma: float, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._sigma = sigma
        self.shape: tuple[int, ...] = tuple(
            next(node.shape[1:] for node in self._session.get_inputs() if node.name == "x_sigma")
        )
        self(np.zeros(1, np.uint64), np.zeros(1, np.int64))  # warm

    def __call__(self, seeds: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Pictures uint8 (B, H, W, C) of seeds and labels (B,)."""
        noise = np.stack([unit_normal(int(seed), 0, 0, self.shape) for seed in seeds])
        feed = {
            "x_sigma": (noise * np.float32(self._sigma)).astype(np.float32, copy=False),
            "sigma": np.full(len(noise), self._sigma, np.float32),
            "class_label": np.asarray(labels, np.int64),
        }
        x = self._session.run(None, feed)[0]
        scaled: np.ndarray = np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
        return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))
