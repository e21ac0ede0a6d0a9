"""Base of the transformers that read prompts."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from distill_core.artifacts import CondSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.families.base import Family, token_map
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text_parts import damage_named
from distill_core.recipe.tables import NetworkConfig


class Prompted(Family):
    """Blocks over the tokens of patches, with an encoder of their own in the folder."""

    image_stream: ClassVar[int] = 0
    """Place of the image's tokens in what a block answers: joint blocks answer (text, image)."""

    def trunk(self, network: Any) -> nn.Module:
        blocks: nn.ModuleList = network.transformer_blocks
        return blocks[len(blocks) // 2]

    def as_map(self, network: Any, feature: Any, x: Tensor) -> Tensor:
        tokens = feature[self.image_stream] if isinstance(feature, tuple) else feature
        return token_map(tokens, x, network.config.patch_size)

    def load_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        with damage_named(folder):
            return self.read_text(folder, config)

    @abc.abstractmethod
    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        """The encoder in the folder of a network of this config."""

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        if text is None:
            raise ArtifactError(
                f"a {self.network} is conditioned on text, and its folder has no text_encoder/; copy it there"
            )
        return text.cond()

    def new_text(self, network: NetworkConfig, prompts: list[str] | None) -> PromptEncoder:
        raise ConfigError(
            f"network.name = {self.network} is read from folders and not made anew: its prompts need text models "
            "that were trained; give a teacher of this class, and student.network for a smaller one",
            field="network.name",
        )


def check_width(path: Path, config: Any, key: str, width: int | None) -> None:
    """Refuse a config whose `key` is not the width of the prompts that the folder's encoders give."""
    if config[key] != width:
        raise ArtifactError(f"{path} says {key} = {config[key]}, and prompts are encoded {width} wide")
