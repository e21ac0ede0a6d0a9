"""Models by reference: loading, and sums of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_core.context import Context
from distill_core.errors import ConfigError
from distill_core.kinds.loading import load_model
from distill_core.networks.adapters import ADAPTER, LoraDenoiser, combined, has_adapter, plain, read_base
from distill_core.networks.denoiser import Denoiser
from distill_core.recipe.tables import ModelSource

if TYPE_CHECKING:
    from distill_core.networks.lora_formats.writing import Style


def load(ref: str, context: Context, *, device: str = "cpu") -> Any:
    """The model of a store reference, or of a folder's path."""
    path = Path(ref)
    if not path.is_dir():
        return context.artifact(ref, device=device)
    return load_model(path, device=device, models=context)


def merge_adapters(
    terms: Sequence[tuple[str, float]], context: Context, *, base: str | None = None
) -> LoraDenoiser:
    """The adapter `a D1 + b D2 + …` of store references or folders with their weights, sampled as the first is.

    `base` is the reference or folder of the model they adapt, for adapters that do not name it.

    Raises:
        ConfigError: a model without an adapter, adapters of different bases, or a base that nobody names.
    """
    folders = {ref: _folder(ref, context) for ref, _ in terms}
    for ref, folder in folders.items():
        if not has_adapter(folder):
            raise ConfigError(f"{ref} holds no adapter; only students of [student.lora] do", field="terms")
    bases = {ref: read_base(folder / ADAPTER) for ref, folder in folders.items()}
    if len({known.sha256 for known in bases.values() if known}) > 1:
        over = ", ".join(f"{ref} adapts {known.ref or 'another'}" for ref, known in bases.items() if known)
        raise ConfigError(f"only adapters of one model can be merged, and {over}", field="terms")
    base = base or next((known.ref for known in bases.values() if known and known.ref), None)
    if base is None:
        raise ConfigError(
            f"{terms[0][0]} does not name the model it adapts; give base, its reference or folder",
            field="base",
        )
    model = plain(load(base, context))
    if not isinstance(model, Denoiser):
        raise ConfigError(f"{base} is no denoiser; give the model that the adapters adapt", field="base")
    return combined([(LoraDenoiser.load(model, folders[ref]), weight) for ref, weight in terms])


def export_adapter(
    ref: str, context: Context, file: Path, *, style: Style = "diffusers", base: str | None = None
) -> LoraDenoiser:
    """Write the adapter of a store reference or folder as one safetensors file with the keys of other programs.

    Raises:
        ConfigError: a model without an adapter, a base that nobody names, a file that exists or has another ending, or
            keys that have no names for the network's layers.
    """
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file} is refused: give a file that ends in .safetensors", field="out")
    if file.exists():
        raise ConfigError(f"{file} exists; give a new file", field="out")
    lora = merge_adapters([(ref, 1.0)], context, base=base)
    lora.export(file, style=style)
    return lora


def _folder(ref: str, context: Context) -> Path:
    return Path(ref) if Path(ref).is_dir() else context.folder(ModelSource(artifact=ref))
