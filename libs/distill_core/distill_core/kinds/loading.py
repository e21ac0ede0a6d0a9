"""Loading of whatever a model folder holds, by the kind that recognises it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.kinds import find_kind, kind_names
from distill_core.kinds.base import Kind, Models
from distill_core.recipe.tables import AdapterTerm, ModelSource

Load = Callable[[str], Any]  # the model of a store reference


class StoreModels:
    """Models of one store, for kinds that rest on others: the bases of adapters."""

    def __init__(self, store: ArtifactStore, cache: Path) -> None:
        self.store, self.cache = store, cache

    def folder(self, source: ModelSource) -> Path:
        """The folder of a version, fetched and verified."""
        assert source.artifact is not None
        return self.store.fetch(source.artifact, self.cache)

    def artifact(self, ref: str, *, device: str = "cpu") -> Any:
        """The model of a store reference."""
        return load_model(self.store.fetch(ref, self.cache), device=device, models=self)


def kind_of(folder: Path) -> Kind:
    """The kind of the model in `folder`: a version of a store, or a folder that other programs wrote.

    Raises:
        ArtifactError: no kind recognises it.
    """
    for name in kind_names():
        kind = find_kind(name)
        if kind.recognise(folder):
            return kind
    raise ArtifactError(
        f"{folder} holds no model: expected a diffusers folder, or config.json with model.safetensors"
    )


def load_model(folder: Path, *, device: str = "cpu", models: Models | None = None) -> Any:
    """Whatever a model folder holds: a denoiser (diffusers folder), a radiance field, a classifier or CLIP.

    An adapter without its base's weights is put over the base that `models` finds.

    Raises:
        ArtifactError: no model, a damaged one, or an adapter whose base cannot be loaded.
    """
    return kind_of(folder).load(folder, device=device, models=models)


def load_artifact(store: ArtifactStore, ref: str, cache: Path, *, device: str = "cpu") -> Any:
    """The model of a store reference; an adapter over its base from the same store."""
    return StoreModels(store, cache).artifact(ref, device=device)


def adapted(model: Any, terms: Sequence[AdapterTerm], models: Models) -> Any:
    """A plain denoiser: `model` with the adapters of store references added in, at their scales.

    It remembers what it was made of, so that an adapter over it can be published as one over `model`.

    Raises:
        ConfigError: `model` is no denoiser, or a reference holds no adapter, or one for another model.
    """
    from distill_core.networks.adapters import (
        ADAPTER,
        LoraDenoiser,
        combined,
        has_adapter,
        plain,
        read_base,
        weights_sha256,
    )
    from distill_core.networks.denoiser import Denoiser
    from distill_core.networks.fake_tensors import is_faked

    base = plain(model)
    if not isinstance(base, Denoiser):
        raise ConfigError(
            "adapters are added to a denoiser, and this is none; leave them out", field="adapters"
        )
    if is_faked():  # a plan: the sum has the shapes of the base
        return base
    found = []
    for term in terms:
        folder = models.folder(ModelSource(artifact=term.ref))
        if not has_adapter(folder):
            raise ConfigError(f"{term.ref} holds no adapter; name a LoRA of the store", field="adapters")
        over = read_base(folder / ADAPTER)
        if over is not None and over.sha256 != weights_sha256(base):
            raise ConfigError(
                f"{term.ref} adapts {over.ref or 'another model'}, and is to be added to {base.ref or 'one'} with "
                "other weights; name adapters of this model",
                field="adapters",
            )
        found.append((LoraDenoiser.load(base, folder), term.scale))
    return combined(found).over(base)


def config_kind(folder: Path) -> str:
    """Kind of model by a folder's config.json: our `kind`, or transformers' `model_type`."""
    try:
        config = read_table(folder / "config.json")
        return str(config.get("kind") or config.get("model_type") or "")
    except (OSError, ValueError):
        return ""
