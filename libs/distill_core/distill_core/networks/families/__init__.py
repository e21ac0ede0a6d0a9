"""The table of network classes: one file for each, and no other place that knows them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_core.networks.families.base import Family
from distill_core.networks.families.dit import DiT
from distill_core.networks.families.flux import Flux
from distill_core.networks.families.flux2 import Flux2
from distill_core.networks.families.pixart import PixArt
from distill_core.networks.families.qwen_image import QwenImage
from distill_core.networks.families.sana import Sana
from distill_core.networks.families.sd3 import SD3
from distill_core.networks.families.unet import UNet2D, UNet2DCondition
from distill_core.networks.families.z_image import ZImage

_ALL = (
    *(UNet2D(), UNet2DCondition(), DiT()),
    *(SD3(), Flux(), Flux2(), PixArt(), Sana(), QwenImage(), ZImage()),
)
FAMILIES: Mapping[str, Family] = {each.network: each for each in _ALL}


def family_of(network: Any) -> Family:
    """The family of a network."""
    return FAMILIES[type(network).__name__]
