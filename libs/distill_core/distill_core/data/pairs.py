"""Pairs (z, x0): noise, and what a teacher's own sampler makes of it; made once and kept on disk.

A pair is a function of (teacher, source, seed, index): the condition is the source's item of that index, z the
noise stream that sampling itself draws from, so a one-step student sees the very input it is sampled with.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_core.data.source import Source
from distill_core.diffusion.noise import unit_normals
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.generation import generate_x0
from distill_core.recipe.tables import PairsConfig

log = logging.getLogger(__name__)
SHARD = 1024  # pairs per file: what a kill can cost


@dataclass(frozen=True)
class PairBatch:
    """Pairs drawn for one update, on the CPU."""

    z: Tensor  # (B, C, H, W), unit normal
    x0: Tensor  # (B, C, H, W), in the teacher's own space (latents for a latent model)
    cond: Cond


class Pairs:
    """All pairs of one teacher and one source."""

    def __init__(self, x0: Tensor, source: Source, config: PairsConfig) -> None:
        self.x0, self.source, self.config = x0, source, config

    def __len__(self) -> int:
        return len(self.x0)

    def at(self, indices: Tensor) -> PairBatch:
        """The pairs at `indices` (B,)."""
        shape = tuple(self.x0.shape[1:])
        z = unit_normals([(self.config.seed, int(index)) for index in indices], 0, shape)
        return PairBatch(
            torch.from_numpy(z), self.x0[indices], self.source.conditions(indices % self.source.size)
        )

    def draw(self, count: int) -> PairBatch:
        """`count` pairs, with replacement, by torch's global generator."""
        return self.at(torch.randint(len(self), (count,)))


def build_pairs(teacher: Denoiser, source: Source, config: PairsConfig, folder: Path) -> Pairs:
    """The pairs in `folder`; those that are missing are made, shard by shard, so a kill costs one shard."""
    if is_faked():
        shape = teacher.image.channels, teacher.image.height, teacher.image.width
        return Pairs(torch.empty(config.count, *shape), source, config)
    folder.mkdir(parents=True, exist_ok=True)
    files = {start: folder / f"{start:09d}.safetensors" for start in range(0, config.count, SHARD)}
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that want the same pairs make them once
        made, began = 0, time.monotonic()
        for start, file in files.items():
            if file.is_file():
                continue
            stop = min(start + SHARD, config.count)
            _write(file, torch.cat(list(_sampled(teacher, source, config, start, stop))))
            made += stop - start
            rate = made / (time.monotonic() - began)
            log.info(
                "teacher pairs: %d of %d, about %.0f s left", stop, config.count, (config.count - stop) / rate
            )
    return Pairs(torch.cat([load_file(file)["x0"] for file in files.values()]), source, config)


def _sampled(
    teacher: Denoiser, source: Source, config: PairsConfig, start: int, stop: int
) -> Iterator[Tensor]:
    for first in range(start, stop, config.batch_size):
        indices = range(first, min(first + config.batch_size, stop))
        yield generate_x0(
            teacher,
            source.conditions(torch.tensor(indices) % source.size),
            indices,
            seed=config.seed,
            num_steps=config.num_steps,
            guidance=config.guidance,
        ).cpu()


def _write(file: Path, x0: Tensor) -> None:
    draft = file.with_suffix(".tmp")
    save_file({"x0": x0.contiguous()}, draft)
    draft.replace(file)
