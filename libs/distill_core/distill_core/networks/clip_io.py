"""A CLIP folder of transformers as a frozen reader of pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_core.errors import ArtifactError
from distill_core.files.json_tables import read_table

if TYPE_CHECKING:
    from transformers import CLIPModel

PREPROCESSING = "preprocessor_config.json"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own training pictures (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """Pictures and texts as vectors of unit length in one space; their product is the cosine."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CLIPModel, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        vision: Any = model.config.vision_config
        self.size = int(vision.image_size)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

    def image_features(self, picture: Tensor) -> Tensor:
        """(B, D) of pictures (B, 1 or 3, H, W) in [-1, 1]; differentiable in them."""
        colours = picture.float().expand(-1, 3, -1, -1)
        resized = F.interpolate(colours, (self.size, self.size), mode="bicubic", antialias=True)
        pixels = ((resized + 1) / 2 - self.mean) / self.std
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(K, D) of the texts, cut to the model's length."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(
            self.mean.device
        )
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)


def load_clip(folder: Path, *, device: str = "cpu") -> Clip:
    """The CLIP model in a transformers folder, from safetensors, on `device`.

    Raises:
        ArtifactError: the model or its tokenizer is missing or damaged.
    """
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        preprocessing = read_table(folder / PREPROCESSING) if (folder / PREPROCESSING).is_file() else {}
    except Exception as error:  # transformers raises many kinds on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"CLIP folder {folder} is damaged or incomplete: {reason}") from error
    clip = Clip(model, tokenizer, preprocessing.get("image_mean", MEAN), preprocessing.get("image_std", STD))
    return clip.to(device)
