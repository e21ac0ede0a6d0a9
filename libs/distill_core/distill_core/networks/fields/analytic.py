"""Fields in closed form: scenes that need no training, as teachers and as oracles."""

from __future__ import annotations

import math
from types import ModuleType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.networks.fields.base import FieldConfig, RadianceField
from distill_core.radiance.analytic import alcove, procedural

SCENES: dict[str, ModuleType] = {"procedural": procedural, "alcove": alcove}
SOLID_DENSITY = 400.0  # 1/unit inside the objects; outside, what `min_log_density` says


class AnalyticConfig(FieldConfig):
    """Choice of the scene."""

    scene: Literal["procedural", "alcove"] = "procedural"
    min_log_density: float = Field(-30.0, ge=-30, le=0)  # nothing, to fp32


class AnalyticField(RadianceField):
    """Solid inside the objects, empty outside; the feature is the position, block 2 the scene's shading.

    The scene fills [-1, 1]^3 and is scaled to the field's box. It has no parameters.
    """

    kind: ClassVar[str] = "analytic"
    Config: ClassVar[type[AnalyticConfig]] = AnalyticConfig
    config: AnalyticConfig

    def __init__(self, config: AnalyticConfig, bound: float) -> None:
        super().__init__(config, bound)
        self.scene = SCENES[config.scene]

    def raw(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        place = 2 * unit - 1
        inside = self.scene.signed_distances(place).amin(-1) < 0
        nothing = self.config.min_log_density
        log_density = torch.where(inside, math.log(SOLID_DENSITY), nothing)
        return log_density - self.config.log_density_shift, place

    def radiance(self, geo: Tensor, basis: Tensor) -> Tensor:
        raise AssertionError("an analytic scene is shaded by direction, not by its harmonics")

    def block2(self, geo: Tensor, directions: Tensor) -> Tensor:
        radiance: Tensor = self.scene.shade(geo, directions)
        return radiance
