"""DMAE: a student reads the patches that its masked teacher reads, and repeats what its upper blocks make of them.

    L = mean over hidden patches |x - decoder(h_s)|^2 + w mean |n(h_t^l) - n(W h_s^k)|,    n(a) = a / |a|

h_t^l, h_s^k: tokens (B, 1 + K, D) of teacher and student after their blocks l and k, at the same share of their depths;
W one linear layer. The teacher's blocks after l are not run, nor is its decoder: with three quarters of the patches
hidden and a quarter of the blocks left out it costs about 3/16 of the whole picture's way through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.losses.distillation import reduced
from distill_core.methods.recognition._masked import MaskedConfig, MaskedStudent
from distill_core.networks.masked import (
    MaskedEncoder,
    TokenMask,
    aligned,
    hidden_pixel_loss,
    mask_of,
    new_decoder,
    random_mask,
)
from distill_core.networks.operations import counted_operations
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MaskedConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # share of the patches that are hidden; the paper has to 0.98
    depth: float = Field(0.75, gt=0, le=1)  # share of the blocks below the features; the official code's
    weight: float = Field(1.0, ge=0)  # w; 0: the pixels alone, and the teacher is not run
    pixel_weight: float = Field(1.0, ge=0)  # of the first term; the official code's
    decoder_width: int = Field(32, ge=4, le=8192, multiple_of=4)  # of the student's decoder
    decoder_blocks: int = Field(2, ge=1, le=64)  # the same


def direction_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,) mean distance of the coordinates of tokens (B, N, D) that are brought to unit length."""
    own, other = (F.normalize(tokens.float(), dim=2) for tokens in (student, teacher))
    return (own - other).abs().mean((1, 2))


class DMAE(MaskedStudent):
    paper = "Bai et al. 2023, Masked Autoencoders Enable Efficient Knowledge Distillers, arXiv 2208.12256"
    config: Config

    def __init__(
        self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source, unlabelled: Source
    ) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        self.begin(network, data, unlabelled)
        self.taught = self.read(teacher, field="teacher")
        decoder = new_decoder(self.encoder, config.decoder_width, config.decoder_blocks)
        self.student.exits.extend([decoder, nn.Linear(self.encoder.width, self.taught.width)])

    def pretraining(self, x0: Tensor, step: int) -> dict[str, Tensor]:
        mask = random_mask(self.encoder, x0, self.config.mask_ratio)
        decoder, projection = self.student.exits
        latent, middle = self.encoder.with_middle(x0, mask, self.blocks(self.encoder))
        predicted = decoder(self.encoder.with_prefixes(latent, 1), mask.restore).logits
        pixels = self.encoder.pixels(x0)
        error = reduced(hidden_pixel_loss(predicted, pixels, mask, self.encoder.patch_size))
        losses = {"pixel_loss": self.config.pixel_weight * error}
        if self.config.weight:
            own, wanted = aligned(self.encoder, middle, self.taught, self.features(x0, mask))
            distance = direction_distance(projection(own), wanted)
            losses["feature_loss"] = self.config.weight * reduced(distance)
        return losses

    def blocks(self, encoder: MaskedEncoder) -> int:
        """Blocks of an encoder below the features."""
        return max(int(self.config.depth * encoder.num_layers + 0.5), 1)

    @torch.no_grad()
    def features(self, x0: Tensor, mask: TokenMask) -> Tensor:
        """What the teacher makes of the seen patches (B, 1 + K, D), without its later blocks."""
        return self.taught(x0, mask, self.blocks(self.taught))

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Counted multiplications of the teacher: as it is run here beside its whole encoder, masked and unmasked."""
        x0 = torch.zeros(1, *(self.data.shape or ()), device=self.device)
        mask = mask_of(torch.rand(1, self.taught.num_patches, device=self.device), self.config.mask_ratio)
        run = counted_operations(lambda: self.features(x0, mask))
        masked = counted_operations(lambda: self.taught(x0, mask))
        whole = counted_operations(lambda: self.taught(x0))
        share = self.blocks(self.taught) / self.taught.num_layers
        return {
            "teacher_share_of_blocks": share,
            "teacher_share_of_masked_operations": run / masked,
            "teacher_share_of_operations": run / whole,
        }
