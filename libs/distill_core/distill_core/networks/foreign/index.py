"""model_index.json: the pipeline that a diffusers folder is, and the parts that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError
from distill_core.files.json_tables import read_table
from distill_core.networks.foreign.keys import UNSET, shown

INDEX = "model_index.json"
PIPELINES = frozenset(
    [
        "DDPMPipeline",
        "DDIMPipeline",
        "LDMPipeline",
        "DiTPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ]
)  # those whose parts, networks and prompts are put together as `DiffusersDenoiser` does
PARTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "vqvae": ("VQModel", "AutoencoderKL"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}  # and scheduler, whose class is looked at where it is read
IDLE = frozenset(
    (
        "safety_checker",
        "feature_extractor",
        "requires_safety_checker",
        "id2label",
        "force_zeros_for_empty_prompt",
    )
)  # they look at finished pictures; class names are for people; the last is read by `text`


@dataclass(frozen=True)
class Index:
    """The parts of a pipeline, with the class of each."""

    pipeline: str
    parts: Mapping[str, str]

    @property
    def changes_scheduler(self) -> bool:
        """Whether the pipeline, when it is made, switches a scheduler's clamping of x0 off and sets steps_offset = 1."""
        return self.pipeline.startswith("StableDiffusion") and "XL" not in self.pipeline


def read_index(folder: Path) -> Index | None:
    """The index of a folder; None if it has none.

    Raises:
        ArtifactError: it is damaged, of an unknown pipeline, or names a part that is not understood.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    pipeline = str(table.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ArtifactError(
            f"{path} is of a {pipeline}, which is not understood; known: {', '.join(sorted(PIPELINES))}"
        )
    return Index(pipeline, _parts(path, table))


def check_parts(folder: Path, index: Index) -> None:
    """Refuse a folder that lacks a part which its index names, or has another one that would be read.

    Raises:
        ArtifactError: it does.
    """
    for name in index.parts:
        if not (folder / name).is_dir():
            raise ArtifactError(
                f"{folder / INDEX} names {name}, and the folder has no {name}/; copy it there"
            )
    for name in PARTS:
        if (folder / name).is_dir() and name not in index.parts:
            raise ArtifactError(
                f"{folder} has {name}/, which its {INDEX} does not name; name it there, or move it away"
            )


def _parts(path: Path, table: Mapping[str, Any]) -> dict[str, str]:
    """The class of each part; what is null, or idle, is none."""
    parts = {}
    for name, value in table.items():
        if (
            name.startswith("_")
            or name in IDLE
            or value == [None, None]
            or any(value is unset for unset in UNSET)
        ):
            continue
        named = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        known = PARTS.get(name, (value[1],) if named and name == "scheduler" else ())
        if not named or value[1] not in known:
            allowed = f"; {name} may be {' or '.join(known)}" if known else "; only null is read"
            raise ArtifactError(f"{path} says {name} = {shown(value)}, which is not understood{allowed}")
        parts[name] = value[1]
    return parts
