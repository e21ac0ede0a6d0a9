"""Consistency distillation on a grid of levels: what consistency models and their variants share.

    s, e', e: a level of the grid, the next one, and the end that both are mapped to (0, or a segment's)
    x  = x0 + s eps,    x' = one step of the teacher's solver from x at s to e'
    y  = J(D_target(x', e'), e),  y = x' where e' = e            J: the jump along the prediction
    min E d( J(D_student(x, s), e), y ),   theta_target <- decay theta_target + (1 - decay) theta

At e' = e the boundary condition is exact, whatever the network's parameterisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.levels import expand
from distill_core.diffusion.solvers import SolverConfig, advance
from distill_core.diffusion.trajectory import jump
from distill_core.losses.denoising import add_noise
from distill_core.losses.distance import DISTANCES, Distance
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import Level, few_step_sampler, level_grid
from distill_core.networks.target import TargetNetwork


class ConsistencyConfig(MethodConfig):
    num_levels: int = Field(32, ge=1, le=4096)  # intervals of the grid (CD: 40, LCM: 50)
    start: Level = Field(None, gt=0)  # the highest noise level, data std; unset: the teacher's start
    guidance: float = 1.0  # of the teacher, baked into the student; 1 = off
    solver: SolverConfig = SolverConfig(kind="heun")  # from one level to the next
    target_decay: float = Field(0.95, ge=0, lt=1)  # 0: the student itself, without gradient
    distance: Distance = "l2"  # between the two ends, per item (`losses.distance`)
    step_counts: tuple[int, ...] = Field((1, 2), min_length=1)  # numbers of steps that the student serves

    rounds_steps: ClassVar[bool] = False
    """Whether steps of unequal numbers of intervals will do: LCM's scheduler takes 4 steps of a grid of 50 so."""

    @model_validator(mode="after")
    def _steps_lie_on_the_grid(self) -> Self:
        counts, levels = self.step_counts, self.num_levels
        if list(counts) != sorted(set(counts)) or counts[0] < 1:
            raise ValueError("step_counts must be positive and strictly ascending, e.g. [1, 2, 4]")
        if self.rounds_steps and (any(counts[-1] % count for count in counts) or counts[-1] > levels):
            raise ValueError(
                f"step_counts must divide the largest of them, at most num_levels = {levels}, e.g. [1, 2, 4]"
            )
        if not self.rounds_steps and any(levels % count or counts[-1] % count for count in counts):
            raise ValueError(
                f"step_counts must divide num_levels = {levels} and the largest of them, e.g. [1, 2, 4]"
            )
        return self


class Points(NamedTuple):
    """Neighbours on trajectories of the teacher, and where both are to lead: (B, C, H, W), (B,), conditions."""

    x: Tensor
    moved: Tensor  # x, one step of the solver on
    sigma: Tensor  # level of x
    following: Tensor  # of moved
    end: Tensor  # of what is compared, at or below `following`
    cond: Cond


class ConsistencyDistillation(Method):
    """A variant overrides one of `end_of`, `scale`, `points`, `output`, `further`."""

    roles: tuple[str, ...] = ("student",)
    held = ("target",)
    eta: ClassVar[float] = 1.0  # share of fresh noise between the student's steps

    def __init__(self, config: ConsistencyConfig, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        if config.guidance != 1:  # what the student is measured beside
            teacher.sampler = teacher.sampler.model_copy(update={"guidance": config.guidance})
        self.grid = level_grid(teacher, config.num_levels, start=config.start)
        self.target = TargetNetwork(student, config.target_decay)
        levels = self.grid.starts(config.step_counts[-1])
        counts = config.step_counts if len(config.step_counts) > 1 else ()
        student.sampler = few_step_sampler(student, levels, counts, eta=self.eta)

    @classmethod
    def columns(cls, config: Any) -> Mapping[str, str]:
        return {"x0": "points on the teacher's trajectories"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        with torch.no_grad():
            points = self.points(batch, step)
            wanted = self.wanted(points)
        output = self.output(points)
        error = DISTANCES[self.config.distance](output, wanted).mean()
        yield from self.further(error, output, batch, points)
        self.target.follow(self.student, step)

    def further(self, error: Tensor, output: Tensor, batch: Batch, points: Points) -> Iterator[Update]:
        """The student's update, and whatever a variant trains beside it."""
        yield Update("student", error, {"x0_std": output.detach().std()})

    def points(self, batch: Batch, step: int) -> Points:
        """Noised data, and where the teacher moves it to."""
        index = self.grid.draw(batch.size, self.device)
        sigma, following = self.grid.at(index), self.grid.at(index + 1)
        x = add_noise(self.teacher.encode(batch.columns["x0"]), sigma)
        moved = self.move(x, sigma, following, batch.cond)
        return Points(x, moved, sigma, following, self.grid.at(self.end_of(index, step)), batch.cond)

    def end_of(self, index: Tensor, step: int) -> Tensor:
        """Index (B,) of the level to which interval `index` (B,) is mapped; data."""
        return torch.full_like(index, len(self.grid))

    def move(self, x: Tensor, sigma: Tensor, following: Tensor, cond: Cond) -> Tensor:
        """One step of the teacher's solver (B, C, H, W)."""
        guidance = self.scale(x)

        def denoise(x_sigma: Tensor, level: Tensor) -> Tensor:
            return self.teacher.guided(x_sigma, level, cond, guidance)

        return advance(denoise, x, sigma, following, self.config.solver)

    def scale(self, x: Tensor) -> float | Tensor:
        """The teacher's guidance in a step from `x` (B, C, H, W): one scale, or one for each item (B,)."""
        return self.config.guidance

    def wanted(self, points: Points) -> Tensor:
        """What the student is to answer (B, C, H, W): where the target network leads from the moved point."""
        arrived = points.following <= points.end  # there the point itself is the answer
        level = torch.where(arrived, points.sigma, points.following)
        x0 = self.target(points.moved, level, points.cond)
        led = jump(points.moved, x0, level, points.end)
        return torch.where(expand(arrived, led), points.moved, led)

    def output(self, points: Points) -> Tensor:
        """Where the student leads from x (B, C, H, W)."""
        x0: Tensor = self.student(points.x, points.sigma, points.cond)
        return jump(points.x, x0, points.sigma, points.end)
