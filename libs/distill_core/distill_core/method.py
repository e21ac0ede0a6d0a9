"""The contract between a method and the training loop. A method yields losses; the loop does everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill_core.config import Config as MethodConfig
from distill_core.config import EvaluateConfig

Cond = dict[
    str, Tensor
]  # conditions by name, batch dimension first: class_label (B,), prompt_embeds (B, T, D)

__all__ = ["Batch", "Cond", "Method", "MethodConfig", "Update"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as the data source made it. A source without images leaves `x0` None."""

    size: int
    x0: Tensor | None = None  # (B, C, H, W), in [-1, 1]
    cond: Cond = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        x0 = None if self.x0 is None else self.x0.to(device, non_blocking=True)
        return Batch(
            self.size, x0, {name: value.to(device, non_blocking=True) for name, value in self.cond.items()}
        )


@dataclass(frozen=True)
class Update:
    """One optimiser step asked for: minimise `loss` (a scalar) over the parameters of `role` alone."""

    role: str
    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """Base of all methods. A subclass is found by its file's name in `methods/<family>/`, nothing registers it.

    The keyword names of the constructor say what it needs; the builder passes these and no others:
    `teacher` (frozen Denoiser or field), `student` (a trainable copy of the teacher, or what the recipe's
    `[student]` says), `network` (built from the recipe's `[network]`), `data` (the source), `pairs` (noise and the
    teacher's pictures of it, by the recipe's `[pairs]`; None without that table), `extractor` (a frozen network that
    a loss or a reward reads pictures with; None without its table), `seed`.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper: ClassVar[str] = ""  # "Authors, year, title, arXiv id"
    roles: ClassVar[
        tuple[str, ...]
    ] = ()  # attributes that are trained: one optimiser, one checkpoint entry each
    result: ClassVar[str] = "student"  # the role that is evaluated and published

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def pictures_for(cls, config: Any) -> str | None:
        """What `config` needs real pictures for, as a few words ("the discriminator"); None if it needs none."""
        return None

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        """Yield updates in order; the loop steps each role before it asks for the next.

        Runs once per micro-batch, all of them in lock step. Randomness comes from torch's global generator, which
        the loop seeds from (seed, step, rank, micro-batch); a method keeps no counters of its own.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Tensors beside the roles that a resumed run needs (most methods have none)."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def preview(self, seed: int) -> Tensor | None:
        """Sample pictures (B, C, H, W) in [-1, 1] for the run folder, or None."""
        result = getattr(self, self.result)
        return result.preview(seed) if hasattr(result, "preview") else None

    def save_result(self, folder: Path) -> None:
        """Write the result's model folder; the loop has put the EMA weights in place."""
        getattr(self, self.result).save(folder)

    def manifest_fields(self) -> dict[str, Any]:
        """What the manifest says of the result: kind, sampler, shapes (see artifacts.Manifest)."""
        return getattr(self, self.result).manifest_fields()

    def evaluate(self, config: EvaluateConfig) -> dict[str, float]:
        """The method's own figures beside those that every generator gets (Fréchet distance, accuracy …)."""
        return {}
