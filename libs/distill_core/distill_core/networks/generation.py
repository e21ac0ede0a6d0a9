"""Pictures from a denoiser: the same sampling functions and noise as the server uses."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.artifacts import CondSpec, SamplerSpec
from distill_core.data.source import Source
from distill_core.diffusion.levels import expand
from distill_core.diffusion.noise import unit_normals
from distill_core.diffusion.sampling import sample
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink
from distill_core.errors import DataError
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """(count,) class labels 0, 1, …, K-1, 0, 1 and so on."""
    return torch.arange(count) % num_classes


def default_cond(spec: CondSpec, count: int, denoiser: Denoiser, source: Source | None = None) -> Cond:
    """Conditions for `count` pictures when the caller has no wish: balanced classes, example prompts, or none.

    A model that enlarges is shown small pictures of `source`'s items.
    """
    if spec.factor is not None and source is not None:
        return small_pictures(spec.factor, source, range(count))
    if spec.kind == "class_label" and spec.num_classes:
        return {"class_label": balanced_labels(count, spec.num_classes)}
    if spec.examples:
        return denoiser.encode_prompts([spec.examples[i % len(spec.examples)] for i in range(count)])
    return denoiser.null_cond(count)


def small_pictures(factor: int, source: Source, indices: range, limit: int | None = None) -> Cond:
    """`low_resolution` (B, C, h, w) of the items of `source.picked(limit)` at `indices`, over and over."""
    return {LOW_RESOLUTION: shrink(true_pictures(source, indices, limit), factor)}


def true_pictures(source: Source, indices: range, limit: int | None = None) -> Tensor:
    """Pictures (B, C, H, W) of the items of `source.picked(limit)` at `indices`, over and over.

    Raises:
        DataError: data without pictures.
    """
    picked = source.picked(limit)
    x0 = source.items(picked[torch.tensor(list(indices)) % len(picked)]).x0
    if x0 is None:
        raise DataError("this data has no pictures to enlarge; choose data with pictures", field="data.name")
    return x0


def generate(
    denoiser: Denoiser,
    cond: Cond,
    count: int,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerSpec | None = None,
    batch_size: int = 128,
) -> Tensor:
    """`count` pictures (B, C, H, W) in [-1, 1] on the CPU; picture i depends on (seed, i, cond[i]) alone.

    A negative prompt is part of `cond`: see `steering.with_negative`.
    """
    pictures = []
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        part = {name: value[start : start + batch_size] for name, value in cond.items()}
        x0 = generate_x0(
            denoiser, part, indices, seed=seed, num_steps=num_steps, guidance=guidance, sampler=sampler
        )
        with torch.no_grad():
            pictures.append(denoiser.decode(x0).clamp(-1, 1).float().cpu())
    return torch.cat(pictures)


@torch.no_grad()
def generate_x0(
    denoiser: Denoiser,
    cond: Cond,
    indices: range,
    *,
    seed: int,
    num_steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerSpec | None = None,
) -> Tensor:
    """x0 (B, C, H, W) of the pictures `indices` in one batch, before decoding; on the denoiser's device."""
    spec = sampler or denoiser.sampler
    guidance = spec.guidance if guidance is None else guidance
    device = next(denoiser.parameters()).device
    shape = denoiser.image.channels, denoiser.image.height, denoiser.image.width
    cond = {name: value.to(device) for name, value in cond.items()}

    def draw(k: int) -> Tensor:
        return torch.from_numpy(unit_normals([(seed, i) for i in indices], k, shape)).to(device)

    x0: Tensor = sample(denoiser.bound(cond, guidance), spec, draw, num_steps or spec.num_steps)
    return x0


def preview(denoiser: Denoiser, seed: int, count: int = 40, *, source: Source | None = None) -> Tensor:
    """A sheet of samples, classes in turn, or what a model that enlarges makes of `source`'s pictures."""
    return generate(denoiser, default_cond(denoiser.cond, count, denoiser, source), count, seed=seed)


def drop_condition(cond: Cond, denoiser: Denoiser, share: float) -> Cond:
    """The condition with a random `share` of the items, their class or prompt, replaced by none, for guidance."""
    spec = denoiser.cond
    if (
        not cond
        or spec.kind in ("none", "low_resolution")
        or (spec.kind == "class_label" and spec.null_label is None)
    ):
        return cond
    batch = len(next(iter(cond.values())))
    null, device = denoiser.null_cond(batch), next(iter(cond.values())).device
    dropped = torch.rand(batch, device=device) < share
    return {
        name: torch.where(expand(dropped, value), null[name].to(value), value) if name in null else value
        for name, value in cond.items()
    }
