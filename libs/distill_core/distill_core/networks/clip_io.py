"""A CLIP folder of transformers as a frozen reader of pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_core.errors import ArtifactError
from distill_core.networks.foreign.vision import PROCESSOR, read_preprocessing
from distill_core.networks.preprocessing import Preprocessed, Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPModel

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own training pictures (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """Pictures and texts as vectors of unit length in one space; their product is the cosine."""

    def __init__(self, model: CLIPModel, tokenizer: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.preprocessed = Preprocessed(preprocessing)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def image_features(self, picture: Tensor) -> Tensor:
        """(B, D) of pictures (B, 1 or 3, H, W) in [-1, 1]; differentiable in them."""
        pixels = self.preprocessed(picture.float().expand(-1, 3, -1, -1))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(K, D) of the texts, cut to the model's length."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(
            self.device
        )
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)


def load_clip(folder: Path, *, device: str = "cpu") -> Clip:
    """The CLIP model in a transformers folder, from safetensors, on `device`.

    Raises:
        ArtifactError: the model or its tokenizer is missing or damaged, or its processor is not understood.
    """
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"CLIP folder {folder} is damaged or incomplete: {reason}") from error
    return Clip(model, tokenizer, _preprocessing(folder, model)).to(device)


def _preprocessing(folder: Path, model: CLIPModel) -> Preprocessing:
    """The folder's own; without one that of CLIP's training, at the size of the model."""
    vision: Any = model.config.vision_config
    side = int(vision.image_size)
    ours = read_preprocessing(folder)
    if ours is None:
        return Preprocessing(resize=side, crop=(side, side), resample="bicubic", mean=MEAN, std=STD)
    made = ours.size(side, side)
    if made != (side, side):
        raise ArtifactError(
            f"{folder / PROCESSOR} makes pictures of {made[0]} x {made[1]}, and the model takes {side} x {side}"
        )
    return ours
