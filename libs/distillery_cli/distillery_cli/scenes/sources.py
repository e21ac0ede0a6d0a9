"""Scenes to look at, wherever they are: in a running sampler, in the store, or in a folder."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_core.errors import ArtifactError, ConfigError, NotFound, Unavailable
from distill_core.kinds import find_card

if TYPE_CHECKING:
    import numpy as np

    from distill_core.artifacts import SceneSpec
    from distill_core.radiance.cameras.camera import Camera
    from distillery.v1 import models_pb2
    from distillery_sampler.client import SamplerClient

Colour = tuple[float, float, float]
OUTPUTS = ("rgb", "depth", "opacity", "normal")
STAGES = (8, 4, 2, 1)  # pixels of a view rendered here, each so many times as large


class Seen(NamedTuple):
    """`rgb` uint8 (H, W, 3); float32 `depth`, `opacity` (H, W) and `normal` (H, W, 3) where they were asked for."""

    rgb: np.ndarray
    depth: np.ndarray | None
    opacity: np.ndarray | None
    normal: np.ndarray | None


class RenderableScene(abc.ABC):
    """A scene and where it is usually seen from."""

    spec: SceneSpec

    @abc.abstractmethod
    def stages(
        self,
        camera: Camera,
        outputs: tuple[str, ...],
        background: Colour | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Seen]:
        """The view, better each time, the last one whole; ends early soon after `should_stop()` turns true."""

    @abc.abstractmethod
    def render(
        self, camera: Camera, outputs: tuple[str, ...] = ("rgb",), background: Colour | None = None
    ) -> Seen:
        """The whole view."""


class ServedScene(RenderableScene):
    """A model of a running sampler."""

    def __init__(self, client: SamplerClient, name: str, spec: SceneSpec) -> None:
        self._client, self._name, self.spec = client, name, spec

    def stages(
        self,
        camera: Camera,
        outputs: tuple[str, ...],
        background: Colour | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Seen]:
        options = _options(camera, outputs, background)
        for seen in self._client.render_progressive(self._name, **options):
            yield Seen(*seen)
            if should_stop():
                return  # closes the call: the server stops at its next tile

    def render(
        self, camera: Camera, outputs: tuple[str, ...] = ("rgb",), background: Colour | None = None
    ) -> Seen:
        return Seen(*self._client.render(self._name, **_options(camera, outputs, background)))


class LocalScene(RenderableScene):
    """A field or Gaussians in this process."""

    def __init__(self, scene: Any) -> None:
        from distill_core.radiance.scenes.gaussians import GaussianScene
        from distill_core.radiance.scenes.scene import Scene, refined

        if not isinstance(scene, Scene | GaussianScene):
            raise ArtifactError(
                "only scenes, fields and Gaussians, can be looked at; `distillery models` shows them"
            )
        self._is_field, self.spec = isinstance(scene, Scene), scene.spec
        self._scene: Any = refined(scene) if isinstance(scene, Scene) else scene

    def stages(
        self,
        camera: Camera,
        outputs: tuple[str, ...],
        background: Colour | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Seen]:
        from distill_core.radiance.scenes.scene import RenderStopped

        for factor in STAGES:
            try:
                yield self._seen(camera.reduced(factor), outputs, background, should_stop)
            except RenderStopped:
                return

    def render(
        self, camera: Camera, outputs: tuple[str, ...] = ("rgb",), background: Colour | None = None
    ) -> Seen:
        return self._seen(camera, outputs, background, lambda: False)

    def _seen(
        self,
        camera: Camera,
        outputs: tuple[str, ...],
        background: Colour | None,
        should_stop: Callable[[], bool],
    ) -> Seen:
        from distill_core.radiance.scenes.gaussians import render_gaussians
        from distill_core.radiance.scenes.scene import render

        if self._is_field:
            found: Any = render(
                self._scene,
                camera,
                background=background,
                normals="normal" in outputs,
                should_stop=should_stop,
            )
        elif "normal" in outputs:
            raise ConfigError("Gaussians have no normals; ask for rgb, depth or opacity", field="outputs")
        else:
            found = render_gaussians(self._scene, camera, background=background)
        rgb = (found.rgb * 255).round().byte().cpu().numpy()
        rest = (getattr(found, name).cpu().numpy() if name in outputs else None for name in OUTPUTS[1:])
        return Seen(rgb, *rest)


def open_scene(ref: str, store: str | None = None) -> RenderableScene:
    """The scene of a folder, of a running sampler's model, or, without a sampler, of a reference of the store.

    Where `store` names one, no sampler is asked: it may serve another.

    Raises:
        NotFound, ArtifactError: no such scene, a damaged one, or a model that is none.
    """
    if store is not None or Path(ref).is_dir():
        return LocalScene(_load(ref, store))
    from distillery_cli.models.generate import client

    sampler = client()
    try:
        model = sampler.model(ref)
    except Unavailable as error:
        sampler.close()
        try:
            return LocalScene(_load(ref))
        except NotFound as missing:
            raise NotFound(f"{missing}; and no sampler could be asked: {error}") from None
    if not model.HasField("scene"):
        raise ConfigError(f"{ref} is of kind {model.kind}, and only scenes can be looked at", field="scene")
    rendered = find_card(model.kind).SERVED == "render"
    return ServedScene(sampler, ref, _spec(model.scene)) if rendered else LocalScene(_load(ref))


def _load(ref: str, store: str | None = None) -> Any:
    from distill_core import api
    from distillery_cli.training.train import local_context

    return api.load(ref, local_context(store))


def _spec(scene: models_pb2.SceneInfo) -> SceneSpec:
    from distill_core.artifacts import SceneSpec

    red, green, blue = scene.background
    return SceneSpec(
        field=scene.field,
        bound=scene.bound,
        radius=scene.radius,
        fov_degrees=scene.fov_degrees,
        background=(red, green, blue),
        transform=tuple(scene.transform) or None,
    )


def _options(camera: Camera, outputs: tuple[str, ...], background: Colour | None) -> dict[str, Any]:
    """Options of the sampler's client."""
    return {
        "pose": camera.c2w.numpy(),
        "intrinsics": (camera.fx, camera.fy, camera.cx, camera.cy),
        "width": camera.width,
        "height": camera.height,
        "distortion": camera.distortion,
        "fisheye": camera.fisheye,
        "outputs": outputs,
        "background": background or (),
    }


def picture_of(seen: Seen, output: str, background: Colour) -> np.ndarray:
    """An output as a picture, uint8 (H, W, 3): near is bright in depth; normals x, y, z are red, green, blue."""
    import numpy as np

    if output == "rgb":
        return seen.rgb
    assert seen.opacity is not None
    opacity = seen.opacity[..., None]
    if output == "opacity":
        grey: np.ndarray = opacity.repeat(3, axis=-1)
    elif output == "normal":
        assert seen.normal is not None
        grey = (seen.normal + opacity) / 2 + (1 - opacity) * np.asarray(background, np.float32)
    else:
        assert seen.depth is not None
        distance = seen.depth[..., None] / np.maximum(opacity, 1e-6)
        solid = opacity > 0.5
        low, high = (distance[solid].min(), distance[solid].max()) if solid.any() else (0.0, 1.0)
        near = 1 - 0.9 * np.clip((distance - low) / max(high - low, 1e-6), 0, 1)
        grey = (near * opacity + (1 - opacity) * np.asarray(background, np.float32)) * np.ones(3, np.float32)
    pixels: np.ndarray = np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    return pixels


def needed_outputs(output: str) -> tuple[str, ...]:
    """Outputs that must be rendered to show one."""
    return ("rgb",) if output == "rgb" else ("opacity",) if output == "opacity" else (output, "opacity")


def vertical_fov(camera: Camera) -> float:
    """Radians that a picture spans from its lower to its upper edge."""
    return 2 * math.atan(0.5 * camera.height / camera.fy)
