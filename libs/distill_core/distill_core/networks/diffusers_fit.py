"""Checks that the parts of a foreign folder fit together, and facts that are derived from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.errors import ArtifactError
from distill_core.networks.diffusers_codec import latent_channels
from distill_core.networks.diffusers_denoiser import Sidecar
from distill_core.networks.diffusers_schedule import (
    clip_of,
    learns_variance,
    parameterisation_of,
    schedule_of,
)
from distill_core.networks.foreign.index import Index
from distill_core.networks.foreign.keys import shown
from distill_core.networks.foreign.samplers import folder_sampler, scheduler_spec
from distill_core.networks.text import TextEncoder, check_text


def check_fit(path: Path, network: Any, scheduler: Any, codec: Any, text: TextEncoder | None) -> None:
    """Refuse parts that do not fit, by the network's config at `path`.

    Raises:
        ArtifactError: they do not; the sentence names the key.
    """
    config = network.config
    taken, given = config.in_channels, config.get("out_channels") or config.in_channels
    halves = (
        learns_variance(scheduler) or "Transformer" in type(network).__name__
    )  # a DiT's need no word for it
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
        _check_prompted(path, network, text)


def _check_prompted(path: Path, network: Any, text: TextEncoder) -> None:
    config: Any = network.config
    if not isinstance(network, diffusers.UNet2DConditionModel):
        raise ArtifactError(
            f"{path} is of a {type(network).__name__}, which takes no text; its folder has text_encoder/"
        )
    check_text(config, text)
    widths = config.cross_attention_dim
    for width in widths if isinstance(widths, list | tuple) else [widths]:
        if width != text.embed_dim:
            raise ArtifactError(
                f"{path} says cross_attention_dim = {shown(widths)}, and prompts are encoded {text.embed_dim} wide"
            )


def derived_sidecar(
    path: Path, network: Any, scheduler: Any, index: Index | None, codec: Any, text: TextEncoder | None
) -> Sidecar:
    """Picture shape, conditions and sampling as a foreign folder's parts state them.

    Raises:
        ArtifactError: they do not say it, or something that is not understood.
    """
    config, schedule = network.config, schedule_of(scheduler)
    height, width = _size(path, config.sample_size)
    factor = 2 ** (len(codec.config.block_out_channels) - 1) if codec is not None else 1
    colours = codec.config.out_channels if codec is not None else config.in_channels
    # Stable Diffusion's pipelines change a scheduler when they are made: no clamping, as latents are larger, and
    # timesteps from 1 on.
    changed = index.changes_scheduler if index is not None else text is not None and text.pooled_dim is None
    spec = scheduler_spec(scheduler)
    if changed and spec is not None:
        spec = spec.model_copy(update={"steps_offset": 1})
    return Sidecar(
        image=ImageSpec(
            channels=config.in_channels,
            height=height,
            width=width,
            picture=(colours, height * factor, width * factor),
        ),
        cond=_derived_cond(network, text),
        sampler=folder_sampler(
            scheduler,
            schedule,
            size=(height, width),
            guidance=7.5 if text is not None else 1.0,
            clip=None if changed else clip_of(scheduler),
            network=config,
            spec=spec,
        ),
        parameterisation=parameterisation_of(scheduler),
    )


def _size(path: Path, sample_size: Any) -> tuple[int, int]:
    """(height, width) of what the network draws."""
    sides = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size, sample_size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ArtifactError(
            f"{path} says sample_size = {shown(sample_size)}; give the side of what the network draws, or "
            "[height, width]: pixels, or latents where there is a codec"
        )
    return sides[0], sides[1]


def _derived_cond(network: Any, text: TextEncoder | None) -> CondSpec:
    config = network.config
    if text is not None:
        return CondSpec(
            kind="prompt", max_tokens=text.max_tokens, embed_dim=text.embed_dim, pooled_dim=text.pooled_dim
        )
    if isinstance(network, diffusers.UNet2DConditionModel):
        raise ArtifactError("this network is conditioned on text, and its folder has no text_encoder/")
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if not classes:
        return CondSpec(kind="none")
    null = classes if config.get("num_embeds_ada_norm") else None
    return CondSpec(kind="class_label", num_classes=classes, null_label=null)
