"""Scenes of shape, materials and light, which can be lit anew."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distill_core.kinds.base import Models
from distill_core.kinds.field.kind import SceneKind
from distill_core.radiance.cameras.camera import Camera
from distill_core.radiance.scenes.relightable import RelightableScene, load_relightable


class RelightableKind(SceneKind):
    """Fields with materials under an environment light."""

    name = "relightable"

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> RelightableScene:
        return load_relightable(folder, device=device)

    def picture(self, model: RelightableScene, camera: Camera) -> Tensor:
        return model.render(camera)[0]


KIND = RelightableKind()
