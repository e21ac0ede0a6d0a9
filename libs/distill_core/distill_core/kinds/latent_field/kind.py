"""Fields of latents, whose renderings a picture decoder reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distill_core.kinds.base import Models
from distill_core.kinds.field.kind import SceneKind
from distill_core.radiance.cameras.camera import Camera
from distill_core.radiance.scenes.latent import LatentScene, load_latent_scene


class LatentFieldKind(SceneKind):
    """Fields in the latent space of an autoencoder."""

    name = "latent_field"

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> LatentScene:
        return load_latent_scene(folder, device=device)

    def picture(self, model: LatentScene, camera: Camera) -> Tensor:
        return model.picture(camera)


KIND = LatentFieldKind()
