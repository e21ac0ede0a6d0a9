"""Denoisers: diffusers folders, adapters over a base, and models of several experts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.artifacts import MANIFEST
from distill_core.data import Source
from distill_core.data.classes import use_classes_of
from distill_core.data.posed import SceneSource
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, small_shape
from distill_core.errors import ArtifactError, ConfigError, DataError, NotFound
from distill_core.files.json_tables import read_table
from distill_core.kinds.base import Kind, Models
from distill_core.kinds.denoiser.card import Evaluate
from distill_core.kinds.denoiser.evaluation import Evaluator, load_evaluator
from distill_core.method import Cond
from distill_core.networks.adapters import ADAPTER, LoraDenoiser, has_adapter, plain, read_base
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import real_tensors
from distill_core.networks.generation import generate, preview
from distill_core.probe import SEED, ImageProbe, probe_picture
from distill_core.recipe.tables import EvaluateConfig

log = logging.getLogger(__name__)

EXAMPLES = 10  # prompts that a text-conditional model keeps for previews


class DenoiserKind(Kind):
    """Models read as `denoiser(x_sigma, sigma, cond) -> x0`."""

    name = "denoiser"

    def recognise(self, folder: Path) -> bool:
        whole = any((folder / slot / "config.json").is_file() for slot in ("unet", "transformer"))
        return whole or has_adapter(folder) or (folder / "experts").is_dir()

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> Denoiser:
        if any((folder / slot / "config.json").is_file() for slot in ("unet", "transformer")):
            from distill_core.networks.diffusers_io import load_denoiser

            return _named(load_denoiser(folder, device=device), folder)
        if has_adapter(folder):
            return _named(_load_adapter(folder, models, device), folder)
        from distill_core.networks.routed import StoredExperts

        return _named(StoredExperts(folder, device=device).all_loaded(), folder)

    def fit(self, model: Denoiser, source: Source) -> None:
        if isinstance(source, SceneSource):
            return  # of a scene's views no condition is told: a method that edits them says its own
        _check_shape(model, source)
        if model.cond.kind == "class_label":
            with real_tensors():  # labels are data, also in a plan
                use_classes_of(source, model.cond)
        if model.cond.kind == "prompt":
            _encode_prompts(model, source)
        if model.cond.factor is not None:
            source.shrink_by(model.cond.factor)

    def evaluator(
        self, model: Denoiser, source: Source, config: EvaluateConfig, models: Models
    ) -> Evaluator | None:
        assert isinstance(config, Evaluate)
        return load_evaluator(config, model, source, models)

    def preview(
        self, model: Denoiser, source: Source, seed: int, references: Mapping[str, Any]
    ) -> Tensor | None:
        return preview(model, seed, source=source)

    def image_probe(self, model: Denoiser) -> ImageProbe | None:
        device = next(model.parameters()).device
        num_steps = model.sampler.fewest_steps
        label = prompt = None
        cond: Cond = {}
        if model.cond.kind == "class_label":
            label = 0
            cond = {"class_label": torch.zeros(1, dtype=torch.long, device=device)}
        if model.cond.kind == "prompt":
            prompt = next(iter(model.cond.examples), "")
            try:
                cond = model.encode_prompts([prompt])
            except ConfigError:  # without a text encoder
                return None
        if model.cond.factor is not None:
            small = probe_picture(small_shape(model.image.picture, model.cond.factor))
            cond = {LOW_RESOLUTION: torch.from_numpy(small)[None].to(device)}
        (picture,) = generate(model, cond, 1, seed=SEED, num_steps=num_steps, guidance=1.0)
        return ImageProbe.of(
            picture.numpy(), seed=SEED, num_steps=num_steps, class_label=label, prompt=prompt
        )


def _check_shape(model: Denoiser, source: Source) -> None:
    if source.shape is not None and tuple(source.shape) != tuple(model.image.picture):
        raise DataError(
            f"the data's pictures have the shape {tuple(source.shape)}, the teacher makes {model.image.picture}; "
            "set data.size and data.channels, or use a teacher trained on such pictures",
            field="data",
        )


def _encode_prompts(model: Denoiser, source: Source) -> None:
    if source.prompts is None:
        raise ConfigError(
            "a text-to-image teacher needs prompts: set data.name = 'prompts', or choose pictures with captions",
            field="data.name",
        )
    if not source.encodes:
        _warn_of_cut_prompts(model, source.prompts)
    source.encode_with(model.encode_prompts)
    if not model.cond.examples:
        distinct = dict.fromkeys(source.prompts[:1000])
        model.cond = model.cond.model_copy(update={"examples": tuple(distinct)[:EXAMPLES]})


def _warn_of_cut_prompts(model: Denoiser, prompts: list[str]) -> None:
    text: Any = getattr(model, "text", None)
    cut = [] if text is None else [prompt for prompt in dict.fromkeys(prompts) if text.cuts(prompt)]
    if cut:
        log.warning(
            "%d prompts are longer than the %d tokens that the text encoder reads, and their ends are left out; "
            "the first begins with %r",
            len(cut),
            max(text.limits.values()),
            cut[0][:60],
        )


def _load_adapter(folder: Path, models: Models | None, device: str) -> LoraDenoiser:
    base = read_base(folder / ADAPTER)
    if base is None or not base.ref or models is None:
        which = f"over {base.ref}" if base and base.ref else "and does not say over which model"
        raise ArtifactError(
            f"{folder} holds only an adapter, {which}; load it from the store that has its base"
        )
    try:
        model: nn.Module = plain(models.artifact(base.ref, device=device))
    except NotFound as error:
        raise ArtifactError(f"{folder} is an adapter over {base.ref}, which is missing: {error}") from None
    if not isinstance(model, Denoiser):
        raise ArtifactError(
            f"{folder} is an adapter over {base.ref}, which is not a denoiser; publish it again"
        )
    return LoraDenoiser.load(model, folder)


def _named(model: Denoiser, folder: Path) -> Denoiser:
    """`model` with the name under which the store has it, if `folder` came from there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = read_table(folder / MANIFEST)
        model.ref = f"{manifest['name']}@{manifest['version']}"
    return model


KIND = DenoiserKind()
