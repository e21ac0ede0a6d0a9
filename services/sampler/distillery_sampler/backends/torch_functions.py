"""PyTorch: the functions of any kind of model that is called by its signature."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_core.artifacts import Manifest
from distill_core.kinds import find_kind
from distill_core.networks.denoiser import loading
from distillery_sampler.backends.base import Functions
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.backends.torch_shared import storages, use_threads
from distillery_sampler.models.memory import TORCH_LARGE, limit_malloc_arenas
from distillery_sampler.settings import SamplerSettings


class TorchFunctions(Functions):
    """A model as its kind loads it: `model.call(function, inputs)`."""

    name = "torch"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        settings: SamplerSettings,
        weights: SharedWeights,
        *,
        threads: int,
    ) -> None:
        super().__init__(manifest.signature)
        limit_malloc_arenas(TORCH_LARGE)
        use_threads(threads)
        self._device, self._threads = settings.device, threads
        self.on_gpu, self._half = settings.device.startswith("cuda"), settings.precision == "bf16"
        kind = find_kind(manifest.kind)
        with loading():
            self._model: Any = weights.get(
                manifest.ref, self._device, lambda: kind.load(folder, device=self._device)
            )

    @torch.inference_mode()
    def _run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        use_threads(self._threads)
        half = torch.autocast(self._device.partition(":")[0], dtype=torch.bfloat16, cache_enabled=False)
        with half if self._half else contextlib.nullcontext():
            made = self._model.call(function, {name: self._given(values) for name, values in inputs.items()})
        return {name: _array(values) for name, values in made.items()}

    def held(self) -> dict[Hashable, int]:
        return storages([self._model])

    def _given(self, values: np.ndarray) -> Any:
        """A tensor on the device; texts as a list."""
        if values.dtype == object:
            return values.tolist()
        return torch.from_numpy(np.require(values, requirements=("C", "W"))).to(self._device)


def _array(values: Any) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.array(values, dtype=object)
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
