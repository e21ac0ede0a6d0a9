"""Radiance fields: density and colour at a point, looked at by marching rays."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.artifacts import SceneSpec
from distill_core.data import Source
from distill_core.data.posed import SceneSource
from distill_core.errors import ConfigError
from distill_core.files.paths import user_path
from distill_core.kinds.base import Kind, Models
from distill_core.kinds.field.card import Evaluate
from distill_core.kinds.loading import config_kind
from distill_core.metrics.lpips import LPIPS
from distill_core.networks.fake_tensors import real_tensors
from distill_core.probe import SEED, ImageProbe
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.radiance.scenes.scene import Scene, load_scene, parity_view, render
from distill_core.recipe.tables import EvaluateConfig

VIEWS = 4  # of a preview
ELEVATION, SIDE = 20.0, 96  # of an orbit's views, where the data has none: degrees, pixels


class SceneKind(Kind):
    """Base of what is looked at through a camera."""

    def recognise(self, folder: Path) -> bool:
        return config_kind(folder) == self.name

    @abc.abstractmethod
    def picture(self, model: Any, camera: Camera) -> Tensor:
        """What `camera` sees, (H, W, 3) in [0, 1]."""

    def evaluator(self, model: Any, source: Source, config: EvaluateConfig, models: Models) -> None:
        assert isinstance(config, Evaluate)
        if config.lpips is not None:
            LPIPS(user_path(config.lpips))  # a mistake in it is said before the training

    def preview(self, model: Any, source: Source, seed: int, references: Mapping[str, Any]) -> Tensor | None:
        seen = [model, *(other for other in references.values() if getattr(other, "kind", "") == self.name)]
        views = [
            self.picture(one, camera).cpu() for one in seen for camera in preview_cameras(model.spec, source)
        ]
        return torch.stack(views).permute(0, 3, 1, 2) * 2 - 1


def preview_cameras(spec: SceneSpec, source: Source) -> list[Camera]:
    """Cameras of a preview: held-out views of the data, or views all around."""
    if isinstance(source, SceneSource):
        return [source.test.camera(index) for index in range(min(VIEWS, len(source.test)))]
    turns = [360.0 * index / VIEWS for index in range(VIEWS)]
    fov = spec.fov_degrees
    return [
        orbit_camera(turn, ELEVATION, spec.radius, fov_degrees=fov, width=SIDE, height=SIDE) for turn in turns
    ]


class FieldKind(SceneKind):
    """Fields with the cells that they occupy."""

    name = "field"

    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> Scene:
        with real_tensors():  # in a plan too: small beside what it is trained on
            return load_scene(folder, device=device)

    def picture(self, model: Scene, camera: Camera) -> Tensor:
        return render(model, camera).rgb

    def as_saved(self, model: Scene, folder: Path) -> Scene:
        return self.load(folder)

    def image_probe(self, model: Scene) -> ImageProbe | None:
        try:
            seen = render(model, parity_view(model.spec))
        except ConfigError:  # latents, no colours
            return None
        return ImageProbe.of(seen.rgb.permute(2, 0, 1).float().cpu().numpy(), seed=SEED)


KIND = FieldKind()
