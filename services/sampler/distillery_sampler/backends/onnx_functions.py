"""ONNX Runtime: the functions of a signature, each a graph of its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, ConfigError
from distillery_sampler.backends.base import Functions
from distillery_sampler.backends.onnx_backend import CUDA, DTYPES, open_session


class OnnxFunctions(Functions):
    """The graphs FUNCTION.onnx in `folder`: inputs by the signature's names, outputs in its order."""

    name = "onnxruntime"

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int, rewrite: bool = True) -> None:
        super().__init__(manifest.signature)
        self._files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        self._sessions = {
            name: open_session(folder / f"{name}.onnx", threads, rewrite=rewrite)
            for name in manifest.signature.functions
        }
        self.on_gpu = any(CUDA in session.get_providers() for session in self._sessions.values())
        self._types = {
            name: {node.name: DTYPES.get(node.type) for node in session.get_inputs()}
            for name, session in self._sessions.items()
        }
        for name, session in self._sessions.items():
            spec = manifest.signature.functions[name]
            if set(self._types[name]) - set(spec.inputs) or len(session.get_outputs()) != len(spec.outputs):
                raise ArtifactError(
                    f"{name}.onnx of {manifest.ref} takes {', '.join(self._types[name])} and gives "
                    f"{len(session.get_outputs())} outputs, its signature says {', '.join(spec.inputs)} and "
                    f"{len(spec.outputs)}; convert it again"
                )

    def _run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        types = self._types[function]
        for name in types:
            if name not in inputs:
                raise ConfigError(
                    f"input {name} is missing: the exported graph of {function} takes all inputs",
                    field=f"inputs.{name}",
                )
        feed = {name: np.ascontiguousarray(inputs[name], dtype) for name, dtype in types.items()}
        return dict(zip(self.signature.functions[function].outputs, self._sessions[function].run(None, feed)))

    def held(self) -> dict[Hashable, int]:
        return {id(self): self._files}
