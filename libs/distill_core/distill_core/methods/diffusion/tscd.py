"""Trajectory-segmented consistency distillation (Hyper-SD): consistency within segments, which become fewer.

    min E d( J(D_S(x, s); s -> e), sg J(D_target(x', s'); s' -> e) ),   x' = one solver step of the teacher, s -> s'

e is drawn between s' and the end of s's segment, for K = 8, 4, 2 and then 1 segments of the grid: first the student
learns short jumps, where it is close to the teacher, at last one to the data. Sampled with K' steps, it jumps from
one of K' segments' beginnings to the next without fresh noise.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.grids import check_segments
from distill_core.diffusion.solvers import SolverConfig
from distill_core.method import Stage
from distill_core.methods.diffusion._consistency import ConsistencyConfig, ConsistencyDistillation
from distill_core.networks.denoiser import Denoiser


class Config(ConsistencyConfig):
    segments: tuple[int, ...] = Field((8, 4, 2, 1), min_length=1)  # of the stages, in order
    inner_end: Literal["random", "segment"] = "random"  # where both are compared; segment: at its end alone
    solver: SolverConfig = SolverConfig(kind="ddim")
    step_counts: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1)

    @model_validator(mode="after")
    def _segments_part_the_grid(self) -> Self:
        check_segments(self.segments, self.num_levels)
        return self


class TSCD(ConsistencyDistillation):
    paper = (
        "Ren et al. 2024, Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis, "
        "arXiv 2404.13686"
    )
    eta = 0.0
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        each = max(steps // len(config.segments), 1)
        return tuple(
            Stage(f"segments_{count}", each, cls.roles, restart=index > 0)
            for index, count in enumerate(config.segments)
        )

    def end_of(self, index: Tensor, step: int) -> Tensor:
        segments = int(self.stage_of(step).name.removeprefix("segments_"))
        if self.config.inner_end == "segment":
            return self.grid.segment_end(index, segments)
        return self.grid.inner_end(index, segments)
