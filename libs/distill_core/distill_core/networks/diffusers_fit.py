"""Checks that the parts of a foreign folder fit together, and facts that are derived from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_core.artifacts import ImageSpec, SamplerSpec
from distill_core.diffusion.steps import INFINITE
from distill_core.errors import ArtifactError
from distill_core.networks.diffusers_codec import colours_of, factor_of, latent_channels
from distill_core.networks.diffusers_denoiser import Sidecar
from distill_core.networks.diffusers_schedule import (
    clip_of,
    learns_variance,
    parameterisation_of,
    schedule_of,
)
from distill_core.networks.families import family_of
from distill_core.networks.foreign.index import Index
from distill_core.networks.foreign.samplers import scheduler_spec
from distill_core.networks.prompts import PromptEncoder


def check_fit(path: Path, network: Any, scheduler: Any, codec: Any, text: PromptEncoder | None) -> None:
    """Refuse parts that do not fit, by the network's config at `path`.

    Raises:
        ArtifactError: they do not; the sentence names the key.
    """
    config, family = network.config, family_of(network)
    taken, given = family.channels(config)
    halves = learns_variance(scheduler) or family.variance_below
    if given != taken and not (halves and given == 2 * taken):
        raise ArtifactError(
            f"{path} says in_channels = {taken} and out_channels = {given}; a network that is shown more than the "
            "noised sample, or answers more than one prediction, is not supported (twice as many may come out where "
            "the scheduler's variance_type is learned or learned_range)"
        )
    if codec is not None and latent_channels(codec.config) != taken:
        raise ArtifactError(
            f"{path} says in_channels = {taken}, and the codec's latents have {latent_channels(codec.config)} channels"
        )
    if text is not None:
        family.check_text(path, config, text)


def derived_sidecar(
    path: Path, network: Any, scheduler: Any, index: Index | None, codec: Any, text: PromptEncoder | None
) -> Sidecar:
    """Picture shape, conditions and sampling as a foreign folder's parts state them.

    Raises:
        ArtifactError: they do not say it, or something that is not understood.
    """
    config, family = network.config, family_of(network)
    (channels, _), (height, width) = family.channels(config), family.size(path, config)
    factor = factor_of(codec.config) if codec is not None else 1
    colours = colours_of(codec.config) if codec is not None else channels
    # Stable Diffusion's pipelines switch a scheduler's clamping off when they are made: latents are larger.
    unclamped = index.unclamps if index is not None else text is not None and text.pooled_dim is None
    return Sidecar(
        image=ImageSpec(
            channels=channels,
            height=height,
            width=width,
            picture=(colours, height * factor, width * factor),
        ),
        cond=family.cond(config, text),
        sampler=_sampler(network, scheduler, text, None if unclamped else clip_of(scheduler)),
        parameterisation=parameterisation_of(scheduler),
    )


def _sampler(network: Any, scheduler: Any, text: PromptEncoder | None, clip: float | None) -> SamplerSpec:
    """The scheduler's own steps, where the family's one pipeline takes these and there is a sampler of them."""
    family, schedule, steps = family_of(network), schedule_of(scheduler), None
    if family.pipeline:
        patch = family.patch(network.config)
        steps = scheduler_spec(scheduler, even_levels=family.even_levels, patch=patch)
        steps = steps and steps.model_copy(update={"mu": family.mu})
    sigma_max = INFINITE if steps and schedule.kind == "flow" else min(schedule.sigma_max, 80.0)
    return SamplerSpec(
        kind="euler" if steps is None else "scheduler",
        scheduler=steps,
        sigma_min=max(schedule.sigma_min, 0.002),
        sigma_max=sigma_max,
        noise_scale=schedule.start_scale(sigma_max),
        num_steps=30,
        max_steps=1000,
        guidance=family.usual_guidance(network.config, text),
        clip=clip,
    )
