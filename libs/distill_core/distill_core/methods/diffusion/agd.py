"""Adapter guidance distillation (AGD): small adapters over a frozen model give in one pass what guidance takes two for.

    min E lambda(s) |D_{W, A}(x, s, c, w) - g_w(x, s, c)|^2     over A alone;   w uniform on a range, w = 1 is off
    x_0 = noise,  x_{i+1} = one guided step of the teacher from x_i,  g_w(x_i) = the x0 that this step went towards

The states of the guided walks are what sampling meets: noised data lies elsewhere where guidance leads away from it.
They are made once and kept, and then no teacher is asked any more. The adapters move to other checkpoints of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.data.trajectories import Trajectories, build_trajectories
from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.diffusion.trajectory import invert_jump
from distill_core.errors import ConfigError
from distill_core.method import Batch, Cond, MethodConfig, Update
from distill_core.methods.diffusion._guidance import COMPARED, GuidanceDistillation
from distill_core.metrics.frechet import frechet_distance
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_adapted import AdaptedDenoiser
from distill_core.networks.guidance_adapters import GuidanceAdapterConfig
from distill_core.networks.levels import level_grid
from distill_core.recipe.tables import EvaluateConfig

SIDE = 8  # pixels of what sets of pictures are compared by


class Config(MethodConfig):
    guidance_min: float = Field(1.0, ge=0)  # official: 1 to 6 for DiT, 1 to 12 for Stable Diffusion
    guidance_max: float = Field(6.0, ge=0)  # greatest guidance of a walk
    source: Literal["trajectory", "noised_data"] = "trajectory"  # of the points that are learnt at
    walk_steps: int = Field(32, ge=2, le=1000)  # of the teacher's walks
    adapters: GuidanceAdapterConfig = GuidanceAdapterConfig()  # their size

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.guidance_min >= self.guidance_max:
            raise ValueError("guidance_min must be below guidance_max; lora_guidance learns a single one")
        return self


class AGD(GuidanceDistillation):
    paper = (
        "Perez Jensen & Sadat 2025, Efficient Distillation of Classifier-Free Guidance using Adapters, "
        "arXiv 2503.07274"
    )
    config: Config
    student: AdaptedDenoiser

    def __init__(
        self,
        config: Config,
        *,
        teacher: Denoiser,
        pairs: Pairs | None = None,
        sibling: Denoiser | None = None,
    ) -> None:
        super().__init__(config, teacher=teacher, student=AdaptedDenoiser.over(teacher, config.adapters))
        if config.source == "trajectory" and pairs is None:
            raise ConfigError(
                "agd walks from stored noise: add a [pairs] table, e.g. pairs.count = 2048, or set config.source = "
                "'noised_data'",
                field="pairs",
            )
        allowed = config.guidance_min, config.guidance_max
        usual = min(max(teacher.sampler.guidance, allowed[0]), allowed[1])
        self.student.sampler = teacher.sampler.model_copy(
            update={"guidance": usual, "guidance_range": allowed, "guidable": False}
        )
        self.pairs, self.sibling, self.law = pairs, sibling, GuidanceLaw(*allowed)
        self.levels = level_grid(teacher, config.walk_steps).levels
        self._walks: Trajectories | None = None  # a function of the teacher and the grid: made or found again

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "config.source = 'noised_data'"} if config.source == "noised_data" else {}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if self.config.source == "noised_data":
            yield from super().updates(batch, step)
        else:
            yield Update("student", self.walked(batch.size))

    def walked(self, count: int) -> Tensor:
        """The loss (scalar) at `count` states of stored walks."""
        walks = self.walks()
        chosen = torch.randint(len(walks), (count,))
        which = torch.randint(self.config.walk_steps, (count,))
        steps, levels = walks.steps(chosen, which).to(self.device), torch.tensor(self.levels)
        sigma, sigma_next = levels[which].to(self.device), levels[which + 1].to(self.device)
        x, x_next = steps.states.unbind(1)
        taught = invert_jump(x_next, x, sigma, sigma_next)
        told = self.told(steps.cond, walks.scales(chosen).to(self.device))
        return self.loss(self.student(x, sigma, told), taught, sigma)

    def walks(self) -> Trajectories:
        """The teacher's guided walks, with all their states."""
        if self._walks is None:
            assert self.pairs is not None
            every = range(len(self.levels))
            self._walks = build_trajectories(self.pairs, self.teacher, self.levels, every, self.law)
        return self._walks

    def guidance(self, batch: Batch) -> Tensor:
        drawn: Tensor = self.law.draw_each(batch.index.float())
        return drawn

    def told(self, cond: Cond, guidance: float | Tensor) -> Cond:
        return {**cond, "guidance": guidance} if isinstance(guidance, Tensor) else cond

    def compared(self) -> Mapping[str, float]:
        low, high = self.config.guidance_min, self.config.guidance_max
        return {"_middle": (low + high) / 2, "_high": high}

    def distances(self, made: Tensor, wanted: Tensor) -> dict[str, float]:
        """Fréchet distance of the pictures themselves, averaged down to `SIDE` pixels: no noise is compared."""
        sets = (F.adaptive_avg_pool2d(one, SIDE).flatten(1) for one in (wanted, made))
        return {"frechet_distance": frechet_distance(*sets)}

    def asked(self, scale: float) -> float:
        return scale

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Beside the errors: what is trained and evaluated, as shares of the teacher's, and the other checkpoint's.

        `sibling_error` is of these adapters over that checkpoint against its own guidance, `sibling_unguided_error` of
        the checkpoint without.
        """
        figures = super().figures(config) | self.costs()
        if self.sibling is not None:
            moved = AdaptedDenoiser.over(self.sibling, self.student.adapters)
            moved.sampler = self.student.sampler
            count, scale = min(config.num_samples, COMPARED), self.config.guidance_max
            wanted = self.made(self.sibling, count, config.seed, scale)
            for name, model, asked in (("sibling", moved, scale), ("sibling_unguided", self.sibling, 1.0)):
                made = self.made(model, count, config.seed, asked)
                figures[f"{name}_error"] = float((made - wanted).square().mean())
        return figures

    def costs(self) -> dict[str, float]:
        """Parameters that are trained, and network evaluations of a guided picture, as shares of the teacher's."""
        trained = sum(value.numel() for value in self.student.parameters())
        rows = [self._rows(model) for model in (self.student, self.teacher)]
        whole = sum(value.numel() for value in self.teacher.parameters())
        return {"trained_share": trained / whole, "evaluations_share": rows[0] / rows[1]}

    def _rows(self, model: Denoiser) -> int:
        """Rows that the network of `model` answers for one picture at the greatest guidance."""
        rows: list[int] = []
        network: torch.nn.Module = model.network  # type: ignore[assignment]
        counted = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        self.made(model, 1, 0, self.config.guidance_max)
        counted.remove()
        return sum(rows)
