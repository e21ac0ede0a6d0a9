"""model_index.json: the pipeline that a diffusers folder is, and the parts that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError, nearest
from distill_core.files.json_tables import read_table
from distill_core.networks.foreign.keys import UNSET, shown

INDEX = "model_index.json"
Parts = Mapping[str, tuple[str, ...]]  # by sub-folder, the classes that are read
CLIP, CLIP_TOKENS = ("CLIPTextModel",), ("CLIPTokenizer", "CLIPTokenizerFast")
PROJECTED = ("CLIPTextModelWithProjection",)
FAST = ("TokenizersBackend", "PreTrainedTokenizerFast")
T5, T5_TOKENS = ("T5EncoderModel",), ("T5Tokenizer", "T5TokenizerFast", *FAST)
GEMMA, GEMMA_TOKENS = ("Gemma2Model",), ("GemmaTokenizer", "GemmaTokenizerFast", *FAST)
KL = ("AutoencoderKL",)
UNETS: Parts = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel",),
    "vae": KL,
    "vqvae": ("VQModel", "AutoencoderKL"),
    "text_encoder": CLIP,
    "text_encoder_2": PROJECTED,
    "tokenizer": CLIP_TOKENS,
    "tokenizer_2": CLIP_TOKENS,
}  # and scheduler, whose class is looked at where it is read
SD3: Parts = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": KL,
    "text_encoder": PROJECTED,
    "text_encoder_2": PROJECTED,
    "text_encoder_3": T5,
    "tokenizer": CLIP_TOKENS,
    "tokenizer_2": CLIP_TOKENS,
    "tokenizer_3": T5_TOKENS,
}
FLUX: Parts = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": (*KL, "AutoencoderTiny"),
    "text_encoder": CLIP,
    "text_encoder_2": T5,
    "tokenizer": CLIP_TOKENS,
    "tokenizer_2": T5_TOKENS,
}
PIXART: Parts = {
    "transformer": ("PixArtTransformer2DModel",),
    "vae": KL,
    "text_encoder": T5,
    "tokenizer": T5_TOKENS,
}
SANA: Parts = {
    "transformer": ("SanaTransformer2DModel",),
    "vae": ("AutoencoderDC",),
    "text_encoder": GEMMA,
    "tokenizer": GEMMA_TOKENS,
}
QWEN_TOKENS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", *FAST)
QWEN_IMAGE: Parts = {
    "transformer": ("QwenImageTransformer2DModel",),
    "vae": ("AutoencoderKLQwenImage",),
    "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    "tokenizer": QWEN_TOKENS,
}
Z_IMAGE: Parts = {
    "transformer": ("ZImageTransformer2DModel",),
    "vae": KL,
    "text_encoder": ("Qwen3Model",),
    "tokenizer": QWEN_TOKENS,
}
FLUX2: Parts = {
    "transformer": ("Flux2Transformer2DModel",),
    "vae": ("AutoencoderKLFlux2",),
    "text_encoder": ("Qwen3ForCausalLM",),
    "tokenizer": QWEN_TOKENS,
}
PIPELINES: Mapping[str, Parts] = {
    "DDPMPipeline": UNETS,
    "DDIMPipeline": UNETS,
    "LDMPipeline": UNETS,
    "DiTPipeline": UNETS,
    "StableDiffusionPipeline": UNETS,
    "StableDiffusionImg2ImgPipeline": UNETS,
    "StableDiffusionInpaintPipeline": UNETS,
    "StableDiffusionXLPipeline": UNETS,
    "StableDiffusionXLImg2ImgPipeline": UNETS,
    "StableDiffusionXLInpaintPipeline": UNETS,
    "LatentConsistencyModelPipeline": UNETS,
    "LatentConsistencyModelImg2ImgPipeline": UNETS,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "SanaPipeline": SANA,
    "SanaSprintPipeline": SANA,
    "QwenImagePipeline": QWEN_IMAGE,
    "ZImagePipeline": Z_IMAGE,
    "Flux2KleinPipeline": FLUX2,
}  # those whose parts, networks and prompts are put together as `DiffusersDenoiser` does
SLOTS = sorted({name for parts in PIPELINES.values() for name in parts})
IDLE = frozenset(
    (
        "safety_checker",
        "feature_extractor",
        "requires_safety_checker",
        "id2label",
        "force_zeros_for_empty_prompt",
        "is_distilled",
    )
)  # they look at finished pictures; class names are for people; the last two are read by encoders of prompts


@dataclass(frozen=True)
class Index:
    """The parts of a pipeline, with the class of each."""

    pipeline: str
    parts: Mapping[str, str]

    @property
    def changes_scheduler(self) -> bool:
        """Whether the pipeline sets its scheduler's clip_sample to false and steps_offset to 1 when it is made."""
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
        close = nearest(pipeline, PIPELINES) if "did you mean" in nearest(pipeline, PIPELINES) else ""
        raise ArtifactError(
            f"{path} is of a {pipeline}, which is not understood{close.rstrip('?')}; "
            f"known: {', '.join(sorted(PIPELINES))}"
        )
    return Index(pipeline, _parts(path, table, PIPELINES[pipeline]))


def entry_of(folder: Path, name: str) -> Any:
    """An entry of a folder's index, None if it has none."""
    read_index(folder)  # the sentence that refuses a damaged one
    path = folder / INDEX
    return read_table(path).get(name) if path.is_file() else None


def pipeline_of(folder: Path) -> str | None:
    """The pipeline that a folder's index names, None if it has none."""
    index = read_index(folder)
    return None if index is None else index.pipeline


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
    for name in SLOTS:
        if (folder / name).is_dir() and name not in index.parts:
            raise ArtifactError(
                f"{folder} has {name}/, which its {INDEX} does not name; name it there, or move it away"
            )


def _parts(path: Path, table: Mapping[str, Any], read: Parts) -> dict[str, str]:
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
        known = read.get(name, (value[1],) if named and name == "scheduler" else ())
        if not named or value[1] not in known:
            allowed = f"; {name} may be {' or '.join(known)}" if known else "; only null is read"
            raise ArtifactError(f"{path} says {name} = {shown(value)}, which is not understood{allowed}")
        parts[name] = value[1]
    return parts
