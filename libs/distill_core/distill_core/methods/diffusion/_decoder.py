"""Fine-tuning of a latent model's decoder behind its frozen one-step network: only Dec learns, and a critic C.

    min_Dec E[ |Dec(z) - x| + w_f d(Dec(z), x) + w_g softplus(-C(Dec(z))) ],   z = D(s eps, s, y),  x the true picture

d is a distance of a classifier's features. Without such weights it is the absolute difference alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.losses.adversarial import discriminator_loss, generator_loss
from distill_core.method import MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.discriminator import NoisyDiscriminator
from distill_core.networks.perceptual import FeatureDistance

NOISE = 0.05  # of the pictures that the critic sees, in their own units: it keeps its logits finite


class DecoderConfig(MethodConfig):
    decoder_steps: int = Field(0, ge=0)  # in which only the decoder learns, the network frozen; 0 = off
    features_weight: float = Field(0.0, ge=0)  # w_f; the paper has LPIPS here, its weight is not published
    gan_weight: float = Field(0.0, ge=0)  # w_g; likewise


class DecoderTuning:
    """The losses of a student's decoder `decoder` and its critic `critic`, which the method trains as roles.

    Raises:
        ConfigError: a model that decodes nothing, or a weight of features without an extractor.
    """

    def __init__(self, config: DecoderConfig, student: Denoiser, extractor: nn.Module | None) -> None:
        self.config = config
        if not isinstance(student, DiffusersDenoiser) or student.codec is None:
            raise ConfigError(
                "config.decoder_steps trains a decoder, and this student has none of its own; set it to 0, or use a "
                "teacher of latents and no LoRA",
                field="config.decoder_steps",
            )
        self.features = FeatureDistance(extractor, student.image.picture) if config.features_weight else None
        codec = student.own_codec()
        self.decoder: nn.Module = codec.decoder.requires_grad_(True)
        channels, height, _ = student.image.picture
        self.critic = NoisyDiscriminator(channels, height) if config.gan_weight else None

    def updates(self, made: Tensor, x: Tensor) -> Iterator[Update]:
        """The decoder's update by its pictures `made` of the true ones `x` (B, C, H, W), then the critic's."""
        error = (made - x).abs().mean()
        loss = error
        if self.features is not None:
            loss = loss + self.config.features_weight * self.features.items(made, x).mean()
        if self.config.gan_weight:
            loss = loss + self.config.gan_weight * generator_loss(self.judged(made))
        yield Update("decoder", loss, {"decoder_error": error.detach()})
        if self.config.gan_weight:
            yield Update("critic", discriminator_loss(self.judged(x), self.judged(made.detach())))

    def judged(self, pictures: Tensor) -> Tensor:
        """The critic's logits (B,) of pictures with a little noise."""
        sigma = pictures.new_full((len(pictures),), NOISE)
        assert self.critic is not None
        logits: Tensor = self.critic(pictures + NOISE * torch.randn_like(pictures), sigma, {})
        return logits
