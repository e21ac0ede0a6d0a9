"""Contract of a network class: what it is conditioned on, how it is called, and what its folder holds beside it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.method import Cond
from distill_core.networks.foreign.keys import shown
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text import load_text_encoder
from distill_core.recipe.tables import NetworkConfig


class Family(abc.ABC):
    """One class of diffusers networks; all that differs between classes is here.

    A network's own tensor is `x` (B, C, h, w), in the form that it was trained in (`diffusion.schedule`).
    """

    network: ClassVar[str]  # the class's name in diffusers
    slot: ClassVar[Literal["unet", "transformer"]] = "transformer"  # sub-folder of its weights
    interface: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels", "sample_size")
    """Arguments that decide what a network takes and gives: a smaller one has the same."""
    pipeline: ClassVar[str] = ""
    """The diffusers pipeline that calls such a network as it must be; "": it depends (`diffusers_plain`)."""
    index: ClassVar[dict[str, Any]] = {}  # see `index_of`
    options: ClassVar[dict[str, Any]] = {}
    """Options of the pipeline's call that make it answer in the size that was asked for, to the prompt as it is."""
    guidance_word: ClassVar[str] = "guidance_scale"
    """The pipeline's argument for the scale of guidance."""
    guidance: ClassVar[float] = 1.0
    """Usual scale of classifier-free guidance; 1 is off."""
    even_levels: ClassVar[bool] = False
    """Whether the pipeline gives its scheduler even levels of flow time, linspace(1, 1/N, N)."""
    mu: ClassVar[Literal["line", "flux2"]] = "line"
    """How a shift that depends on the picture's size is found (`diffusion.schedulers`)."""
    steerable: ClassVar[bool] = False
    """Whether cross-attention can turn away from a negative prompt (`networks.steering`)."""
    variance_below: ClassVar[bool] = False
    """Whether the output may have a variance below what it predicts, whatever the scheduler says."""

    @abc.abstractmethod
    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        """What the network predicts (B, C, h, w) for `x`, the schedule's time (B,) and the named conditions."""

    @abc.abstractmethod
    def trunk(self, network: Any) -> nn.Module:
        """The module in the middle whose output discriminators read."""

    def as_map(self, network: Any, feature: Any, x: Tensor) -> Tensor:
        """The trunk's answer to `x` as features (B, D, h', w')."""
        tokens: Tensor = feature[0] if isinstance(feature, tuple) else feature
        return tokens if tokens.ndim == 4 else token_map(tokens, x, network.config.patch_size)

    def prepare(self, network: Any) -> None:  # noqa: B027
        """Change a network that was just made or read; its answers stay the same."""

    def export(self, network: Any, image: ImageSpec, cond: CondSpec) -> None:  # noqa: B027
        """Change a network to a form that has graphs, for x of one size: its answers are the same, up to rounding."""

    def called_apart(self, network: Any) -> list[nn.Module]:
        """Modules called from outside the block that holds them."""
        return []

    def channels(self, config: Any) -> tuple[int, int]:
        """Channels of x, and of the answer."""
        return config.in_channels, config.get("out_channels") or config.in_channels

    def size(self, path: Path, config: Any) -> tuple[int, int]:
        """(h, w) of x, where the config at `path` says it.

        Raises:
            ArtifactError: it does not.
        """
        return sides(path, config.sample_size)

    def patch(self, config: Any) -> int:
        """Sides of x that one token holds."""
        return 1

    def usual_guidance(self, config: Any, text: PromptEncoder | None) -> float:
        """Usual scale of classifier-free guidance; 1 is off."""
        return self.guidance

    def pipeline_for(self, config: Any, text: PromptEncoder | None) -> str:
        """The pipeline of a network of this config."""
        return self.pipeline

    def index_of(self, pipeline: str) -> dict[str, Any]:
        """Entries of the pipeline's index beside the parts that are there."""
        return self.index

    def plain_guidance(self, guidance: float) -> float:
        """The pipeline's own number for a scale of guidance."""
        return guidance

    def plain_latents(self, image: ImageSpec) -> list[str]:
        """Code that makes the pipeline's own `latents` of a variable of that name (1, C, h, w)."""
        return []

    def load_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        """The encoder of the prompts in a pipeline's folder, whose network has this config."""
        return load_text_encoder(folder)

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        """Refuse an encoder whose prompts the network, of the config at `path`, does not take.

        Raises:
            ArtifactError: it is such.
        """
        raise ArtifactError(
            f"{path} is of a {self.network}, which takes no text; its folder has text_encoder/"
        )

    @abc.abstractmethod
    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        """The conditions of a network of this config.

        Raises:
            ArtifactError: it reads prompts, and there is no encoder.
        """

    def new_text(self, network: NetworkConfig, prompts: list[str] | None) -> PromptEncoder | None:
        """The encoder of a new network that learns from `prompts`; None for classes that read none."""
        return None

    def new_args(self, num_classes: int | None, text: PromptEncoder | None) -> dict[str, Any]:
        """Arguments of a new network for these conditions."""
        return {}


def token_map(tokens: Tensor, x: Tensor, patch: int) -> Tensor:
    """Tokens (B, N, D) of patches, row by row, as (B, D, h', w')."""
    grid: Tensor = tokens.transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))
    return grid


def without_variance(output: Tensor, x: Tensor) -> Tensor:
    """A network's output without the variance that some learn below it."""
    return output if output.shape[1] == x.shape[1] else output[:, : x.shape[1]]


def sides(path: Path, sample_size: Any) -> tuple[int, int]:
    """(height, width) of what a network draws."""
    both = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size, sample_size]
    if len(both) != 2 or not all(isinstance(side, int) and side > 0 for side in both):
        raise ArtifactError(
            f"{path} says sample_size = {shown(sample_size)}; give the side of what the network draws, or "
            "[height, width]: pixels, or latents where there is a codec"
        )
    return both[0], both[1]


def labelled(num_classes: int | None, null: int | None) -> CondSpec:
    """Conditions of a network with a table of classes; without one it has none."""
    if not num_classes:
        return CondSpec(kind="none")
    return CondSpec(kind="class_label", num_classes=num_classes, null_label=null)


def refuse_steering(cond: Cond, network: str) -> None:
    """Refuse a negative prompt that would have to steer the attention of a network that cannot."""
    if "nasa_scale" in cond:
        raise ConfigError(
            f"{network} has no cross-attention that a negative prompt could steer; leave the negative prompt out",
            field="negative_prompt",
        )
