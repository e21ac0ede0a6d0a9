"""Scenes of Gaussians, looked at by splatting."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distill_core.kinds.base import Models
from distill_core.kinds.field.kind import SceneKind
from distill_core.radiance.cameras.camera import Camera
from distill_core.radiance.scenes.gaussians import GaussianScene, load_gaussians, render_gaussians


class GaussiansKind(SceneKind):
    """Sets of Gaussians with opacity and spherical harmonics."""

    name = "gaussians"

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> GaussianScene:
        return load_gaussians(folder, device=device)

    def picture(self, model: GaussianScene, camera: Camera) -> Tensor:
        return render_gaussians(model, camera).rgb


KIND = GaussiansKind()
