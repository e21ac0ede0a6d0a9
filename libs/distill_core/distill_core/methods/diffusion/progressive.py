"""Progressive distillation: each student takes one step where its teacher takes two, then becomes the teacher.

    x' = J(D_T(x, s); m),   y = J(D_T(x', m); e)             two DDIM steps of the teacher over half the interval each
    x0~ = (y - (e/s) x) / (1 - e/s)                          the x0 whose one step from s to e ends in y
    min E max(1 / s^2, 1) |D_S(x, s) - x0~|^2,               then T <- S, N <- N / 2

x = x0 + s eps, s on a grid of N levels, e the next level, m between them on the grid of 2N.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.grids import LevelGrid
from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.diffusion.solvers import SolverConfig, walk
from distill_core.diffusion.trajectory import invert_jump
from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise
from distill_core.losses.distance import l2, truncated_snr
from distill_core.method import Batch, Cond, Method, MethodConfig, Stage, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import Level, few_step_sampler, level_grid


class Config(MethodConfig):
    start_steps: int = Field(16, ge=1, le=4096)  # of the first student; its teacher takes twice as many
    end_steps: int = Field(1, ge=1)  # of the last one
    start: Level = Field(None, gt=0)  # the highest noise level, data std; unset: the teacher's start
    guidance: float = 1.0  # of the teacher in the first stage, baked into all students; 1 = off
    solver: SolverConfig = SolverConfig()  # of the teacher in the first stage; later ones were made for ddim

    @model_validator(mode="after")
    def _halves(self) -> Self:
        ratio, rest = divmod(self.start_steps, self.end_steps)
        if rest or ratio & (ratio - 1):
            raise ValueError("start_steps must be end_steps times a power of 2, e.g. 16 and 1")
        return self


class Progressive(Method):
    paper = (
        "Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512"
    )
    roles = ("student",)
    held = ("former",)  # the student of the stage before

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        if config.guidance != 1 and teacher.sampler.guidance_range is not None:
            raise ConfigError(
                "this teacher is told its guidance, and all of its range is distilled; leave config.guidance out",
                field="config.guidance",
            )
        if config.guidance != 1:  # what the student is measured beside
            teacher.sampler = teacher.sampler.model_copy(update={"guidance": config.guidance})
        self.former = copy.deepcopy(student).requires_grad_(False)
        self.finest = level_grid(teacher, 2 * config.start_steps, start=config.start)
        self.grid = self._made_for(config.start_steps)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "points on the teacher's trajectories"}

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        count = (config.start_steps // config.end_steps).bit_length()
        each = max(steps // count, 1)
        return tuple(
            Stage(f"steps_{config.start_steps >> index}", each, cls.roles, restart=index > 0)
            for index in range(count)
        )

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.former.load_state_dict(self.student.state_dict())
        self.grid = self._made_for(int(stage.name.removeprefix("steps_")))

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        half, index = self.finest.coarse(2 * len(self.grid)), self.grid.draw(batch.size, self.device)
        levels = [half.at(2 * index + number) for number in range(3)]
        x = add_noise(self.teacher.encode(batch.columns["x0"]), levels[0])
        cond = self.told(batch)
        target = self.target(x, levels, cond)
        error = l2(self.student(x, levels[0], cond), target)
        yield Update(
            "student", (truncated_snr(levels[0]) * error).mean(), {"x0_error": error.detach().mean()}
        )

    def told(self, batch: Batch) -> Cond:
        """The condition of teacher and student: with a guidance of its range, where the teacher is told one."""
        allowed = self.teacher.sampler.guidance_range
        if allowed is None:
            return batch.cond
        return {**batch.cond, "guidance": GuidanceLaw(*allowed).draw_each(batch.index.float())}

    @torch.no_grad()
    def target(self, x: Tensor, levels: list[Tensor], cond: Cond) -> Tensor:
        """The x0 (B, C, H, W) whose single step ends where two steps of the teacher over `levels` do."""
        first = len(self.grid) == self.config.start_steps

        def denoise(x_sigma: Tensor, sigma: Tensor) -> Tensor:
            if first and "guidance" in cond:
                told: Tensor = self.teacher(x_sigma, sigma, cond)
                return told
            if first:
                return self.teacher.guided(x_sigma, sigma, cond, self.config.guidance)
            answer: Tensor = self.former(x_sigma, sigma, cond)
            return answer

        *_, ends = walk(denoise, x, levels, self.config.solver if first else SolverConfig())
        return invert_jump(ends, x, levels[0], levels[2])

    def _made_for(self, count: int) -> LevelGrid:
        """The grid of a student of `count` steps, which samples on it from now on."""
        grid = self.finest.coarse(count)
        spec, taught = few_step_sampler(self.student, grid.levels[:-1], eta=0.0), self.teacher.sampler
        if taught.guidance_range is not None:
            told = {"guidance": taught.guidance, "guidance_range": taught.guidance_range}
            spec = spec.model_copy(update=told)
        self.student.sampler = spec
        return grid
