"""Messages of both clients: options to messages, messages to NumPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from PIL import Image

from distill_core.errors import ConfigError, nearest
from distillery.v1 import common_pb2, sampler_pb2
from distillery_sampler.engine.image_formats import decode, encode
from distillery_sampler.v1.wire import FORMATS, array_from, array_to, tensor_from

OnSummary = Callable[[sampler_pb2.GenerateSummary], None]
FLOATS = ("depth", "opacity", "normal")  # of a view, beside its colours
_LISTS = ("class_labels", "prompts", "negative_prompts", "seeds")


class GenerateOptions(TypedDict, total=False):
    """Options of a request for pictures; lists that are given must be equally long, one entry an image."""

    class_labels: Iterable[int]
    prompts: Iterable[str]
    negative_prompts: Iterable[str]  # one for all, or one an image
    negative_scale: float | None
    count: int | None
    seed: int  # image i draws its noise from (seed, i)
    seeds: Iterable[int]  # instead: image i draws its noise from (seeds[i], 0); 0 to 2**63 - 1
    num_steps: int | None  # None: the model's own
    guidance: float | None  # None: the model's own; 1 is off
    image_format: str  # RAW_U8, PNG, JPEG or WEBP: how pictures travel; only JPEG changes them
    with_tensor: bool  # also the float32 pictures; in `call_generate`'s answer
    bulk: bool  # wait while others' interactive requests wait
    image: Any  # begin from this picture: uint8 (H, W, C), or PNG, JPEG or WebP bytes
    mask: Any  # a picture too, or bool (H, W): white is made anew, black stays
    strength: float | None  # share of the steps, above 0 to 1
    upscale: bool  # `image` is a half, a third … of the model's size


class ViewOptions(TypedDict, total=False):
    """Options of a request for views."""

    width: int  # pixels, 256 if it is left out
    height: int
    fov_degrees: float | None  # horizontal; None: the scene's
    intrinsics: Sequence[float] | None  # fx, fy, cx, cy in pixels; with a pose
    background: Sequence[float]  # 3 numbers in [0, 1]; none: the scene's
    outputs: Iterable[str]  # rgb, depth, opacity, normal
    image_format: str
    distortion: Sequence[float]  # k1 k2 k3 k4 p1 p2; with a pose
    fisheye: bool
    bulk: bool


class SeenView(NamedTuple):
    """A rendered view: `rgb` uint8 (H, W, 3); float32 if asked for: `depth`, `opacity` (H, W), `normal` (H, W, 3)."""

    rgb: np.ndarray
    depth: np.ndarray | None
    opacity: np.ndarray | None
    normal: np.ndarray | None = None


def cut_prompts(summary: sampler_pb2.GenerateSummary) -> str | None:
    """The sentence for prompts that are longer than the model reads; None where there are none."""
    if not summary.cut_prompts:
        return None
    which = ", ".join(str(index) for index in summary.cut_prompts[:10])
    more = " …" if len(summary.cut_prompts) > 10 else ""
    return (
        f"{len(summary.cut_prompts)} of {summary.count} pictures have a prompt of more than the "
        f"{summary.prompt_tokens} tokens that {summary.model} reads, and its end was left out: {which}{more}"
    )


def warn_of_cut_prompts(summary: sampler_pb2.GenerateSummary) -> None:
    """A `UserWarning` with the sentence."""
    warning = cut_prompts(summary)
    if warning is not None:
        warnings.warn(warning, stacklevel=3)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """A picture uint8 (H, W, C), C 1, 3 or 4, as a PIL image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def generate_request(model: str, **options: Unpack[GenerateOptions]) -> sampler_pb2.GenerateRequest:
    """The message of a Generate; pictures travel as PNG unless `image_format` says otherwise.

    Raises:
        ConfigError: an option that is not known, or a value that the message cannot hold, e.g. a negative seed.
    """
    values: dict[str, Any] = dict(_known(options, GenerateOptions))
    bulk, image_format = values.pop("bulk", False), values.pop("image_format", "PNG")
    picture = {name: values.pop(name, None) for name in ("image", "mask", "strength", "upscale")}
    for name in _LISTS:
        if isinstance(values.get(name), str):
            raise ConfigError(f"{name} is one text; give a list of texts, one an image", field=name)
    try:
        lists: dict[str, Any] = {name: list(values.pop(name)) for name in _LISTS if name in values}
        return sampler_pb2.GenerateRequest(
            model=model,
            image_format=_format(image_format),
            priority=_priority(bulk),
            image=_image_input(**picture),
            **lists,
            **values,
        )
    except UnicodeEncodeError as error:
        raise ConfigError(f"{error.object[:80]!r} is not text in UTF-8; give it as such") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the request holds a value that is not allowed: {error}; seeds are 0 to 2**63 - 1, "
            "class labels, count and num_steps whole numbers"
        ) from None


def raw_request(model: str, options: GenerateOptions) -> sampler_pb2.GenerateRequest:
    """The message for pictures that are decoded at once: raw pixels unless the options say otherwise."""
    chosen: GenerateOptions = {"image_format": "RAW_U8", **options}
    return generate_request(model, **chosen)


def view_options(**options: Unpack[ViewOptions]) -> sampler_pb2.ViewOptions:
    """The message that says how views are made.

    Raises:
        ConfigError: an option that is not known, or a value that the message cannot hold.
    """
    values: dict[str, Any] = {"width": 256, "height": 256, **_known(options, ViewOptions)}
    bulk, image_format = values.pop("bulk", False), values.pop("image_format", "PNG")
    pinhole, outputs = values.pop("intrinsics", None), values.pop("outputs", ("rgb",))
    distortion, fisheye = list(values.pop("distortion", ())), values.pop("fisheye", False)
    if pinhole is not None and len(pinhole) != 4:
        raise ConfigError(f"intrinsics are 4 numbers fx, fy, cx, cy, not {len(pinhole)}", field="intrinsics")
    try:
        return sampler_pb2.ViewOptions(
            intrinsics=sampler_pb2.Intrinsics(**dict(zip(("fx", "fy", "cx", "cy"), pinhole)))
            if pinhole is not None
            else None,
            lens=sampler_pb2.Lens(distortion=distortion, fisheye=fisheye) if distortion or fisheye else None,
            outputs=[_output(name) for name in outputs],
            image_format=_format(image_format),
            priority=_priority(bulk),
            background=list(values.pop("background", ())),
            **values,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the request holds a value that is not allowed: {error}") from None


def _known(options: Mapping[str, Any], kind: type) -> Mapping[str, Any]:
    known = kind.__annotations__
    for name in options:
        if name not in known:
            raise ConfigError(f"option {name!r} is not known{nearest(name, known)}", field=name)
    return options


def _format(name: str) -> str:
    """The enum's value by name, as a message takes it."""
    if name not in FORMATS.values():
        raise ConfigError(
            f"image_format {name!r} is not known; known: {', '.join(sorted(set(FORMATS.values())))}",
            field="image_format",
        )
    return f"IMAGE_FORMAT_{name}"


def _priority(bulk: bool) -> sampler_pb2.Priority:
    return sampler_pb2.PRIORITY_BULK if bulk else sampler_pb2.PRIORITY_INTERACTIVE


def _output(name: str) -> str:
    if name not in ("rgb", *FLOATS):
        raise ConfigError(f"output {name!r} is not known; known: rgb, {', '.join(FLOATS)}", field="outputs")
    return f"RENDER_OUTPUT_{name.upper()}"


def _image_input(
    image: Any, mask: Any, strength: float | None, upscale: bool | None
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


def orbit(azimuth: float, elevation: float, radius: float | None) -> sampler_pb2.Orbit:
    """A camera on a sphere around the scene; degrees, and scene units or None for the scene's own distance."""
    return sampler_pb2.Orbit(azimuth_degrees=azimuth, elevation_degrees=elevation, radius=radius)


def render_request(
    model: str, camera: sampler_pb2.Orbit, pose: Any, options: ViewOptions
) -> sampler_pb2.RenderRequest:
    """The message of a Render, at `pose` (4, 4) if it is not None."""
    request = sampler_pb2.RenderRequest(model=model, options=view_options(**options))
    if pose is None:
        request.orbit.CopyFrom(camera)
    else:
        request.pose.CopyFrom(_pose(pose))
    return request


def path_request(
    model: str, start: sampler_pb2.OrbitPath, poses: Iterable[Any] | None, options: ViewOptions
) -> sampler_pb2.RenderPathRequest:
    """The message of a RenderPath, along `poses` if they are not None."""
    request = sampler_pb2.RenderPathRequest(model=model, options=view_options(**options))
    if poses is None:
        request.orbit.CopyFrom(start)
    else:
        request.poses.CopyFrom(sampler_pb2.PosePath(poses=[_pose(pose) for pose in poses]))
    return request


def progressive_request(
    model: str, camera: sampler_pb2.Orbit, pose: Any, options: ViewOptions
) -> sampler_pb2.RenderPathRequest:
    """The message of a RenderPath of one view, in regions."""
    start = sampler_pb2.OrbitPath(count=1, start=camera)
    request = path_request(model, start, None if pose is None else [pose], options)
    request.options.progressive = True
    return request


def _pose(pose: Any) -> sampler_pb2.Pose:
    return sampler_pb2.Pose(matrix=np.asarray(pose, dtype=np.float32).ravel())


def predict_request(
    model: str, function: str, arrays: Mapping[str, Any], *, bulk: bool = False
) -> sampler_pb2.PredictRequest:
    """The message of a Predict.

    Raises:
        ConfigError: an array of values that no message holds.
    """
    return sampler_pb2.PredictRequest(
        model=model,
        function=function,
        inputs={name: array_to(values, name) for name, values in arrays.items()},
        priority=_priority(bulk),
    )


def outputs_of(reply: sampler_pb2.PredictResponse) -> dict[str, np.ndarray]:
    """The arrays of an answer, by name; texts as arrays of objects (str)."""
    return {name: array_from(tensor, name) for name, tensor in reply.outputs.items()}


def picture_from(image: common_pb2.Image) -> np.ndarray:
    """A message's picture as uint8 (H, W, C)."""
    return decode(image.data, FORMATS[image.format], (image.height, image.width, image.channels))


def seen(view: sampler_pb2.View) -> SeenView:
    """A message's view."""
    rgb = picture_from(view.rgb) if view.HasField("rgb") else np.empty((0, 0, 3), np.uint8)
    floats = (tensor_from(getattr(view, name)) if view.HasField(name) else None for name in FLOATS)
    return SeenView(rgb, *floats)


def improved(shown: SeenView | None, view: sampler_pb2.View, options: sampler_pb2.ViewOptions) -> SeenView:
    """View with one more region of it; the first one covers the whole view."""
    new_parts, region = seen(view), view.region

    def enlarged(part: np.ndarray | None) -> np.ndarray | None:
        if part is None:
            return None
        whole = part.repeat(region.factor, axis=0).repeat(region.factor, axis=1)
        return whole[: options.height, : options.width]

    if shown is None:
        return SeenView(*(enlarged(part) for part in new_parts))  # type: ignore[arg-type]
    parts = []
    for old, new in zip(shown, new_parts, strict=True):
        whole = None if old is None else old.copy()  # what was yielded stays as it was
        if whole is not None and whole.size:
            whole[region.top : region.top + region.rows] = new
        parts.append(whole)
    return SeenView(*parts)  # type: ignore[arg-type]
