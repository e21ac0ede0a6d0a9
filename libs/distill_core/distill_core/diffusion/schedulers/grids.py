"""Noise levels by training timestep, and the timesteps and levels that some steps visit, after diffusers' rules.

Tables are float32 where diffusers' are: its levels are met to the last digit that counts.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from distill_core.diffusion.schedulers.spec import SchedulerSpec
from distill_core.diffusion.steps import INFINITE
from distill_core.errors import ConfigError

RHO = 7.0  # Karras et al. 2022, Eq. 5
MOST_BETA = 0.999
NO_SIGNAL = 2.0**-24  # cumulative alpha that samplers in levels take in the place of 0


@functools.lru_cache(maxsize=16)
def alphas_cumprod(spec: SchedulerSpec) -> np.ndarray:
    """Cumulative product of 1 - beta, float32 (T,); it ends at 0 where betas leave no signal."""
    alphas = np.cumprod(np.float32(1) - _betas(spec), dtype=np.float64)
    if spec.rescale_betas_zero_snr:
        roots = np.sqrt(alphas)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = roots**2
    return np.asarray(alphas, np.float32)


def _betas(spec: SchedulerSpec) -> np.ndarray:
    if spec.trained_betas:
        return np.asarray(spec.trained_betas, np.float32)
    if spec.beta_schedule == "linear":
        return np.linspace(spec.beta_start, spec.beta_end, spec.num_train_timesteps, dtype=np.float32)
    if spec.beta_schedule == "scaled_linear":
        ends = spec.beta_start**0.5, spec.beta_end**0.5
        return np.linspace(*ends, spec.num_train_timesteps, dtype=np.float32) ** 2
    shares = np.arange(spec.num_train_timesteps + 1) / spec.num_train_timesteps
    bars = np.cos((shares + 0.008) / 1.008 * math.pi / 2) ** 2  # Nichol & Dhariwal 2021, Eq. 17
    betas: np.ndarray = np.minimum(1 - bars[1:] / bars[:-1], MOST_BETA).astype(np.float32)
    return betas


@functools.lru_cache(maxsize=16)
def sigmas_of(spec: SchedulerSpec) -> np.ndarray:
    """Level of each training timestep, float32 (T,), as samplers in levels have them: all are finite."""
    alphas = alphas_cumprod(spec).copy()
    if spec.rescale_betas_zero_snr:
        alphas[-1] = NO_SIGNAL
    sigmas: np.ndarray = np.sqrt((1 - alphas) / alphas)
    return sigmas


def sigma_of(alpha: float) -> float:
    """Level of a cumulative alpha."""
    return INFINITE if alpha < INFINITE**-2 else math.sqrt((1 - alpha) / alpha)


def time_of(spec: SchedulerSpec, sigmas: np.ndarray) -> np.ndarray:
    """The timestep, interpolated in ln sigma, of each level."""
    logs = np.log(
        sigmas_of(spec)
    )  # float32: where whole numbers are cut off what remains of 999, its digits decide
    found: np.ndarray = np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(len(logs)))
    return found


def visited(spec: SchedulerSpec, num_steps: int) -> np.ndarray:
    """The timesteps of `num_steps` steps, descending; fractions where the sampler takes such.

    Raises:
        ConfigError: a number of steps for which diffusers' rule gives another number of timesteps, or one outside.
    """
    total = spec.num_train_timesteps
    if spec.timestep_spacing == "trailing":
        times = np.arange(total, 0, -total / num_steps).round() - 1
    elif spec.timestep_spacing == "leading":
        count = num_steps + 1 if spec.name in ("dpmpp_2m", "unipc") else num_steps
        times = np.arange(count)[::-1][:num_steps] * (total // count) + spec.steps_offset
    elif spec.name in ("dpmpp_2m", "unipc"):
        times = np.linspace(0, total - 1, num_steps + 1).round()[::-1][:-1]
    else:
        times = np.linspace(0, total - 1, num_steps)[::-1]
        times = times.round() if spec.name == "ddim" else times.astype(np.float32)
    if len(times) != num_steps or times[0] >= total or times[-1] < 0:
        raise ConfigError(
            f"num_steps = {num_steps} is not allowed for this model: its timestep_spacing = "
            f"{spec.timestep_spacing} finds no {num_steps} timesteps; give one more or less",
            field="num_steps",
        )
    return np.asarray(times, np.float64)


def chosen(spec: SchedulerSpec, num_steps: int) -> np.ndarray:
    """lcm, tcd: timesteps at even distances of the grid of `original_inference_steps`, or those that are named.

    Raises:
        ConfigError: more steps than that.
    """
    grid = np.asarray(spec.timesteps[::-1], np.int64)
    if not spec.timesteps:
        stride = spec.num_train_timesteps // spec.original_inference_steps
        grid = np.arange(1, spec.original_inference_steps + 1) * stride - 1
    if num_steps > len(grid):
        raise ConfigError(
            f"num_steps = {num_steps} is not allowed for this model: 1 to {len(grid)}", field="num_steps"
        )
    indices = np.floor(np.linspace(0, len(grid), num_steps, endpoint=False)).astype(np.int64)
    return grid[::-1][indices]


def spread(spec: SchedulerSpec, high: float, low: float, num_steps: int) -> np.ndarray:
    """Levels from `high` to `low`, or from the spec's own ends, as `spec.spread` says."""
    high, low = spec.sigma_max or high, spec.sigma_min or low
    if spec.spread == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), num_steps))
    top, bottom = high ** (1 / RHO), low ** (1 / RHO)
    levels: np.ndarray = (top + np.linspace(0, 1, num_steps) * (bottom - top)) ** RHO
    return levels
