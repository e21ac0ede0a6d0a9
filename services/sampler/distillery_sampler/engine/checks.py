"""Checks of what a request says to a model: every refusal is one sentence that names the field."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from distill_core.artifacts import CondSpec
from distill_core.errors import ConfigError
from distill_core.kinds.denoiser.card import Card
from distillery_sampler.engine.requests import (
    DecodedImage,
    Float,
    GenerateRequest,
    ImageItem,
    ImageKey,
    View,
)
from distillery_sampler.settings import SamplerSettings

MAX_SEED = 2**63
MAX_GUIDANCE = 100.0
MAX_LATENT = 100.0  # no unit normal is as large, and float32 overflows far above
NASA_SCALE = 0.2  # of students that were not trained for it, as for Stable Diffusion 2.1 (arXiv 2412.02687)
MAX_NASA_SCALE = 10.0


def image_items(request: GenerateRequest, card: Card, limits: SamplerSettings, ref: str) -> list[ImageItem]:
    """The images that a request asks of the model `ref`.

    Raises:
        ConfigError: conditions the model does not take, unequal lengths, too many images.
    """
    cond = card.cond or CondSpec(kind="none")
    count = _count(request, limits)
    _check_kind(request, cond, ref)
    _check_conditions(request, cond.num_classes or 0, limits, ref)
    _check_seeds(request)
    labels = request.class_labels or (None,) * count
    prompts = request.prompts or (None,) * count
    noises = [(seed, 0) for seed in request.seeds] or [(request.seed, index) for index in range(count)]
    items = [
        ImageItem(*noise, label, prompt) for noise, label, prompt in zip(noises, labels, prompts, strict=True)
    ]
    if request.latents is not None:
        _check_latents(request.latents, card, ref)
        items = [replace(item, draws={0: own}) for item, own in zip(items, request.latents, strict=True)]
    if request.low_resolution is not None:
        small = [DecodedImage(picture, None) for picture in request.low_resolution]
        items = [replace(item, init_image=picture) for item, picture in zip(items, small, strict=True)]
    if not request.negative_prompts and request.negative_scale is None:
        return items
    negatives = _negatives(request, cond, count, limits, ref)
    scale = _negative_scale(request, card, ref)
    return [replace(item, negative=text, negative_scale=scale) for item, text in zip(items, negatives)]


def _negatives(
    request: GenerateRequest, cond: CondSpec, count: int, limits: SamplerSettings, ref: str
) -> tuple[str, ...]:
    """A negative prompt for each image, "" for none."""
    negatives = request.negative_prompts
    if cond.kind != "prompt":
        raise ConfigError(f"{ref} takes no prompts, so it takes no negative ones", field="negative_prompts")
    if len(negatives) not in (1, count):
        raise ConfigError(
            f"the request says {len(negatives)} negative prompts for {count} images; give one, or one an image",
            field="negative_prompts",
        )
    for prompt in negatives:
        if len(prompt) > limits.max_prompt_chars:
            raise ConfigError(
                f"a negative prompt of {len(prompt)} characters is too long; allowed are "
                f"{limits.max_prompt_chars}",
                field="negative_prompts",
            )
    return negatives * count if len(negatives) == 1 else negatives


def _negative_scale(request: GenerateRequest, card: Card, ref: str) -> float:
    """The strength that cross-attention turns away with; 0 where guidance does it."""
    assert card.sampler is not None
    assert card.cond is not None
    if card.sampler.guidable:
        if request.negative_scale is not None:
            raise ConfigError(
                f"{ref} is guided, and guidance leads away from the negative prompt; leave "
                "negative_scale out and set guidance",
                field="negative_scale",
            )
        return 0.0
    usual = NASA_SCALE if card.cond.nasa_scale is None else card.cond.nasa_scale
    scale = usual if request.negative_scale is None else request.negative_scale
    if not 0 <= scale <= MAX_NASA_SCALE:
        raise ConfigError(
            f"negative_scale = {scale:g} is not allowed: give 0 to {MAX_NASA_SCALE:g}; the model's own is "
            f"{usual:g}",
            field="negative_scale",
        )
    return scale


def _count(request: GenerateRequest, limits: SamplerSettings) -> int:
    lengths = {
        "class_labels": len(request.class_labels),
        "prompts": len(request.prompts),
        "seeds": len(request.seeds),
        "latents": 0 if request.latents is None else len(request.latents),
        "low_resolution": 0 if request.low_resolution is None else len(request.low_resolution),
        "count": request.count,
    }
    counts = {name: number for name, number in lengths.items() if number}
    if request.count is not None and request.count < 1:
        raise ConfigError(f"count = {request.count} is not allowed; ask for at least 1 image", field="count")
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{number} for {name}" for name, number in counts.items())
        raise ConfigError(f"the request says {shown}; these must be equal", field=list(counts)[-1])
    count = next(iter(counts.values()), 1)
    if count > limits.max_images:
        raise ConfigError(
            f"{count} images in one request are too many; allowed are {limits.max_images}, send several",
            field=next(iter(counts)),
        )
    return count


def _check_kind(request: GenerateRequest, cond: CondSpec, ref: str) -> None:
    """Refuse a condition that the model does not take, and the lack of one that it needs."""
    takes = {"class_label": "class_labels", "prompt": "prompts", "low_resolution": "image"}.get(cond.kind)
    for field in ("class_labels", "prompts"):
        if field != takes and getattr(request, field):
            wants = f"give {takes}" if takes else "it takes no condition, give count"
            raise ConfigError(f"{ref} takes no {field}; {wants}", field=field)
    if request.low_resolution is not None and takes != "image":
        raise ConfigError(f"{ref} enlarges no pictures; leave low_resolution out", field="low_resolution")
    if takes and not getattr(request, takes) and request.low_resolution is None:
        what = {
            "class_labels": f"class labels from 0 to {(cond.num_classes or 0) - 1}, one an image",
            "prompts": "prompts, one an image",
            "image": f"a small picture, which it enlarges {cond.factor} times",
        }[takes]
        raise ConfigError(f"{takes} is empty: {ref} needs {what}", field=takes)


def _check_conditions(request: GenerateRequest, classes: int, limits: SamplerSettings, ref: str) -> None:
    for label in request.class_labels:
        if not 0 <= label < classes:
            raise ConfigError(
                f"class label {label} is not allowed: {ref} knows 0 to {classes - 1}",
                field="class_labels",
            )
    for prompt in request.prompts:
        if len(prompt) > limits.max_prompt_chars:
            raise ConfigError(
                f"a prompt of {len(prompt)} characters is too long; allowed are {limits.max_prompt_chars}",
                field="prompts",
            )


def _check_seeds(request: GenerateRequest) -> None:
    for field, values in (("seed", (request.seed,)), ("seeds", request.seeds)):
        for seed in values:
            if not 0 <= seed < MAX_SEED:
                raise ConfigError(f"seed {seed} is not allowed: give 0 to {MAX_SEED - 1}", field=field)


def _check_latents(latents: Float, card: Card, ref: str) -> None:
    """Refuse what is no noise of the model's own shape."""
    image = card.image
    assert image is not None, "a denoiser without image is not loaded"
    shape = (image.channels, image.height, image.width)
    if latents.shape[1:] != shape:
        raise ConfigError(
            f"latents of shape {list(latents.shape)} do not fit {ref}; give [B, "
            f"{', '.join(map(str, shape))}]",
            field="latents",
        )
    if not (np.abs(latents) <= MAX_LATENT).all():
        raise ConfigError(
            f"latents hold NaN, infinity or a value beyond {MAX_LATENT:g}; give noise of the unit normal, which "
            "the sampler scales itself",
            field="latents",
        )


def can_guide(card: Card) -> bool:
    """Whether a model takes another guidance than its own: it was not distilled at one, and has a null condition."""
    spec, cond = card.sampler, card.cond or CondSpec(kind="none")
    return bool(spec and spec.guidable) and (cond.kind == "prompt" or cond.null_label is not None)


def image_key(request: GenerateRequest, card: Card) -> ImageKey:
    """Steps and guidance of a request, the model's own where it says nothing.

    Raises:
        ConfigError: a number of steps or a guidance that the model cannot honour.
    """
    spec = card.sampler
    assert spec is not None, "a denoiser without sampler is not loaded"
    num_steps = spec.num_steps if request.num_steps is None else request.num_steps
    spec.check_steps(num_steps)
    if request.guidance is not None:
        if not math.isfinite(request.guidance) or abs(request.guidance) > MAX_GUIDANCE:
            raise ConfigError(
                f"guidance = {request.guidance:g} is not allowed: give -{MAX_GUIDANCE:g} to {MAX_GUIDANCE:g}",
                field="guidance",
            )
        spec.check_guidance(request.guidance)
    guidance = spec.guidance if request.guidance is None else request.guidance
    negative = any(request.negative_prompts)
    if not spec.guidable:
        told = guidance if spec.guidance_range is not None else 1.0  # else it is in the weights already
        return ImageKey(num_steps, told, negative="attention" if negative else "")
    if guidance != 1 and not can_guide(card):
        if request.guidance is not None:
            raise ConfigError(
                "guidance needs a null condition, and this model has none; use 1", field="guidance"
            )
        guidance = 1.0
    if negative and guidance == 1:
        raise ConfigError(
            "guidance = 1 is off, and it is guidance that leads away from negative prompts; give more, e.g. 5",
            field="guidance",
        )
    return ImageKey(num_steps, guidance, negative="guidance" if negative else "")


def check_reply(images: int, bytes_each: int, limits: SamplerSettings, *, field: str, stream: str) -> None:
    """Refuse a reply that would not fit into one message."""
    if images * bytes_each > limits.max_reply_bytes:
        raise ConfigError(
            f"the reply would be {images * bytes_each / 2**20:.0f} MiB, and one message holds "
            f"{limits.max_reply_bytes / 2**20:.0f} MiB; use {stream}, or ask for less",
            field=field,
        )


def check_view(view: View, limits: SamplerSettings) -> None:
    """Refuse a view that is too large or cannot be a camera."""
    for field, side in (("width", view.width), ("height", view.height)):
        if not 1 <= side <= limits.max_side:
            raise ConfigError(
                f"{field} = {side} is not allowed: give 1 to {limits.max_side} pixels", field=field
            )
    if view.width * view.height > limits.max_pixels:
        raise ConfigError(
            f"a view of {view.width} x {view.height} is too large; allowed are {limits.max_pixels} pixels",
            field="width",
        )
    if view.fov_degrees is not None and not 0 < view.fov_degrees < 180:
        raise ConfigError(
            f"fov_degrees = {view.fov_degrees:g} is not allowed: give an angle between 0 and 180",
            field="fov_degrees",
        )
    if view.background is not None and not all(0 <= value <= 1 for value in view.background):
        raise ConfigError(
            f"background {view.background} is not allowed: give 3 numbers in [0, 1]", field="background"
        )
    if (view.intrinsics is not None or view.distortion) and view.pose is None:
        raise ConfigError(
            "intrinsics and a lens go with a pose; an orbit takes fov_degrees", field="intrinsics"
        )
