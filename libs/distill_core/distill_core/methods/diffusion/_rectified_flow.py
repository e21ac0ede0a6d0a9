"""Rectified flows from stored pairs of noise and picture: what InstaFlow, RF++ and SlimFlow share.

    x_s = x0 + s eps,   eps = (k z - x0) / s_max        the line from where the sampler starts, k z, to where it ends
    L   = E[ w d(u_theta(x_t, t, c), eps - x0) ],       u_theta - (eps - x0) = (x0 - D_theta(x_s, s, c)) / t

k is the sampler's own scale of the unit noise z: at the first level the line stands exactly where sampling begins.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data.pairs import PairBatch, Pairs
from distill_core.diffusion.levels import expand
from distill_core.diffusion.rectified import Times, deviation, draw_times, flow_time, level_of
from distill_core.diffusion.solvers import SolverConfig, walk
from distill_core.diffusion.trajectory import Denoise
from distill_core.errors import ConfigError
from distill_core.losses.distance import DISTANCES, Distance
from distill_core.method import Cond, Method, MethodConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import few_step_sampler, level_grid, student_levels
from distill_core.recipe.tables import EvaluateConfig

T_MIN = 1e-3  # of the lines' times, as in the official code
PATH = 32  # Euler's steps along which a path's deviation from a straight one is measured


class FlowConfig(MethodConfig):
    held_out: int = Field(256, ge=1)  # the last pairs, for the figures alone


class Line(NamedTuple):
    """Ends of the lines of a batch of pairs, on the model's device."""

    x0: Tensor  # (B, C, H, W)
    eps: Tensor  # (B, C, H, W): x0 + s_max eps is where sampling starts
    cond: Cond

    def at(self, sigma: Tensor) -> Tensor:
        """x_sigma (B, C, H, W) at the levels (B,)."""
        return self.x0 + expand(sigma, self.x0) * self.eps


class RectifiedFlow(Method):
    """A variant says what a step learns, in `updates`."""

    roles = ("student",)
    flow: Denoiser  # of a variant whose later stage learns from what the student was

    def __init__(
        self, config: FlowConfig, *, teacher: Denoiser, student: Denoiser, pairs: Pairs | None
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        if pairs is None or len(pairs) <= config.held_out:
            raise ConfigError(
                f"rectified flows learn from the teacher's own pictures, more than the {config.held_out} that are "
                "held out: add a [pairs] table, e.g. pairs.count = 4096",
                field="pairs",
            )
        self.pairs: Pairs = pairs
        (self.level,) = student_levels(teacher)
        self.noise_scale = student.schedule.start_scale(self.level)
        student.sampler = few_step_sampler(student, (self.level,))

    def copied(self) -> Denoiser:
        """A frozen copy of the student as it is."""
        return copy.deepcopy(self.student).requires_grad_(False)

    def keep_flow(self) -> None:
        """Take the student as the flow that the next stage learns from: its raw weights, their rate fallen to 0."""
        self.flow.load_state_dict(self.student.state_dict())

    def drawn(self, count: int, pairs: Pairs | None = None) -> Line:
        """Lines of `count` pairs that are not held out, by torch's global generator."""
        pairs = pairs or self.pairs
        return self.line(pairs.at(torch.randint(len(pairs) - self.config.held_out, (count,))))

    def line(self, pairs: PairBatch) -> Line:
        """The lines of these pairs."""
        pairs = pairs.to(self.device)
        return Line(pairs.x0, (pairs.z * self.noise_scale - pairs.x0) / self.level, pairs.cond)

    def times(self, count: int, law: Times = "uniform", steepness: float = 4.0) -> Tensor:
        """(count,) flow times from T_MIN up to where sampling starts."""
        start = float(flow_time(torch.tensor(self.level)))
        t = draw_times(count, law, steepness, torch.empty(0, device=self.device))
        return T_MIN + (start - T_MIN) * t

    def velocity_distance(self, line: Line, t: Tensor, distance: Distance = "l2") -> tuple[Tensor, Tensor]:
        """Distance (B,) of the student's velocity from the line's at the times `t` (B,); and its x0 (B, C, H, W)."""
        sigma = level_of(t)
        x0 = self.student(line.at(sigma), sigma, line.cond)
        scale = expand(1 / t, x0)
        return DISTANCES[distance](x0 * scale, line.x0 * scale), x0

    def first_call(self, denoiser: Denoiser, line: Line) -> Tensor:
        """x0 (B, C, H, W) of one step from where the lines start."""
        sigma = line.x0.new_full((len(line.x0),), self.level)
        x0: Tensor = denoiser(line.at(sigma), sigma, line.cond)
        return x0

    def bound(self, denoiser: Denoiser, cond: Cond, guidance: float = 1.0) -> Denoise:
        """`denoiser` under a condition."""
        return lambda x_sigma, sigma: denoiser.guided(x_sigma, sigma, cond, guidance)

    def held_out(self, config: EvaluateConfig) -> list[Line]:
        """The lines of the held-out pairs, in batches."""
        first = len(self.pairs) - self.config.held_out
        return [
            self.line(self.pairs.at(part))
            for part in torch.arange(first, len(self.pairs)).split(config.batch_size)
        ]

    @torch.no_grad()
    def pair_distance(self, denoiser: Denoiser, lines: list[Line], num_steps: int = 1) -> float:
        """Mean square of what `denoiser` makes of held-out noise in Euler's steps, less what the teacher made of it."""
        grid = level_grid(self.teacher, num_steps).levels
        errors = []
        for line in lines:
            levels = [line.x0.new_full((len(line.x0),), level) for level in grid]
            x = line.at(levels[0])
            *_, end = walk(self.bound(denoiser, line.cond), x, levels, SolverConfig())
            errors.append((end - line.x0).square().flatten(1).mean(1))
        return float(torch.cat(errors).mean())

    @torch.no_grad()
    def straightness(self, denoiser: Denoiser, lines: list[Line], guidance: float = 1.0) -> float:
        """Mean squared deviation of the paths of `denoiser` from straight ones, per value; 0 is straight."""
        start = float(flow_time(torch.tensor(self.level)))
        found = []
        for line in lines:
            ones = line.x0.new_ones(len(line.x0))
            levels = [ones * self.level]
            levels += [level_of(ones * (start * (1 - k / PATH))) for k in range(1, PATH + 1)]
            found.append(deviation(self.bound(denoiser, line.cond, guidance), line.at(levels[0]), levels))
        return float(torch.cat(found).mean())
