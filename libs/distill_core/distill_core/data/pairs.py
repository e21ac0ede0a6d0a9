"""Pairs (z, x0): noise, and what a model's own sampler makes of it; made once and kept on disk.

A pair is a function of (model, source, seed, index): the condition is the source's item of that index, z the
noise stream that sampling itself draws from, so a one-step student sees the very input it is sampled with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.data.shards import Shards, check_size, fill
from distill_core.data.source import Source
from distill_core.diffusion.noise import unit_normals
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.generation import generate_x0
from distill_core.networks.modes import evaluating
from distill_core.recipe.tables import PairsConfig


@dataclass(frozen=True)
class PairBatch:
    """Pairs drawn for one update, on the CPU."""

    z: Tensor  # (B, C, H, W), unit normal
    x0: Tensor  # (B, C, H, W), in the teacher's own space (latents for a latent model)
    cond: Cond

    def to(self, device: torch.device) -> PairBatch:
        """The same pairs on `device`."""
        cond = {name: value.to(device) for name, value in self.cond.items()}
        return PairBatch(self.z.to(device), self.x0.to(device), cond)


class Pairs:
    """All pairs of one model and one source, in `folder`."""

    def __init__(self, shards: Shards, source: Source, config: PairsConfig, folder: Path) -> None:
        self.shards, self.source, self.config, self.folder = shards, source, config, folder

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def x0(self) -> Tensor:
        """Every x0 (N, C, H, W), in memory."""
        return self.shards.all("x0")

    def at(self, indices: Tensor) -> PairBatch:
        """The pairs at `indices` (B,)."""
        x0 = self.shards.at("x0", indices)
        return PairBatch(self.noise(indices, tuple(x0.shape[1:])), x0, self.conditions(indices))

    def noise(self, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Z (B, *shape) of the pairs at `indices` (B,)."""
        return torch.from_numpy(unit_normals([(self.config.seed, int(index)) for index in indices], 0, shape))

    def conditions(self, indices: Tensor) -> Cond:
        """What the pairs at `indices` (B,) are conditioned on."""
        return self.source.conditions(indices % self.source.size)

    def draw(self, count: int) -> PairBatch:
        """`count` pairs, with replacement, by torch's global generator."""
        return self.at(torch.randint(len(self), (count,)))

    def remade(self, model: Denoiser, **changes: Any) -> Pairs:
        """What `model` makes of the same noise under the same conditions; `changes` are keys of `[pairs]`.

        They lie beside these, addressed by the weights of `model`: whoever trained it, equal weights find them again.
        """
        config = self.config.model_copy(update=changes)
        return build_pairs(model, self.source, config, self.beside(model, config.model_dump(mode="json")))

    def beside(self, model: Denoiser, made: Any) -> Path:
        """The folder of what `model`, as `made` says, makes of the noise of these pairs."""
        if is_faked():
            return self.folder
        of = [self.folder.name, weights_digest(model), model.sampler.model_dump(mode="json"), made]
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder.parent / key


def build_pairs(model: Denoiser, source: Source, config: PairsConfig, folder: Path) -> Pairs:
    """The pairs in `folder`; those that are missing are made, shard by shard, so a kill costs one shard.

    Raises:
        ConfigError: more of them than `max_gib` allows. DataError: a file there is another model's.
    """
    shape = model.image.channels, model.image.height, model.image.width
    check_size(config.count, shape, config.max_gib, field="pairs.count")
    if is_faked():
        return Pairs(Shards([{"x0": torch.empty(config.count, *shape)}]), source, config, folder)

    def make(start: int, stop: int) -> dict[str, Tensor]:
        with evaluating(model):
            return {"x0": torch.cat(list(_sampled(model, source, config, start, stop)))}

    return Pairs(fill(folder, config.count, make), source, config, folder)


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's tensors: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sampled(model: Denoiser, source: Source, config: PairsConfig, start: int, stop: int) -> Iterator[Tensor]:
    for first in range(start, stop, config.batch_size):
        indices = range(first, min(first + config.batch_size, stop))
        yield generate_x0(
            model,
            source.conditions(torch.tensor(indices) % source.size),
            indices,
            seed=config.seed,
            num_steps=config.num_steps,
            guidance=config.guidance,
        ).cpu()
