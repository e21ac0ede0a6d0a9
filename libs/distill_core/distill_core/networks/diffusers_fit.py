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
from distill_core.networks.foreign.samplers import folder_sampler, scheduler_spec
from distill_core.networks.prompts import PromptEncoder


def check_fit(
    path: Path, network: Any, scheduler: Any, codec: Any, text: PromptEncoder | None, *, beside: int = 0
) -> None:
    """Refuse parts that do not fit, by the network's config at `path`; it is shown `beside` channels of a condition.

    Raises:
        ArtifactError: they do not; the sentence names the key.
    """
    config, family = network.config, family_of(network)
    taken, given = family.channels(config)
    taken -= beside
    halves = not beside and (learns_variance(scheduler) or family.variance_below)
    if given != taken and not (halves and given == 2 * taken):
        raise ArtifactError(
            f"{path} says in_channels = {taken + beside} and out_channels = {given}; a network that is shown more than "
            "the noised sample, or answers more than one prediction, is not supported (twice as many may come out "
            "where the scheduler's variance_type is learned or learned_range)"
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
    return Sidecar(
        image=ImageSpec(
            channels=channels,
            height=height,
            width=width,
            picture=(colours, height * factor, width * factor),
        ),
        cond=family.cond(config, text),
        sampler=_sampler(network, scheduler, index, text, (height, width)),
        parameterisation=parameterisation_of(scheduler),
    )


def _sampler(
    network: Any, scheduler: Any, index: Index | None, text: PromptEncoder | None, size: tuple[int, int]
) -> SamplerSpec:
    """The scheduler's own steps, as the folder's pipeline takes them."""
    config, family, schedule = network.config, family_of(network), schedule_of(scheduler)
    spec = scheduler_spec(scheduler, even_levels=family.even_levels, patch=family.patch(config))
    # Stable Diffusion's pipelines change a scheduler when they are made: no clamping, as latents are larger, and
    # timesteps from 1 on.
    alone = text is not None and text.pooled_dim is None and not family.pipeline
    changed = index.changes_scheduler if index is not None else alone
    if spec is not None:
        spec = spec.model_copy(update={"mu": family.mu, **({"steps_offset": 1} if changed else {})})
    sampler = folder_sampler(
        scheduler,
        schedule,
        size=size,
        guidance=family.usual_guidance(config, text) if text is not None else 1.0,
        clip=None if changed else clip_of(scheduler),
        network=config,
        spec=spec,
    )
    noise = family.pipeline and schedule.kind == "flow"  # where these pipelines begin, and their students
    return sampler.model_copy(update={"sigma_max": INFINITE}) if noise else sampler
