"""The text encoder of a text-to-image folder: prompts to `prompt_embeds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.errors import ArtifactError


class TextEncoder:
    """A tokenizer with its CLIP text model, both frozen."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model.eval().requires_grad_(False)
        self.max_tokens = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        """From the `tokenizer/` and `text_encoder/` of a diffusers folder.

        Raises:
            ArtifactError: a part is missing or damaged.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            model = CLIPTextModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # transformers raises many kinds on damaged files
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ArtifactError(
                f"text encoder or tokenizer in {folder} is damaged or incomplete: {reason}"
            ) from error
        return cls(tokenizer, model)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Last hidden states (B, T, D) of the prompts, padded and cut to the model's tokens."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return self.model(tokens.input_ids.to(self.model.device))[0]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write both parts; the entries of the pipeline's index."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.model.save_pretrained(folder / "text_encoder")
        return {"tokenizer": self.tokenizer, "text_encoder": self.model}

    def to(self, device: torch.device | str) -> TextEncoder:
        self.model.to(device)
        return self
