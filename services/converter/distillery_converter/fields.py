"""The two graphs of a radiance field: block 1 from positions, block 2 from its feature and directions.

    block1: positions (batch, 3), scene units              -> (batch, 1 + F): log-density, then the feature
    block2: geo (batch, F), directions (batch, 3), length 1 -> radiance (batch, channels)

Marching and compositing stay outside: a caller that knows where the scene is empty asks for far fewer points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import RadianceField
from distill_core.radiance.scenes.scene import load_scene
from distillery_converter.calibration import Arrays
from distillery_converter.graph import SEED, Graph
from distillery_converter.graphs import noise
from distillery_converter.precision import half_field
from distillery_converter.targets import Target

POINTS = 512  # of a calibration batch: points cost little


class Block1Graph(nn.Module):
    """Log-density and feature as one tensor."""

    def __init__(self, field: RadianceField) -> None:
        super().__init__()
        self.field = field

    def forward(self, positions: Tensor) -> Tensor:
        log_density, geo = self.field.block1(positions)
        return torch.cat([log_density[:, None], geo], -1)


class Block2Graph(nn.Module):
    """Radiance."""

    def __init__(self, field: RadianceField) -> None:
        super().__init__()
        self.field = field

    def forward(self, geo: Tensor, directions: Tensor) -> Tensor:
        return self.field.block2(geo, directions)


def field_graphs(folder: Path, goal: Target) -> list[Graph]:
    """Both blocks of the field in `folder`.

    Raises:
        ConfigError: a target other than ONNX. ArtifactError: a field without weights, or a damaged folder.
    """
    if goal.runtime != "onnx":
        raise ConfigError(
            f"a radiance field is not converted to {goal.name}: an engine is built for batches of up to "
            "32 pictures, and a field is asked for thousands of points at a time; choose onnx-fp32, onnx-fp16 "
            "or onnx-int8",
            field="target",
        )
    field: Any = load_scene(folder).field
    if next(field.parameters(), None) is None:
        raise ArtifactError("this field is a formula without weights; there is nothing to convert")

    def positions(batch: int, seed: int = SEED) -> Arrays:
        return {"positions": points(batch, field.bound, seed)}

    def features(batch: int, seed: int = SEED) -> Arrays:
        with torch.inference_mode():
            geo = field.block1(torch.from_numpy(points(batch, field.bound, seed))).geo
        directions = noise(batch, (3,), draw=8, seed=seed)
        unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        return {"geo": geo.numpy(), "directions": unit}

    return [
        Graph(
            "block1",
            Block1Graph(field),
            ("log_density_geo",),
            positions,
            lambda seed: [positions(POINTS, seed)],
            halved=half_field,
        ),
        Graph(
            "block2",
            Block2Graph(field),
            ("radiance",),
            features,
            lambda seed: [features(POINTS, seed)],
            halved=half_field,
        ),
    ]


def points(batch: int, bound: float, seed: int = SEED) -> np.ndarray:
    """Fixed positions (batch, 3) float32, most of them in the box [-bound, bound]^3."""
    return 0.55 * bound * noise(batch, (3,), draw=7, seed=seed)
