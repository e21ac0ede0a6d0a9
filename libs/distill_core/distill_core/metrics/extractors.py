"""Feature extractors of metrics: vision networks in local transformers folders, with the folder's own preprocessing.

Pictures are rounded to 8 bits first, as files have them. Inception v3 is in no transformers folder, and the libraries
that have it need torchvision; CLIP and DINOv2 features rank generators closer to people (Stein et al. 2023,
arXiv 2306.04675).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from distill_core.errors import ArtifactError
from distill_core.files.json_tables import read_table
from distill_core.networks.clip_io import Clip, load_clip
from distill_core.pictures import to_uint8

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR = "preprocessor_config.json"


class VisionExtractor:
    """Features of pictures by a vision network; `described` names it.

    They are the projected embedding of models with a text side (CLIP, SigLIP), else the pooled output, else, where
    the folder has no weights to pool with (ViT classifiers), the class token.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, described: str, *, pooled: bool = True
    ) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.described, self.pooled = described, pooled

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """(B, D) on the CPU, of pictures (B, 1 or 3, H, W) in [-1, 1]."""
        pixels = _pixels(self.processor, pictures).to(next(self.model.parameters()).device)
        if hasattr(self.model, "get_image_features"):
            return _embedding(self.model.get_image_features(pixel_values=pixels)).float().cpu()
        output = self.model(pixel_values=pixels)
        features: Tensor = output.last_hidden_state[:, 0]
        if self.pooled and output.get("pooler_output") is not None:
            features = output.pooler_output.flatten(1)
        return features.float().cpu()


class ClipScorer:
    """Agreement of pictures with their prompts, by a CLIP model; `described` names it."""

    def __init__(self, clip: Clip, processor: Any, described: str) -> None:
        self.clip, self.processor, self.described = clip, processor, described

    def to(self, device: torch.device | str) -> Self:
        self.clip.to(device)
        return self

    @torch.no_grad()
    def cosines(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) cosines between each picture (B, 1 or 3, H, W) in [-1, 1] and its prompt, on the CPU."""
        pixels = _pixels(self.processor, pictures).to(self.clip.device)
        images = _embedding(self.clip.model.get_image_features(pixel_values=pixels))
        texts = self.clip.text_features(prompts)  # of unit length already
        return (nn.functional.normalize(images.float(), dim=1) * texts.float()).sum(1).cpu()


def _pixels(processor: Any, pictures: Tensor) -> Tensor:
    arrays = to_uint8(pictures)
    colours = arrays.repeat(3, axis=3) if arrays.shape[3] == 1 else arrays
    inputs = processor(images=list(colours), return_tensors="pt", input_data_format="channels_last")
    pixels: Tensor = inputs["pixel_values"]
    return pixels


def _embedding(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.pooler_output  # transformers 4, transformers 5


def load_extractor(folder: Path) -> VisionExtractor:
    """The vision network in a transformers folder: CLIP, SigLIP, DINOv2, ViT, ConvNeXt and others.

    Raises:
        ArtifactError: no such folder's files, pickled weights, damaged, incomplete, or no network for pictures.
    """
    from transformers import AutoModel

    with _loading(folder):
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if not hasattr(model, "get_image_features") and model.main_input_name != "pixel_values":
        raise ArtifactError(
            f"{folder} holds a {type(model).__name__}, which reads no pictures; give a vision model's folder, "
            "e.g. of CLIP or DINOv2"
        )
    missing = sorted(report["missing_keys"])
    lacks_pooler = bool(missing) and all("pooler" in name for name in missing)
    if missing and not lacks_pooler:
        raise ArtifactError(f"{folder} is incomplete: its weights lack {missing[0]}")
    return VisionExtractor(model, _processor(folder), _described(folder, model), pooled=not lacks_pooler)


def load_scorer(folder: Path) -> ClipScorer:
    """The CLIP model in a transformers folder, with its tokenizer.

    Raises:
        ArtifactError: no CLIP folder, pickled weights, damaged or incomplete.
    """
    with _loading(folder):
        kind = read_table(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ArtifactError(
            f"{folder} holds a {kind or 'model of no known kind'}; a score needs a CLIP model"
        )
    clip = load_clip(folder)
    return ClipScorer(clip, _processor(folder), _described(folder, clip.model))


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    if not (folder / PROCESSOR).is_file():
        raise ArtifactError(f"{folder} does not say how pictures are prepared: it has no {PROCESSOR}")
    with _loading(folder):  # use_fast=False: Pillow's resizing, whatever else is installed
        return AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=False
        )


def _described(folder: Path, model: nn.Module) -> str:
    return f"{type(model).__name__}, sha256 {fingerprint(folder)}"


def fingerprint(folder: Path) -> str:
    """The beginning of one sha256 over a folder's weights: figures by the same weights can be compared."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Whatever transformers raises on damaged files, in one sentence."""
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} is not a transformers folder: it has no config.json")
    held = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".ckpt")
    )
    if not any(name.endswith(".safetensors") for name in held):
        raise ArtifactError(
            f"{folder} holds {held[0] if held else 'no weights'}: only safetensors are loaded, "
            "since pickles can execute code"
        )
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{folder} is damaged or incomplete: {reason}") from error
