"""Figures of a generator by a judge: the same for every method, so that methods can be compared."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from distill_core.artifacts import SamplerSpec
from distill_core.config import EvaluateConfig
from distill_core.data import Source
from distill_core.metrics.judge import Judge
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import default_cond, generate


def generator_figures(
    denoiser: Denoiser,
    judge: Judge,
    source: Source,
    config: EvaluateConfig,
    *,
    sampler: SamplerSpec | None = None,
    num_steps: int | None = None,
) -> dict[str, float]:
    """Fréchet distance, coverage and accuracy of `num_samples` pictures, and milliseconds per picture.

    The features are the judge's, the real set is the source's, labels are balanced, noise is that of `config.seed`.
    """
    count = config.num_samples
    cond = default_cond(denoiser.cond, count, denoiser)
    began = time.perf_counter()
    pictures = generate(
        denoiser,
        cond,
        count,
        seed=config.seed,
        sampler=sampler,
        num_steps=num_steps,
        batch_size=config.batch_size,
    )
    elapsed = time.perf_counter() - began
    figures = judge.figures(pictures, _labels(cond), source.all(count))
    return {**figures, "ms_per_image": 1000 * elapsed / count}


def _labels(cond: Mapping[str, Tensor]) -> Tensor | None:
    return cond.get("class_label")


def one_step(denoiser: Denoiser, student: SamplerSpec) -> SamplerSpec:
    """The teacher used as if it were the one-step student: one evaluation at the student's first level."""
    return SamplerSpec(
        kind="few_step",
        sigmas=student.sigmas[:1] or (denoiser.sampler.sigma_max,),
        noise_scale=student.noise_scale,
        num_steps=1,
        max_steps=1,
    )
