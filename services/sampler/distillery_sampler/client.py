"""A synchronous client of the sampler.

with SamplerClient("127.0.0.1:50052") as sampler:
digits = sampler.generate("digits", class_labels=range(10), seed=1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import numpy as np

from distill_core.errors import ConfigError
from distill_service.channels import channel
from distill_service.status import error_from_call
from distillery.v1 import (
    common_pb2,
    models_pb2,
    models_pb2_grpc,
    sampler_pb2,
    sampler_pb2_grpc,
)
from distillery_sampler.images import decode, encode
from distillery_sampler.messages import FORMATS, tensor_from

DEFAULT_TIMEOUT_S = 60.0
FLOATS = ("depth", "opacity", "normal")  # of a view, beside its colours


class SeenView(NamedTuple):
    """A rendered view: `rgb` uint8 (H, W, 3); float32 if asked for: `depth`, `opacity` (H, W), `normal` (H, W, 3)."""

    rgb: np.ndarray
    depth: np.ndarray | None
    opacity: np.ndarray | None
    normal: np.ndarray | None = None


class SamplerClient:
    """Calls raise the `DistilleryError` that the server raised. Safe to use from several threads."""

    def __init__(
        self,
        address: str = "127.0.0.1:50052",
        *,
        token: str | None = None,
        ca: Path | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._channel = channel(address, token=token, ca=ca)
        self._sampler = sampler_pb2_grpc.SamplerServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelsServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def generate(self, model: str, **options: Any) -> list[np.ndarray]:
        """Pictures uint8 (H, W, C), in the order of the conditions.

        Options: class_labels, prompts, negative_prompts (one, or one an image), negative_scale, count, seed, seeds,
        num_steps, guidance, bulk, image_format ("RAW_U8", "PNG", "JPEG", "WEBP"); to begin from a picture: image and
        mask (uint8 (H, W, C) arrays or encoded bytes), strength, upscale.
        """
        request = generate_request(model, **{"image_format": "RAW_U8", **options})
        return [picture_from(image) for image in self.call_generate(request).images]

    def call_generate(self, request: sampler_pb2.GenerateRequest) -> sampler_pb2.GenerateResponse:
        """Generate with the messages themselves: encoded bytes, the float tensor, the summary."""
        with self._errors():
            return self._sampler.Generate(request, timeout=self.timeout_s)

    def generate_stream(self, model: str, **options: Any) -> Iterator[tuple[int, np.ndarray]]:
        """(index, picture) pairs, each as soon as it is ready, with the options of `generate`."""
        request = generate_request(model, **{"image_format": "RAW_U8", **options})
        with self._errors():
            stream = sampler_pb2.GenerateStreamRequest(request=request)
            for reply in self._sampler.GenerateStream(stream, timeout=self.timeout_s):
                if reply.HasField("image"):
                    yield reply.image.index, picture_from(reply.image)

    def render(
        self,
        model: str,
        *,
        azimuth: float = 0.0,
        elevation: float = 30.0,
        radius: float | None = None,
        pose: Any = None,
        **options: Any,
    ) -> SeenView:
        """One view of a scene, from a camera on an orbit (degrees) or at a `pose` (4, 4).

        Options: width, height, fov_degrees, background, outputs ("rgb", "depth", "opacity", "normal"); with a pose
        intrinsics (fx, fy, cx, cy), distortion (k1, k2, k3, k4, p1, p2), fisheye.
        """
        request = sampler_pb2.RenderRequest(model=model, options=view_options(**options))
        if pose is None:
            request.orbit.CopyFrom(_orbit(azimuth, elevation, radius))
        else:
            request.pose.CopyFrom(_pose(pose))
        with self._errors():
            return _seen(self._sampler.Render(request, timeout=self.timeout_s).view)

    def render_path(
        self,
        model: str,
        *,
        count: int = 60,
        elevation: float = 30.0,
        radius: float | None = None,
        degrees: float = 360.0,
        poses: Iterable[Any] | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Iterator[SeenView]:
        """The views of an orbit of `count` cameras, or of `poses`, in order, with the options of `render`."""
        start = sampler_pb2.OrbitPath(count=count, start=_orbit(0.0, elevation, radius), degrees=degrees)
        request = _path(model, start if poses is None else poses, options)
        with self._errors():
            for reply in self._sampler.RenderPath(request, timeout=timeout_s):
                if reply.HasField("view"):
                    yield _seen(reply.view)

    def render_progressive(
        self,
        model: str,
        *,
        azimuth: float = 0.0,
        elevation: float = 30.0,
        radius: float | None = None,
        pose: Any = None,
        **options: Any,
    ) -> Iterator[SeenView]:
        """One view, better each time: a small one enlarged, then with more and more of the tiles of `render`'s.

        The last one is `render`'s, bit for bit unless `image_format` is JPEG. Close the iterator to stop rendering.
        """
        orbit = sampler_pb2.OrbitPath(count=1, start=_orbit(azimuth, elevation, radius))
        request = _path(model, orbit if pose is None else [pose], options)
        request.options.progressive = True
        shown: SeenView | None = None
        with self._errors():
            for reply in self._sampler.RenderPath(request, timeout=self.timeout_s):
                if reply.HasField("view"):
                    shown = _improved(shown, reply.view, request.options)
                    yield shown

    def models(self, *, all_versions: bool = False) -> list[models_pb2.Model]:
        """The models of the sampler's store, and which are loaded."""
        with self._errors():
            request = models_pb2.ListModelsRequest(all_versions=all_versions)
            return list(self._models.ListModels(request, timeout=self.timeout_s).models)

    def model(self, ref: str) -> models_pb2.Model:
        """One version."""
        with self._errors():
            return self._models.GetModel(models_pb2.GetModelRequest(model=ref), timeout=self.timeout_s).model

    def load(self, ref: str) -> models_pb2.Model:
        """Load a version now; needs an admin token where tokens are used."""
        with self._errors():
            return self._models.LoadModel(
                models_pb2.LoadModelRequest(model=ref), timeout=self.timeout_s
            ).model

    def unload(self, ref: str) -> None:
        """Free a version's memory; needs an admin token where tokens are used."""
        with self._errors():
            self._models.UnloadModel(models_pb2.UnloadModelRequest(model=ref), timeout=self.timeout_s)

    def watch_models(self) -> Iterator[models_pb2.Model]:
        """Every model's state, then each change, until the iterator is closed."""
        with self._errors():
            for reply in self._models.WatchModels(models_pb2.WatchModelsRequest()):
                yield reply.model

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise error_from_call(error, self.address) from None


def generate_request(
    model: str,
    *,
    class_labels: Iterable[int] = (),
    prompts: Iterable[str] = (),
    negative_prompts: Iterable[str] = (),
    negative_scale: float | None = None,
    count: int | None = None,
    seed: int = 0,
    seeds: Iterable[int] = (),
    num_steps: int | None = None,
    guidance: float | None = None,
    image_format: str = "PNG",
    with_tensor: bool = False,
    bulk: bool = False,
    image: Any = None,
    mask: Any = None,
    strength: float | None = None,
    upscale: bool = False,
) -> sampler_pb2.GenerateRequest:
    """The message of a Generate.

    Raises:
        ConfigError: a value that the message cannot hold, e.g. a negative seed, or an unknown format.
    """
    if image_format not in FORMATS.values():
        raise ConfigError(
            f"image_format {image_format!r} is not known; known: {', '.join(sorted(set(FORMATS.values())))}",
            field="image_format",
        )
    try:
        return sampler_pb2.GenerateRequest(
            model=model,
            class_labels=list(class_labels),
            prompts=list(prompts),
            negative_prompts=list(negative_prompts),
            negative_scale=negative_scale,
            count=count,
            seed=seed,
            seeds=list(seeds),
            num_steps=num_steps,
            guidance=guidance,
            image_format=common_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{image_format}"),
            with_tensor=with_tensor,
            priority=sampler_pb2.PRIORITY_BULK if bulk else sampler_pb2.PRIORITY_INTERACTIVE,
            image=_image_input(image, mask, strength, upscale),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the request holds a value that is not allowed: {error}; seeds are 0 to 2**63 - 1, "
            "class labels, count and num_steps whole numbers"
        ) from None


def _image_input(
    image: Any, mask: Any, strength: float | None, upscale: bool
) -> sampler_pb2.ImageInput | None:
    if image is None:
        if mask is not None or strength is not None or upscale:
            raise ConfigError("mask, strength and upscale go with an image; give image", field="image")
        return None
    return sampler_pb2.ImageInput(
        image=_bytes(image), mask=b"" if mask is None else _bytes(mask), strength=strength, upscale=upscale
    )


def _bytes(picture: Any) -> bytes:
    """Encoded bytes as they are; an array uint8 (H, W) or (H, W, C), or bool, as PNG."""
    if isinstance(picture, bytes):
        return picture
    pixels = np.asarray(picture)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ConfigError(
            f"a picture of {pixels.dtype} and shape {pixels.shape} cannot be sent; give uint8 (H, W, C), "
            "or PNG, JPEG or WebP bytes",
            field="image",
        )
    return encode(pixels if pixels.ndim == 3 else pixels[..., None], "PNG")


def view_options(
    *,
    width: int = 256,
    height: int = 256,
    fov_degrees: float | None = None,
    intrinsics: Sequence[float] | None = None,
    background: Sequence[float] = (),
    outputs: Iterable[str] = ("rgb",),
    image_format: str = "PNG",
    distortion: Sequence[float] = (),
    fisheye: bool = False,
) -> sampler_pb2.ViewOptions:
    """The message that says how views are made."""
    pinhole = dict(zip(("fx", "fy", "cx", "cy"), intrinsics, strict=True)) if intrinsics else None
    return sampler_pb2.ViewOptions(
        width=width,
        height=height,
        fov_degrees=fov_degrees,
        intrinsics=sampler_pb2.Intrinsics(**pinhole) if pinhole else None,
        background=list(background),
        lens=sampler_pb2.Lens(distortion=list(distortion), fisheye=fisheye)
        if distortion or fisheye
        else None,
        outputs=[_output(name) for name in outputs],
        image_format=common_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{image_format}"),
    )


def _output(name: str) -> sampler_pb2.RenderOutput:
    if name not in ("rgb", *FLOATS):
        raise ConfigError(f"output {name!r} is not known; known: rgb, {', '.join(FLOATS)}", field="outputs")
    return sampler_pb2.RenderOutput.Value(f"RENDER_OUTPUT_{name.upper()}")


def picture_from(image: common_pb2.Image) -> np.ndarray:
    """A message's picture as uint8 (H, W, C)."""
    return decode(image.data, FORMATS[image.format], (image.height, image.width, image.channels))


def _orbit(azimuth: float, elevation: float, radius: float | None) -> sampler_pb2.Orbit:
    return sampler_pb2.Orbit(azimuth_degrees=azimuth, elevation_degrees=elevation, radius=radius)


def _pose(pose: Any) -> sampler_pb2.Pose:
    return sampler_pb2.Pose(matrix=np.asarray(pose, dtype=np.float32).ravel())


def _seen(view: sampler_pb2.View) -> SeenView:
    rgb = picture_from(view.rgb) if view.HasField("rgb") else np.empty((0, 0, 3), np.uint8)
    floats = (tensor_from(getattr(view, name)) if view.HasField(name) else None for name in FLOATS)
    return SeenView(rgb, *floats)


def _path(model: str, path: Any, options: dict[str, Any]) -> sampler_pb2.RenderPathRequest:
    """The message of a RenderPath along an orbit, or along poses."""
    request = sampler_pb2.RenderPathRequest(model=model, options=view_options(**options))
    if isinstance(path, sampler_pb2.OrbitPath):
        request.orbit.CopyFrom(path)
    else:
        request.poses.CopyFrom(sampler_pb2.PosePath(poses=[_pose(pose) for pose in path]))
    return request


def _improved(shown: SeenView | None, view: sampler_pb2.View, options: sampler_pb2.ViewOptions) -> SeenView:
    """What is shown with one more region of it; the first one covers the whole view."""
    seen, region = _seen(view), view.region

    def enlarged(part: np.ndarray | None) -> np.ndarray | None:
        if part is None:
            return None
        whole = part.repeat(region.factor, axis=0).repeat(region.factor, axis=1)
        return whole[: options.height, : options.width]

    if shown is None:
        return SeenView(*(enlarged(part) for part in seen))  # type: ignore[arg-type]
    parts = []
    for old, new in zip(shown, seen, strict=True):
        whole = None if old is None else old.copy()  # what was yielded stays as it was
        if whole is not None and whole.size:
            whole[region.top : region.top + region.rows] = new
        parts.append(whole)
    return SeenView(*parts)  # type: ignore[arg-type]
