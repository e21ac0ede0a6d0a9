"""Steps between training timesteps, with a the cumulative alpha of one, a' of the next and e = (x - D) / sigma.

    DDIM   sqrt(a') D + sqrt(1 - a' - s^2) e + s z,   s^2 = eta^2 (1 - a')/(1 - a) (1 - a/a')
    LCM    f = c_out D + c_skip x,   then sqrt(a') f + sqrt(1 - a') z
    TCD    y at the timestep (1 - eta) t',   then sqrt(a'/a_y) y + sqrt(1 - a'/a_y) z

Song et al. 2021 (arXiv 2010.02502), Eq. 12; Luo et al. 2023 (2310.04378); Zheng et al. 2024 (2402.19159). These are
samples in the variance-preserving form; the table has them divided by sqrt(a').
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distill_core.diffusion.schedulers.grids import alphas_cumprod, chosen, sigma_of, visited
from distill_core.diffusion.schedulers.levels import Levels
from distill_core.diffusion.schedulers.spec import SchedulerSpec
from distill_core.diffusion.steps import Step

SIGMA_DATA = 0.5  # LCM's


def discrete_levels(spec: SchedulerSpec, num_steps: int) -> Levels:
    """The levels of the timesteps that are visited."""
    times = visited(spec, num_steps) if spec.name == "ddim" else chosen(spec, num_steps)
    alphas = alphas_cumprod(spec)
    sigmas = np.array([sigma_of(float(alphas[int(time)])) for time in times])
    return Levels.of(sigmas, times, math.sqrt(1 + sigmas[0] ** 2))


def ddim(spec: SchedulerSpec, levels: Sequence[tuple[float, float]], of: int) -> list[Step]:
    """DDIM with noise of `eta`; e is of the answer before it is clamped. Each step is T // `of` timesteps wide."""
    alphas, steps = alphas_cumprod(spec), []
    width = spec.num_train_timesteps // of
    for index, (sigma, time) in enumerate(levels):
        alpha, before = float(alphas[int(time)]), int(time) - width
        after = float(alphas[before]) if before >= 0 else _final(spec)
        made = spec.eta**2 * (1 - after) / (1 - alpha) * (1 - alpha / after)
        # The next step may begin at another timestep than this one ends at: the sample is taken for one of that.
        scale = 1.0 if index == len(levels) - 1 else math.sqrt(1 + levels[index + 1][0] ** 2)
        slope = scale * math.sqrt(max(1 - after - made, 0.0)) / sigma
        state = (slope, scale * math.sqrt(after), 0, 0)
        steps.append(Step(sigma, time, state, scale * math.sqrt(made), raw=-slope))
    return steps


def _final(spec: SchedulerSpec) -> float:
    return 1.0 if spec.set_alpha_to_one else float(alphas_cumprod(spec)[0])


def lcm(spec: SchedulerSpec, levels: Sequence[tuple[float, float]]) -> list[Step]:
    """Consistency sampling, with the boundary condition of the function that was trained."""
    steps = []
    for (sigma, time), noise in zip(levels, [*(one for one, _ in levels[1:]), 0.0]):
        scaled = time * spec.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
        steps.append(Step(sigma, time, (skip / math.sqrt(1 + sigma**2), out, 0, 0), noise))
    return steps


def tcd(spec: SchedulerSpec, levels: Sequence[tuple[float, float]]) -> list[Step]:
    """Trajectory consistency sampling; it ends at timestep 0, which is not without noise."""
    alphas, steps = alphas_cumprod(spec), []
    for index, (sigma, time) in enumerate(levels):
        final = index == len(levels) - 1
        after = 0 if final else int(levels[index + 1][1])
        short = int(np.floor(np.float32(1 - spec.eta) * np.float32(after)))
        down = sigma_of(float(alphas[short])) / sigma
        ratio = float(alphas[after] / alphas[short])
        noise = math.sqrt(max(1 - ratio, 0.0)) * math.sqrt(1 + sigma_of(float(alphas[after])) ** 2)
        scale = math.sqrt(float(alphas[0])) if final else 1.0
        renoises = spec.eta > 0 and not final
        steps.append(Step(sigma, time, (scale * down, scale * (1 - down), 0, 0), noise if renoises else 0.0))
    return steps
