"""Latent diffusion: an autoencoder of pictures from data, then a flow-matching denoiser of its latents.

    codec:    min E[ mean |Dec(z) - x| + w_kl KL(q(z|x) || N(0, I)) / pixels ],    z ~ q(z|x) = Enc(x)
    denoiser: min E[ |v(z_t, t, c) - (eps - z0)|^2 ],   z_t = (1 - t) z0 + t eps,  z0 = s E_q[z],  s = 1 / std E_q[z]

The codec learns in the first `warmup_steps`, is then frozen, and its latents are brought to unit deviation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill_core.config import NetworkArgs
from distill_core.data.source import Source
from distill_core.method import Batch, Method, Stage, Update
from distill_core.methods.pretrain._flow_matching_loss import FlowConfig, flow_matching_loss
from distill_core.networks.diffusers_new import build_codec, build_denoiser, scale_latents
from distill_core.recipe.tables import NetworkConfig

MEASURED = 256  # pictures by which the latents' deviation is taken


class Config(FlowConfig):
    warmup_steps: int = Field(500, ge=1)  # in which only the codec learns
    kl_weight: float = Field(1e-4, ge=0)  # per pixel value; the paper's is 1e-6 per latent, for larger codecs
    codec: NetworkArgs = {}  # arguments of diffusers' AutoencoderKL
    factor: int | None = Field(None, ge=2, le=256)  # it enlarges so many times, told nothing else; unset: off


def codec_loss(codec: Any, x: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """The codec's loss on pictures (B, C, H, W) in [-1, 1], and its reconstruction error alone (scalars)."""
    posterior = codec.encode(x).latent_dist
    error = (codec.decode(posterior.sample()).sample - x).abs().mean()
    return error + kl_weight * posterior.kl().mean() / x[0].numel(), error.detach()


class LatentDiffusion(Method):
    paper = (
        "Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752; "
        "Lipman et al. 2023, Flow Matching for Generative Modeling, arXiv 2210.02747"
    )
    roles = ("codec", "teacher")
    result = "teacher"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.codec = build_codec(config.codec, data.shape)
        self.teacher = build_denoiser(
            network,
            parameterisation="flow",
            shape=data.shape,
            num_classes=data.num_classes,
            class_names=data.class_names,
            prompts=data.prompts,
            codec=self.codec,
            low_resolution=config.factor,
        )
        self.scale = torch.ones(())  # of the latents; known once the codec is

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        codec = Stage("codec", config.warmup_steps, ("codec",))
        return codec, Stage("denoiser", max(steps - config.warmup_steps, 1), ("teacher",))

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        if shapes is None:  # else the checkpoint has it
            self.load_state({"scale": self.measured_scale()})

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if self.stage_of(step).name == "codec":
            loss, error = codec_loss(self.codec, batch.columns["x0"], self.config.kl_weight)
            yield Update("codec", loss, {"codec_error": error})
            return
        with torch.no_grad():
            latents = self.teacher.encode(batch.columns["x0"])
        yield Update("teacher", flow_matching_loss(self.teacher, batch.with_x0(latents), self.config))

    @torch.no_grad()
    def measured_scale(self) -> Tensor:
        """1 / standard deviation of the latents' means, over pictures that are always the same ones."""
        codec: Any = self.codec
        pictures = self.data.all(MEASURED).columns["x0"]
        parts = [codec.encode(part.to(self.device)).latent_dist.mode() for part in pictures.split(32)]
        return 1 / torch.cat(parts).std().clamp_min(1e-6).cpu()

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.scale = state["scale"]
        scale_latents(self.codec, float(self.scale))
