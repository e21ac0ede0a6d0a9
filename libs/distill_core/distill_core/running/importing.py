"""Import of models of other programs: recognised, checked, and published whole or not at all.

A source is the folder of a pipeline (or of another model that is read here), a single-file checkpoint, a LoRA file, or
a LoRA in peft's format. Only safetensors are opened, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distill_core.artifacts import Manifest
from distill_core.artifacts.files import entry_of
from distill_core.config import check_name
from distill_core.context import Context
from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.files.paths import files_below, there
from distill_core.kinds.base import image_probe_of
from distill_core.kinds.cards import described
from distill_core.kinds.loading import kind_of, load_model
from distill_core.networks.adapters import LoraDenoiser, plain
from distill_core.networks.denoiser import Denoiser
from distill_core.recipe.tables import ModelSource

Tell = Callable[[str], None]  # is told what begins, in a few words
LONGEST = 1000  # steps that a sampler may be asked for
READ = (".safetensors", ".json", ".txt", ".model")  # files of a source that decide what it is


@dataclass(frozen=True)
class Wish:
    """What a person says of an import."""

    name: str  # to publish it under
    base: str | None = None  # name@version: what a LoRA adapts, or what completes a single file
    config: Path | None = None  # folder of a pipeline that completes a single file
    steps: int | None = None  # of the sampler; unset: those of the base, or 30
    licence: str = ""  # unset: that of the base
    form: Literal["merged", "adapter"] = "adapter"  # of a LoRA
    dry_run: bool = False  # recognise and check, and publish nothing


@dataclass(frozen=True)
class Imported:
    """What a source was taken for, and what became of it."""

    recognised: str
    assumed: tuple[str, ...]  # what the source does not say
    manifest: Manifest  # as it was published; of a dry run, as it would be, with version 0


@dataclass
class _Found:
    """A source that was recognised, with how its model is made."""

    words: str
    make: Callable[[Path], Any]  # in an empty folder
    assumed: list[str] = field(default_factory=list)
    parents: tuple[str, ...] = ()
    licence: str = ""


def import_model(source: Path, wish: Wish, context: Context, tell: Tell = lambda text: None) -> Imported:
    """Publish the model in `source` as `wish` says.

    Raises:
        NotFound: no such source or base. ArtifactError: not recognised, damaged, not finite, or it does not fit.
        ConfigError: a wish that the source cannot meet.
    """
    check_name(wish.name, what="model", field="name")
    if wish.steps is not None and not 1 <= wish.steps <= LONGEST:
        raise ConfigError(f"{wish.steps} steps are not allowed; give 1 to {LONGEST}", field="steps")
    if not there(source):
        raise NotFound(f"{source} does not exist; give a folder or a .safetensors file", field="source")
    tell("recognising the source")
    found = _recognised(source, wish, context)
    context.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="import-", dir=context.cache) as scratch:
        tell(f"loading {found.words}")
        (Path(scratch) / "unpacked").mkdir()
        model = found.make(Path(scratch) / "unpacked")
        _adjust(model, wish, found)
        tell("checking the weights")
        check_finite(model)
        tell("drawing a probe picture")
        probe = image_probe_of(model)
        if probe is not None and not np.isfinite(probe.means).all():
            raise ArtifactError(f"{source} is damaged: its probe picture has values that are not finite")
        tell("hashing the source")
        draft = Manifest(
            name=wish.name,
            title=f"{source.name}: {found.words}",
            licence=wish.licence or found.licence,
            parents=found.parents,
            imported=hashes(source),
            parity=probe,
            **described(model),
        )
        if wish.dry_run:
            return Imported(found.words, tuple(found.assumed), draft)
        folder = Path(scratch) / "model"
        tell("writing the model")
        model.save(folder)
        tell("publishing")
        return Imported(found.words, tuple(found.assumed), _published(folder, draft, context))


def _published(folder: Path, draft: Manifest, context: Context) -> Manifest:
    """The version: the same source under the same wishes is published once; of a failure nothing is left."""
    said = draft.model_dump(mode="json", exclude={"parity"})
    key = f"import-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]}"
    try:
        return context.store.publish(folder, draft, key=key)
    except BaseException:
        context.store.withdraw(draft.name, key)
        raise


def hashes(source: Path) -> dict[str, str]:
    """SHA-256 of each file of a source that decides what it is, by its name in there."""
    return {name: entry_of(file).sha256 for name, file in files_below(source) if file.suffix in READ}


def check_finite(model: Any) -> None:
    """Refuse weights with values that are not finite, also those of decoder and text encoders.

    Raises:
        ArtifactError: the first of them by name.
    """
    text = getattr(model, "text", None)
    modules = {"": getattr(model, "adapted", model), "vae": getattr(model, "codec", None)}
    modules |= {} if text is None else text.parts
    for part, module in modules.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ArtifactError(
                    f"the weights are damaged: {part}{'.' if part else ''}{name} has values that are not finite"
                )


def _adjust(model: Any, wish: Wish, found: _Found) -> None:
    sampler = getattr(model, "sampler", None)
    if wish.steps is None:
        if sampler is not None and not found.parents:
            found.assumed.append(f"it is sampled in {sampler.num_steps} steps, as --steps can change")
        return
    if sampler is None:
        raise ConfigError("this model takes no steps; leave --steps out", field="steps")
    if sampler.step_counts and wish.steps not in sampler.step_counts:
        counts = ", ".join(map(str, sampler.step_counts))
        raise ConfigError(f"it was trained for {counts} steps; --steps must be one of them", field="steps")
    values = {
        **sampler.model_dump(),
        "num_steps": wish.steps,
        "max_steps": max(wish.steps, sampler.max_steps),
    }
    model.sampler = type(sampler).parse(values)


# -- sources ------------------------------------------------------------------------------------------------


def _recognised(source: Path, wish: Wish, context: Context) -> _Found:
    if source.is_file():
        return _file(source, wish, context)
    if (source / "adapter_config.json").is_file():
        return _peft(source, wish, context)
    files = sorted(source.glob("*.safetensors"))
    if (
        len(files) == 1
        and not (source / "config.json").is_file()
        and not (source / "model_index.json").is_file()
    ):
        return _file(files[0], wish, context)
    return _folder(source, wish, context)


def _folder(source: Path, wish: Wish, context: Context) -> _Found:
    if wish.base or wish.config:
        raise ConfigError(f"{source} is whole; leave --base and --config out", field="base")
    kind = kind_of(source)

    def make(_: Path) -> Any:
        return load_model(source, models=context)

    found = _Found(_pipeline_words(source) or f"a folder with a {kind.name}", make)
    if kind.name == "denoiser" and not (source / "distillery.json").is_file():
        found.assumed.append(f"it predicts {_prediction(source)}, as its scheduler says")
    return found


def _file(source: Path, wish: Wish, context: Context) -> _Found:
    from distill_core.networks.diffusers_single_file import recognised
    from distill_core.networks.foreign.weights import opened_safetensors
    from distill_core.networks.lora_formats.keys import is_lora

    with opened_safetensors(source) as opened:
        lora = is_lora(opened.keys())
    if lora:
        return _lora(source, wish, context)
    checkpoint = recognised(source)
    if checkpoint is None:
        raise ArtifactError(
            f"{source} is neither a LoRA nor a checkpoint of Stable Diffusion 1.x, 2.x or XL; import the folder of a "
            "pipeline"
        )
    return _single_file(checkpoint, wish, context)


def _single_file(checkpoint: Any, wish: Wish, context: Context) -> _Found:
    from distill_core.networks.diffusers_io import load_denoiser
    from distill_core.networks.diffusers_single_file import unpack

    if (wish.base is None) == (wish.config is None):
        raise ConfigError(
            f"{checkpoint.file} is a {checkpoint.family} checkpoint, which has no settings and no tokenizer; give one "
            "of --config FOLDER, a pipeline of that kind, and --base NAME@VERSION, such a model in the store",
            field="config",
        )
    parents: tuple[str, ...] = ()
    config, licence = Path(str(wish.config)), ""
    if wish.base is not None:
        parent = context.store.manifest(wish.base)
        config, licence = context.folder(ModelSource(artifact=parent.ref)), parent.licence
        parents = (parent.ref,)
    if not (config / "unet" / "config.json").is_file():
        raise ConfigError(
            f"{config} is no pipeline's folder with a UNet; it has no unet/config.json", field="config"
        )

    def make(folder: Path) -> Any:
        unpack(checkpoint, config, folder)
        return load_denoiser(folder)

    kinds = ", ".join(checkpoint.parts)
    found = _Found(f"a single-file checkpoint of {checkpoint.family} ({kinds})", make, [], parents, licence)
    if checkpoint.marks:
        found.assumed.append(
            f"the network predicts v, as the file's {', '.join(sorted(checkpoint.marks))} says"
        )
    else:
        found.assumed.append(
            f"it predicts {_prediction(config)}, as {wish.base or config} says: no file tells"
        )
    if checkpoint.extra:
        found.assumed.append(f"{checkpoint.extra} weights of an average (model_ema) are left out")
    return found


def _lora(source: Path, wish: Wish, context: Context) -> _Found:
    from distill_core.networks.lora_formats.reading import parts_of, read_lora

    base = _base(source, wish, context)
    lora = read_lora(source, parts_of(base), base=base.ref)
    counts = ", ".join(f"{len(factors)} of {part}" for part, factors in lora.parts.items())

    def make(_: Path) -> Any:
        if lora.text:
            return _with_text(base, lora)
        return _formed(LoraDenoiser.of_factors(base, lora.network), wish)

    found = _of_base(f"a LoRA in {lora.style} keys (layers: {counts})", make, base, context)
    found.assumed += lora.assumed
    if lora.text:
        found.assumed.append("it adapts text encoders too, so it is published merged, with all weights")
    return found


def _peft(source: Path, wish: Wish, context: Context) -> _Found:
    base = _base(source, wish, context)
    return _of_base(
        "a LoRA in peft's format", lambda _: _formed(LoraDenoiser.load(base, source), wish), base, context
    )


def _of_base(words: str, make: Callable[[Path], Any], base: Denoiser, context: Context) -> _Found:
    return _Found(words, make, [], (base.ref,), context.store.manifest(base.ref).licence)


def _base(source: Path, wish: Wish, context: Context) -> Denoiser:
    if wish.config is not None:
        raise ConfigError(f"{source} is a LoRA, which needs no --config; leave it out", field="config")
    if wish.base is None:
        raise ConfigError(f"{source} is a LoRA; say what it adapts: --base NAME@VERSION", field="base")
    base = plain(context.artifact(wish.base))
    if not isinstance(base, Denoiser):
        raise ConfigError(f"{wish.base} is no denoiser; give the model that the LoRA adapts", field="base")
    return base


def _formed(lora: LoraDenoiser, wish: Wish) -> LoraDenoiser:
    lora.form = wish.form
    return lora


def _with_text(base: Any, lora: Any) -> Denoiser:
    """A plain denoiser with the factors of its network and its text encoders added in."""
    text = base.text.copied()
    for part, factors in lora.text.items():
        for name, (down, up) in factors.items():
            weight = text.parts[part].get_submodule(name).weight
            weight.data += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight)
    whole: Any = LoraDenoiser.of_factors(base, lora.network).merged() if lora.network else base
    merged: Denoiser = whole.with_text(text)
    merged.sampler = base.sampler
    return merged


def _pipeline_words(folder: Path) -> str:
    from distill_core.networks.foreign.index import read_index

    index = read_index(folder)
    return f"the folder of a {index.pipeline}" if index is not None else ""


def _prediction(folder: Path) -> str:
    from distill_core.files.json_tables import read_table

    try:
        table: Mapping[str, Any] = read_table(folder / "scheduler" / "scheduler_config.json")
    except (OSError, ValueError):  # said where the folder is read
        return "what it was trained for"
    if str(table.get("_class_name")).startswith("FlowMatch") or table.get("use_flow_sigmas"):
        return "the velocity of a flow"
    return str(table.get("prediction_type", "epsilon"))
