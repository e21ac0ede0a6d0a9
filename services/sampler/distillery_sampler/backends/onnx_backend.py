"""ONNX Runtime, on the CPU or by its CUDA provider. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, Unavailable
from distillery_sampler.backends.base import Generator
from distillery_sampler.backends.experts import Feed
from distillery_sampler.backends.fixed import OneThread
from distillery_sampler.backends.graph_generator import GraphGenerator
from distillery_sampler.backends.rewriting import rewritten

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DTYPES: dict[str, type[np.generic]] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}
MAX_BINDINGS = 32  # shapes of the inputs whose buffers are kept


def open_onnx(
    model: Path, folder: Path, manifest: Manifest, *, threads: int, rewrite: bool = True
) -> Generator:
    """The graphs in `folder`, on the GPU where this onnxruntime has a CUDA provider."""
    on_gpu = CUDA in onnxruntime.get_available_providers()
    opened: Callable[[], Generator] = lambda: GraphGenerator(  # noqa: E731
        model,
        folder,
        manifest,
        lambda path: Session(path, threads, rewrite=rewrite),
        name="onnxruntime",
        suffix=".onnx",
        on_gpu=on_gpu,
    )
    return OneThread(opened) if on_gpu else opened()


class Session:
    """A graph; on a device of its own its inputs are copied into buffers that stay bound, one set per shape.

    With `bound_to` the buffers are on that device, else where the provider is: none are needed on the CPU.
    """

    def __init__(
        self, path: Path, threads: int, *, bound_to: str | None = None, rewrite: bool = True
    ) -> None:
        self._session = open_session(path, threads, rewrite=rewrite)
        self._types = {node.name: DTYPES.get(node.type) for node in self._session.get_inputs()}
        self.inputs = tuple(self._types)
        self.outputs = tuple(node.name for node in self._session.get_outputs())
        self._device = bound_to or ("cuda" if CUDA in self._session.get_providers() else None)
        self._bindings: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def __call__(self, feed: Feed) -> np.ndarray:
        answer: np.ndarray = self._answers(feed)[0].astype(np.float32, copy=False)
        return answer

    def named(self, feed: Feed) -> Feed:
        """All outputs by name."""
        return dict(zip(self.outputs, self._answers(feed), strict=True))

    def _answers(self, feed: Feed) -> list[np.ndarray]:
        inputs = {name: np.ascontiguousarray(value, self._types[name]) for name, value in feed.items()}
        answers: list[np.ndarray] = (
            self._session.run(None, inputs) if self._device is None else self._bound(inputs)
        )
        return answers

    def _bound(self, feed: Feed) -> list[np.ndarray]:
        shapes = tuple((name, value.shape) for name, value in feed.items())
        if shapes not in self._bindings:
            if len(self._bindings) >= MAX_BINDINGS:
                self._bindings.clear()
            self._bindings[shapes] = self._bind(feed)
        binding, buffers = self._bindings[shapes]
        for name, value in feed.items():
            buffers[name].update_inplace(value)
        self._session.run_with_iobinding(binding)
        return [output.numpy() for output in binding.get_outputs()]

    def _bind(self, feed: Feed) -> tuple[Any, dict[str, Any]]:
        binding = self._session.io_binding()
        buffers = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value, self._device, 0)
            for name, value in feed.items()
        }
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name in self.outputs:
            binding.bind_output(name, self._device)
        return binding, buffers


def open_session(path: Path, threads: int, *, rewrite: bool = True) -> onnxruntime.InferenceSession:
    """A session on the best provider this onnxruntime has; with `rewrite` the CPU's runs the graph of `rewriting.py`.

    Raises:
        ArtifactError: the file is missing or no valid ONNX graph. Unavailable: the provider did not start.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # spinning pools fight over cores
    options.log_severity_level = 3
    accelerated = [p for p in (CUDA,) if p in onnxruntime.get_available_providers()]
    try:
        model = (rewritten(path) if rewrite and not accelerated else None) or str(path)
        session = onnxruntime.InferenceSession(model, options, providers=[*accelerated, CPU])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ArtifactError(f"{path.name} cannot be loaded: {str(error).splitlines()[0]}") from None
    started = session.get_providers()[: len(accelerated)]
    if accelerated and started != accelerated:  # it falls back to the CPU without a word
        raise Unavailable(
            f"onnxruntime could not start {accelerated[0]}; check the driver, or install onnxruntime"
        )
    return session
