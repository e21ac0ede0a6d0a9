"""BOSS: Bellman optimal step sizes for a pretrained flow, then straightening to exactly these steps. No data.

    grid        the n steps of least summed error on a recorded walk of K Euler steps (`diffusion.bellman`)
    straighten  min E |v_theta(x_a, l_a) - (x_b - x_a) / (t_b - t_a)|^2     (x_a, x_b): both ends of a step of the grid

x and v are in the schedule's own form there: the error of where the step lands, over the step's share of the grid.
One student serves one number of steps. Where even steps are nearly the best already, as on straight flow times, the
grid has little to gain; on the timesteps of a DDPM it has much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.data.trajectories import StateBatch, Trajectories, build_trajectories, recorded
from distill_core.diffusion.bellman import bellman_grid, even_grid, step_costs
from distill_core.diffusion.levels import expand
from distill_core.diffusion.trajectory import jump
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.levels import few_step_sampler, level_grid
from distill_core.recipe.tables import EvaluateConfig


class Config(MethodConfig):
    walk_steps: int = Field(100, ge=2, le=1000)  # K; official: 100
    num_steps: int = Field(4, ge=1, le=1000)  # n, of the student; official: 2 to 10
    grid: Literal["bellman", "even"] = "bellman"  # even: as many steps, of equal numbers of intervals
    probes: int = Field(100, ge=1)  # noises whose walks decide the grid; official: 100
    guidance: float = 1.0  # of the teacher; 1 = off
    held_out: int = Field(256, ge=1)  # the last noises, for the figures alone


class BOSS(Method):
    paper = (
        "Nguyen et al. 2023, Bellman Optimal Stepsize Straightening of Flow-Matching Models, arXiv 2312.16414"
    )
    roles = ("student",)

    def __init__(
        self, config: Config, *, teacher: Denoiser, student: Denoiser, pairs: Pairs | None = None
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        if pairs is None or len(pairs) <= config.held_out:
            raise ConfigError(
                f"boss walks from stored noise, more than the {config.held_out} that are held out: add a [pairs] "
                "table, e.g. pairs.count = 4096",
                field="pairs",
            )
        if config.num_steps > config.walk_steps:
            raise ConfigError(
                f"{config.num_steps} steps cannot be chosen of a walk of {config.walk_steps}; raise "
                "config.walk_steps",
                field="config.num_steps",
            )
        self.pairs = pairs
        self.levels = level_grid(teacher, config.walk_steps).levels
        self.grid: tuple[int, ...] = ()
        self.use(even_grid(config.walk_steps, config.num_steps))
        self.chosen = False
        self._walks: Trajectories | None = None  # a function of the teacher and the grid: made or found again

    def use(self, grid: tuple[int, ...]) -> None:
        """Sample the student in the steps between the places `grid` of the walk."""
        self.grid = grid
        levels = tuple(self.levels[place] for place in grid[:-1])
        self.student.sampler = few_step_sampler(self.student, levels, (self.config.num_steps,), eta=0.0)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if not self.chosen and not is_faked():
            self.choose()
        walks = self.walks()
        chosen = torch.randint(len(walks) - self.config.held_out, (batch.size,))
        which = torch.randint(self.config.num_steps, (batch.size,))
        yield Update("student", self.landing_error(walks.at(chosen).to(self.device), which).mean())

    def choose(self) -> None:
        """Find the grid by the walks from the first noises, and use it from now on."""
        self.chosen = True
        if self.config.grid == "bellman":
            self.use(bellman_grid(self.costs(), self.config.num_steps))

    @torch.no_grad()
    def costs(self) -> Tensor:
        """C (K, K + 1), mean over the walks from the first `probes` noises."""
        scales = self.teacher.schedule.scale(torch.tensor(self.levels)).tolist()
        first = torch.arange(min(self.config.probes, len(self.pairs)))
        image, found = self.teacher.image, []
        for part in first.split(self.pairs.config.batch_size):
            cond = {name: value.to(self.device) for name, value in self.pairs.conditions(part).items()}
            z = self.pairs.noise(part, (image.channels, image.height, image.width)).to(self.device)
            states, predictions = recorded(self.teacher, z, cond, self.levels, self.config.guidance)
            found.append(len(part) / len(first) * step_costs(states, predictions, self.levels, scales))
        return torch.stack(found).sum(0)

    def walks(self) -> Trajectories:
        """The teacher's states at the places of the grid."""
        if self._walks is None:
            self._walks = build_trajectories(
                self.pairs, self.teacher, self.levels, self.grid, self.config.guidance
            )
        return self._walks

    def landing_error(self, walks: StateBatch, which: Tensor) -> Tensor:
        """Squared error (B,) of the velocity over the steps `which` (B,) of the grid, in the schedule's own form."""
        rows = torch.arange(len(which), device=self.device)
        levels = torch.tensor([self.levels[place] for place in self.grid], device=self.device)
        places = torch.tensor(self.grid, dtype=torch.float32, device=self.device) / self.config.walk_steps
        which = which.to(self.device)
        start, end = levels[which], levels[which + 1]
        x = walks.states[rows, which]
        landed = jump(x, self.student(x, start, walks.cond), start, end)
        scale = self.teacher.schedule.scale(end) / (places[which + 1] - places[which])
        return (expand(scale, x) * (landed - walks.states[rows, which + 1])).square().flatten(1).mean(1)

    def state(self) -> dict[str, Tensor]:
        return {"grid": torch.tensor(self.grid), "chosen": torch.tensor(self.chosen)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.chosen = bool(state["chosen"])
        self.use(tuple(state["grid"].tolist()))

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Mean square off the ends of the teacher's walks from held-out noise: of the student, and by grid.

        `grid_error` is of the teacher in the student's steps, `even_error` of the teacher in as many even ones.
        """
        even = even_grid(self.config.walk_steps, self.config.num_steps)
        wanted = {
            "pair_distance": (self.student, self.grid, 1.0),
            "grid_error": (self.teacher, self.grid, self.config.guidance),
            "even_error": (self.teacher, even, self.config.guidance),
        }
        found: dict[str, list[Tensor]] = {}
        walks, first = self.walks(), len(self.pairs) - self.config.held_out
        for part in torch.arange(first, len(self.pairs)).split(config.batch_size):
            batch = walks.at(part).to(self.device)
            z = self.pairs.noise(part, tuple(batch.states.shape[2:])).to(self.device)
            for name, (model, grid, guidance) in wanted.items():
                levels = [self.levels[place] for place in grid]
                states, _ = recorded(model, z, batch.cond, levels, guidance)
                error = (states[-1] - batch.states[:, -1]).square().flatten(1).mean(1)
                found.setdefault(name, []).append(error)
        return {name: float(torch.cat(values).mean()) for name, values in found.items()}
