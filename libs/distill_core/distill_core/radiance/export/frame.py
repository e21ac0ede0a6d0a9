"""Back from the training box into the frame of the input: the inverse of `SceneSpec.transform`, a similarity.

p_input = scale rotation p + shift
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.artifacts import SceneSpec
from distill_core.errors import ArtifactError


class Similarity(NamedTuple):
    """p -> scale rotation p + shift, in float64."""

    scale: float
    rotation: Tensor  # (3, 3)
    shift: Tensor  # (3,)

    def points(self, positions: Tensor) -> Tensor:
        """Positions (M, 3), moved."""
        moved = self.scale * positions.double() @ self.rotation.T + self.shift
        return moved.to(positions.dtype)

    def pose(self, c2w: Tensor) -> Tensor:
        """A camera-to-world matrix (4, 4), moved: axes are turned, only the centre is scaled. In float64."""
        out = torch.eye(4, dtype=torch.float64)
        out[:3, :3] = self.rotation @ c2w[:3, :3].double()
        out[:3, 3] = self.scale * self.rotation @ c2w[:3, 3].double() + self.shift
        return out


def similarity(matrix: Tensor) -> Similarity:
    """The parts of a 4x4 similarity.

    Raises:
        ArtifactError: it mirrors, shears, or scales axes differently.
    """
    linear = matrix[:3, :3].double()
    scale = float(torch.linalg.det(linear).clamp_min(0)) ** (1 / 3)
    rotation = linear / max(scale, 1e-30)
    if not torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-4):
        raise ArtifactError(
            "the scene's transform is no rotation with one scale; train it on its capture again"
        )
    return Similarity(scale, rotation, matrix[:3, 3].double())


def from_input(spec: SceneSpec) -> Similarity:
    """From the input's frame into the training box."""
    if spec.transform is None:
        return Similarity(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    return similarity(torch.tensor(spec.transform, dtype=torch.float64).reshape(4, 4))


def to_input(spec: SceneSpec) -> Similarity:
    """From the training box into the input's frame."""
    scale, rotation, shift = from_input(spec)
    return Similarity(1 / scale, rotation.T, -(rotation.T @ shift) / scale)
