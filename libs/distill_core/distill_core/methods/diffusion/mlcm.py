"""Multistep latent consistency (MLCM): consistency within segments, on states of the teacher's own trajectories.

    x_N = noise,   x_{i+1} = one guided solver step of the teacher from x_i           no data, conditions alone
    min E d( J(D_S(x_i, s_i); s_i -> e), sg J(D_target(x_{i+1}, s_{i+1}); s_{i+1} -> e) )

e is the end of the segment of s_i, for K = 8, 4 and then 2 segments. What is trained on is what sampling meets:
noised data lies elsewhere where guidance leads away from the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.grids import check_segments
from distill_core.diffusion.solvers import SolverConfig, walk
from distill_core.method import Batch, Stage
from distill_core.methods.diffusion._consistency import ConsistencyConfig, ConsistencyDistillation, Points
from distill_core.networks.denoiser import Denoiser


class Config(ConsistencyConfig):
    segments: tuple[int, ...] = Field((8, 4, 2), min_length=1)  # of the stages, in order
    source: Literal["trajectory", "noised_data"] = "trajectory"  # of the points that are mapped
    states: int = Field(
        8, ge=1
    )  # of each trajectory, at random; a batch holds batch_size / states trajectories
    solver: SolverConfig = SolverConfig(kind="ddim")
    step_counts: tuple[int, ...] = Field((2, 4, 8), min_length=1)

    @model_validator(mode="after")
    def _segments_part_the_grid(self) -> Self:
        check_segments(self.segments, self.num_levels)
        return self


class MLCM(ConsistencyDistillation):
    paper = "Xie et al. 2024, MLCM: Multistep Consistency Distillation of Latent Diffusion Model, arXiv 2406.05768"
    eta = 0.0
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "config.source = 'noised_data'"} if config.source == "noised_data" else {}

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        each = max(steps // len(config.segments), 1)
        return tuple(
            Stage(f"segments_{count}", each, cls.roles, restart=index > 0)
            for index, count in enumerate(config.segments)
        )

    def end_of(self, index: Tensor, step: int) -> Tensor:
        return self.grid.segment_end(index, int(self.stage_of(step).name.removeprefix("segments_")))

    def points(self, batch: Batch, step: int) -> Points:
        if self.config.source == "noised_data":
            return super().points(batch, step)
        kept = min(self.config.states, batch.size)
        count = batch.size // kept
        cond = {name: value[:count] for name, value in batch.cond.items()}
        states = self.trajectories(count, cond)
        index = self.grid.draw(kept * count, self.device)
        which = torch.arange(count, device=self.device).repeat(kept)
        ends = self.grid.at(self.end_of(index, step))
        cond = {name: value.repeat(kept, *[1] * (value.ndim - 1)) for name, value in cond.items()}
        both = states[index, which], states[index + 1, which]
        return Points(*both, self.grid.at(index), self.grid.at(index + 1), ends, cond)

    def trajectories(self, count: int, cond: dict[str, Tensor]) -> Tensor:
        """States (N + 1, count, C, H, W) of the teacher's solver on the grid, from noise to data."""

        def denoise(x_sigma: Tensor, level: Tensor) -> Tensor:
            return self.teacher.guided(x_sigma, level, cond, self.config.guidance)

        image = self.student.image
        x = torch.randn(count, image.channels, image.height, image.width, device=self.device)
        x = x * self.student.sampler.noise_scale
        levels = [x.new_full((count,), level) for level in self.grid.levels]
        return torch.stack([x, *walk(denoise, x, levels, self.config.solver)])
