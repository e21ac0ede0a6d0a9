"""Contract of the diffusion networks that methods see: `denoiser(x_sigma, sigma, cond) -> x0`."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.diffusion.guidance import guide_by
from distill_core.diffusion.levels import expand
from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.diffusion.steps import Denoise
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.denoiser.card import Card
from distill_core.method import Cond

_loading = threading.RLock()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """One thread at a time makes networks: diffusers changes how torch makes them, for all threads, meanwhile."""
    with _loading:
        yield


class Denoiser(nn.Module, abc.ABC):
    """A network read as an x0 predictor in the variance-exploding form `x_sigma = x0 + sigma eps`.

    Parameterisation (eps, v, x0, flow, EDM), schedule and scaling are converted inside. `cond` maps names to
    tensors with the batch first; a missing condition means the null condition.
    """

    __call__: Callable[..., Tensor]  # `forward` with its hooks
    kind: ClassVar[str] = "denoiser"
    image: ImageSpec
    cond: CondSpec
    sampler: SamplerSpec  # how this model is sampled by default
    schedule: NoiseSchedule
    ref: str = ""  # name@version in the store, if these very weights came from there

    @abc.abstractmethod
    def forward(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None, time: Tensor | None = None
    ) -> Tensor:
        """x0 (B, C, H, W) from `x_sigma` (B, C, H, W), `sigma` (B,) in data units.

        `time` (B,) is what the network is told in the place of what its schedule says of `sigma`: an index, or 1000 t.
        """

    @abc.abstractmethod
    def with_features(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x0, and the trunk's features (B, D, h, w) that a discriminator head reads."""

    @abc.abstractmethod
    def null_cond(self, batch: int) -> Cond:
        """The condition that means "none", for `batch` items."""

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(sampler=self.sampler, image=self.image, cond=self.cond)

    def save(self, folder: Path) -> None:
        """Write the model's folder; models that exist in memory alone refuse."""
        raise ArtifactError(f"a {type(self).__name__} has no form on disk")

    def encode(self, picture: Tensor) -> Tensor:
        """A picture in [-1, 1] as this model's x0; latent models override it."""
        return picture

    def encode_prompts(self, prompts: list[str]) -> Cond:
        """`prompt_embeds` (B, T, D); models without a text encoder refuse."""
        raise ConfigError("this model takes no prompts; give class labels instead", field="prompts")

    def encode_negative(self, prompts: list[str]) -> Cond:
        """The same of prompts that guidance leads away from, which some models read otherwise."""
        return self.encode_prompts(prompts)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass; networks that cannot refuse."""
        raise ConfigError(
            f"{type(self).__name__} cannot recompute its activations; leave student.gradient_checkpointing out",
            field="student.gradient_checkpointing",
        )

    def decode(self, x0: Tensor) -> Tensor:
        """The picture (B, C, H, W) in [-1, 1] of x0; latent models override it."""
        return x0

    def guided(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        cond: Cond | None,
        guidance: float | Tensor,
        time: Tensor | None = None,
    ) -> Tensor:
        """x0 under classifier-free guidance, both halves in one pass; `guidance` is one scale or one per sample (B,).

        The number 1 costs one evaluation, and where the network is told its guidance, any does. A negative prompt in
        `cond` takes the null condition's place, unless it steers the attention (`nasa_scale`): then it does so in the
        half with the condition alone.
        """
        if self.sampler.guidance_range is not None:
            asked = guidance if isinstance(guidance, Tensor) else sigma.new_full((len(x_sigma),), guidance)
            with_scale = {**(cond or self.null_cond(len(x_sigma))), "guidance": asked}
            answer: Tensor = self(x_sigma, sigma, with_scale, *(() if time is None else (time,)))
            return answer
        told = () if time is None else (time,)
        if not cond or (not isinstance(guidance, Tensor) and guidance == 1):
            return self(x_sigma, sigma, cond, *told)
        both = self._both_halves(cond, len(x_sigma))
        twice = x_sigma.repeat(2, *[1] * (x_sigma.ndim - 1))
        with_cond, without = self(twice, sigma.repeat(2), both, *(one.repeat(2) for one in told)).chunk(2)
        scale = expand(guidance, x_sigma) if isinstance(guidance, Tensor) else guidance
        rule, level = self.cond.guidance_rule, expand(sigma, x_sigma)
        x0: Tensor = guide_by(rule, with_cond, without, scale, x_sigma, level)
        return x0

    def bound(self, cond: Cond | None, guidance: float) -> Denoise:
        """This network under a condition and guidance, as `diffusion.sampling.sample` calls it."""

        def denoise(x_sigma: Tensor, *level: float) -> Tensor:
            sigma, *time = (x_sigma.new_full((len(x_sigma),), value) for value in level)
            return self.guided(x_sigma, sigma, cond, guidance, *time)

        return denoise

    def _both_halves(self, cond: Cond, batch: int) -> Cond:
        """`cond`, and below it the condition that guidance leads away from."""
        if self.cond.factor is not None:
            raise ConfigError(
                "guidance needs a null condition, and a model that enlarges pictures has none; use guidance = 1",
                field="guidance",
            )
        null = self.null_cond(batch)
        others = {name: value for name, value in cond.items() if name not in null}
        if "nasa_scale" in cond:
            null |= {name: torch.zeros_like(value) for name, value in others.items()}
        else:
            null = {name: cond.get(f"negative_{name}", value) for name, value in null.items()}
            null |= {name: value for name, value in others.items() if not name.startswith("negative_")}
        return {name: torch.cat([cond[name], value.to(cond[name])]) for name, value in null.items()}
