"""The levels that samplers visit which step from level to level, with the time that the network is told at each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_core.diffusion.schedulers.grids import alphas_cumprod, sigmas_of, spread, time_of, visited
from distill_core.diffusion.schedulers.spec import SchedulerSpec
from distill_core.diffusion.steps import INFINITE
from distill_core.errors import ConfigError

Size = tuple[int, int]  # (height, width) of x
SCM_FIRST, SCM_SECOND = 1.57080, 1.3  # angles of SANA-Sprint's two steps (Chen et al. 2025, Section 3)
LEAST = 1e-6  # unipc: its flow begins so much below 1


@dataclass(frozen=True)
class Levels:
    """Levels and times, descending; the first x is `start` times unit noise, and `end` times the last one is x0."""

    visited: list[tuple[float, float]]
    start: float
    last: float = 0.0  # level at which the last step ends
    end: float = 1.0

    @classmethod
    def of(
        cls, sigmas: np.ndarray, times: np.ndarray, start: float, last: float = 0.0, end: float = 1.0
    ) -> Levels:
        """The same from arrays."""
        return cls(list(zip(map(float, sigmas), map(float, times), strict=True)), start, last, end)


def levels_of(spec: SchedulerSpec, num_steps: int, size: Size) -> Levels:
    """The levels of `num_steps` steps for an x of `size`."""
    if spec.name == "scm":
        return _trigonometric(num_steps)
    if spec.name == "flow_euler":
        return _flow(_flow_times(spec, num_steps, size), spec)
    if spec.name in ("dpmpp_2m", "unipc"):
        return _integer_flow(spec, num_steps) if spec.use_flow_sigmas else _multistep(spec, num_steps)
    return _from_grid(spec, num_steps)


def _from_grid(spec: SchedulerSpec, num_steps: int) -> Levels:
    """Euler's and Heun's: levels interpolated between those of the timesteps."""
    table, times = sigmas_of(spec), visited(spec, num_steps)
    sigmas = np.interp(times, np.arange(len(table)), table)
    if spec.spread:
        sigmas = spread(spec, sigmas[0], sigmas[-1], num_steps)
        times = time_of(spec, sigmas)
    sigmas = sigmas.astype(np.float32)
    high = float(sigmas.max())
    start = math.sqrt(1 + high**2) if spec.timestep_spacing == "leading" else high
    return Levels.of(sigmas, times, start, last=_last(spec))


def _multistep(spec: SchedulerSpec, num_steps: int) -> Levels:
    """DPM-Solver's: whole timesteps; Karras' levels span all of the schedule, and their times are rounded."""
    table, times = sigmas_of(spec), visited(spec, num_steps)
    sigmas = np.interp(times, np.arange(len(table)), table)
    if spec.spread:
        sigmas = spread(spec, table[-1], table[0], num_steps)
        times = _whole(spec, time_of(spec, sigmas))
    sigmas = sigmas.astype(np.float32)
    last = _last(spec)
    return Levels.of(sigmas, times, _vp_start(sigmas[0]), last=last, end=1 / math.sqrt(1 + last**2))


def _whole(spec: SchedulerSpec, times: np.ndarray) -> np.ndarray:
    rounds = spec.spread == "karras" and (spec.beta_schedule != "squaredcos_cap_v2" or spec.name == "unipc")
    whole: np.ndarray = np.trunc(times.round() if rounds else times)
    return whole


def _last(spec: SchedulerSpec) -> float:
    if spec.final_sigmas_type == "zero":
        return 0.0
    alpha = float(alphas_cumprod(spec)[0])
    return math.sqrt((1 - alpha) / alpha)


def _vp_start(sigma: float) -> float:
    return math.sqrt(1 + float(sigma) ** 2)


def _shifted(times: np.ndarray, shift: float) -> np.ndarray:
    return shift * times / (1 + (shift - 1) * times)


def _flow_times(spec: SchedulerSpec, num_steps: int, size: Size) -> np.ndarray:
    """Times t of flow matching, descending. Without `even_levels` a fixed shift is in the ends too: it counts twice."""
    if spec.even_levels:
        times = np.linspace(1, 1 / num_steps, num_steps).astype(np.float32).astype(np.float64)
    else:
        ends = np.array([1.0, 1 / spec.num_train_timesteps])
        ends = ends if spec.use_dynamic_shifting else _shifted(ends, spec.shift)
        high, low = (float(end) for end in ends.astype(np.float32))
        times = np.linspace(high, low, num_steps)
    times = (
        _dynamic(spec, times, size, num_steps) if spec.use_dynamic_shifting else _shifted(times, spec.shift)
    )
    if spec.shift_terminal is not None:
        if num_steps == 1:
            raise ConfigError(
                "num_steps = 1 is not allowed for this model: its last level is fixed beside the first; give 2 or more",
                field="num_steps",
            )
        times = 1 - (1 - times) * (1 - spec.shift_terminal) / (1 - times[-1])
    return spread(spec, times[0], times[-1], num_steps) if spec.spread else times


def _dynamic(spec: SchedulerSpec, times: np.ndarray, size: Size, num_steps: int) -> np.ndarray:
    tokens = (size[0] // spec.patch) * (size[1] // spec.patch)
    slope = (spec.max_shift - spec.base_shift) / (spec.max_image_seq_len - spec.base_image_seq_len)
    mu = spec.base_shift + slope * (tokens - spec.base_image_seq_len)
    mu = _flux2_mu(tokens, num_steps) if spec.mu == "flux2" else mu
    weight = math.exp(mu) if spec.time_shift_type == "exponential" else mu
    shifted: np.ndarray = weight / (weight + (1 / times - 1))
    return shifted


def _flux2_mu(tokens: int, num_steps: int) -> float:
    """On a line through two fits, for 10 and for 200 steps, each linear in the tokens; of many tokens the latter's."""
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (num_steps - 200) / 190 * (many - few)


def _flow(times: np.ndarray, spec: SchedulerSpec) -> Levels:
    times = times.astype(np.float32).astype(np.float64)
    sigmas = flow_sigmas(times)
    return Levels.of(sigmas, spec.num_train_timesteps * times, 1 + float(sigmas[0]))


def flow_sigmas(times: np.ndarray) -> np.ndarray:
    """Levels of times of flow matching; a large one stands for that of 1."""
    sigmas: np.ndarray = np.minimum(times / np.maximum(1 - times, 1 / (2 * INFINITE)), INFINITE)
    return sigmas


def _integer_flow(spec: SchedulerSpec, num_steps: int) -> Levels:
    """DPM-Solver's and UniPC's times of flow matching; the network is told whole numbers."""
    total = spec.num_train_timesteps
    falling = np.linspace(1, 1 / total, num_steps + 1)
    if spec.name == "unipc":
        times = _shifted(falling[:-1], spec.shift)
        times[0] -= LEAST if abs(times[0] - 1) < LEAST else 0
    else:
        times = _shifted(1 - falling, spec.shift)[::-1][:-1]
    sigmas = flow_sigmas(times.astype(np.float32).astype(np.float64))
    return Levels.of(sigmas, np.trunc(times * total), 1 + float(sigmas[0]))


def _trigonometric(num_steps: int) -> Levels:
    """SCM's angles as times of flow matching: t = sin / (sin + cos)."""
    angles = np.linspace(SCM_FIRST, 0, num_steps + 1)[:-1]
    if num_steps == 2:
        angles = np.array([SCM_FIRST, SCM_SECOND])
    times = np.minimum(np.sin(angles) / (np.sin(angles) + np.cos(angles)), 1.0)
    sigmas = flow_sigmas(times)
    return Levels.of(sigmas, 1000 * times, 1 + float(sigmas[0]))
