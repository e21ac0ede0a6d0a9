"""Calibration trajectories: a model's own sampling, as serving feeds its graphs, to calibrate and compare them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from distill_core.diffusion.guidance import Rule, guide_by
from distill_core.diffusion.noise import unit_normals
from distill_core.diffusion.sampling import SamplerSpec, sample

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]
COUNT = 16  # pictures of a trajectory
STEPS = (
    8  # of a trajectory at most, where the model takes any number: its levels are spread over the same range
)


@dataclass(frozen=True, eq=False)
class CalibrationTrajectory:
    """Trajectory from noise to x0 by the sampler's steps, with the inputs of a denoiser's graph on the way."""

    sampler: SamplerSpec
    shape: tuple[int, int, int]  # (C, H, W) of x0
    cond: Callable[[int], Arrays]  # condition inputs of the graph for a number of pictures; {} without
    null: Callable[[int], Arrays]  # those that guidance leads away from; only called where it is on
    rule: Rule = "linear"  # of guidance

    @property
    def steps(self) -> int:
        """The sampler's own number of steps, `STEPS` where that is more and not the model's own."""
        own = self.sampler.num_steps
        return own if self.few else min(own, STEPS)

    @property
    def few(self) -> bool:
        """Whether the numbers of steps are the model's own."""
        return self.sampler.kind == "few_step" or bool(self.sampler.step_counts)

    @property
    def fewest_steps(self) -> int:
        """The smallest number of steps that gives pictures: 1 for students that may take it."""
        if not self.few:
            return self.steps
        return min(self.sampler.step_counts, default=1)

    def x0(self, run: Run, *, seed: int, indices: range, num_steps: int) -> np.ndarray:
        """x0 (B, C, H, W) of the pictures `indices` of a request with `seed`; `run` evaluates the graph."""
        last = indices.stop  # picture i has condition i, whatever else is asked for
        cond = {name: value[indices.start :] for name, value in self.cond(last).items()}
        guided = bool(cond) and self.sampler.guidance != 1
        null = {name: value[indices.start :] for name, value in self.null(last).items()} if guided else {}

        names = ("time",) if self.sampler.timed else ()

        def denoise(x: np.ndarray, sigma: float, *time: float) -> np.ndarray:
            levels = np.full(len(x), sigma, np.float32)
            told = {name: np.full(len(x), value, np.float32) for name, value in zip(names, time)}
            feed = {
                "x_sigma": np.asarray(x, np.float32),
                "sigma": levels,
                **cond,
                **told,
            }  # as the graph has them
            if not guided:
                return run(feed)
            both, scale = (run(feed), run({**feed, **null})), np.float32(self.sampler.guidance)
            x0: np.ndarray = guide_by(self.rule, *both, scale, feed["x_sigma"], np.float32(sigma))
            return x0

        def draw(step: int) -> np.ndarray:
            return unit_normals([(seed, index) for index in indices], step, self.shape)

        return np.asarray(sample(denoise, self.sampler, draw, num_steps), np.float32)

    def recorded(self, run: Run, seed: int) -> tuple[list[Arrays], np.ndarray]:
        """Every evaluation's inputs on one trajectory of `COUNT` pictures, and the x0 at its end."""
        feeds: list[Arrays] = []

        def record(feed: Arrays) -> np.ndarray:
            feeds.append(feed)
            return run(feed)

        x0 = self.x0(record, seed=seed, indices=range(COUNT), num_steps=self.steps)
        return feeds, x0
