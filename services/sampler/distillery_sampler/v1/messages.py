"""Between `distillery.v1` messages and the engine's own dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from google.protobuf.struct_pb2 import Struct

from distill_core.errors import ConfigError
from distill_core.kinds.cards import generator_card, scene_spec
from distill_core.signature import TensorSpec
from distillery.v1 import models_pb2, sampler_pb2
from distillery_sampler.engine.checks import can_guide
from distillery_sampler.engine.image_formats import Format
from distillery_sampler.engine.requests import (
    Call,
    GenerateRequest,
    ImageInput,
    ModelInfo,
    Orbit,
    PredictRequest,
    RenderRequest,
    Summary,
    View,
)
from distillery_sampler.settings import SamplerSettings
from distillery_sampler.v1.wire import FORMATS, array_from, array_to

FULL_TURN = 360.0
PRIORITIES = frozenset(sampler_pb2.Priority.values())


def format_from(value: int) -> Format:
    """The format of an enum value; unspecified is PNG."""
    if value not in FORMATS:
        names = ", ".join(sorted(set(FORMATS.values())))
        raise ConfigError(f"image_format {value} is not known; known: {names}", field="image_format")
    return FORMATS[value]


def is_bulk(priority: int) -> bool:
    """Whether a priority's enum value means "after the interactive ones"."""
    if priority not in PRIORITIES:
        raise ConfigError(f"priority {priority} is not known; known: INTERACTIVE, BULK", field="priority")
    return priority == sampler_pb2.PRIORITY_BULK


def generate_from(message: sampler_pb2.GenerateRequest, call: Call) -> GenerateRequest:
    """The engine's request."""
    return GenerateRequest(
        model=message.model,
        class_labels=tuple(message.class_labels),
        prompts=tuple(message.prompts),
        count=message.count if message.HasField("count") else None,
        seed=message.seed,
        seeds=tuple(message.seeds),
        num_steps=message.num_steps if message.HasField("num_steps") else None,
        guidance=message.guidance if message.HasField("guidance") else None,
        image=_image_input(message.image) if message.HasField("image") else None,
        negative_prompts=tuple(message.negative_prompts),
        negative_scale=message.negative_scale if message.HasField("negative_scale") else None,
        call=call,
    )


def _image_input(message: sampler_pb2.ImageInput) -> ImageInput:
    strength = message.strength if message.HasField("strength") else None
    return ImageInput(message.image, message.mask, strength, message.upscale)


def generate_summary(summary: Summary) -> sampler_pb2.GenerateSummary:
    """Summary of a Generate."""
    return sampler_pb2.GenerateSummary(
        model=summary.model,
        backend=summary.backend,
        count=summary.count,
        num_steps=summary.num_steps,
        guidance=summary.guidance,
        seconds=summary.seconds,
        cut_prompts=summary.cut_prompts,
        prompt_tokens=summary.prompt_tokens,
    )


def predict_from(message: sampler_pb2.PredictRequest, call: Call) -> PredictRequest:
    """The engine's request for a call of a function."""
    inputs = {name: array_from(tensor, f"inputs.{name}") for name, tensor in message.inputs.items()}
    return PredictRequest(message.model, message.function, inputs, call)


def predicted(outputs: Mapping[str, np.ndarray], summary: Summary) -> sampler_pb2.PredictResponse:
    """Outputs of a function, and how that went."""
    return sampler_pb2.PredictResponse(
        outputs={name: array_to(values, name) for name, values in outputs.items()},
        summary=sampler_pb2.PredictSummary(
            model=summary.model, backend=summary.backend, count=summary.count, seconds=summary.seconds
        ),
    )


def render_summary(summary: Summary) -> sampler_pb2.RenderSummary:
    """Summary of a rendering."""
    return sampler_pb2.RenderSummary(
        model=summary.model, backend=summary.backend, count=summary.count, seconds=summary.seconds
    )


def render_from(message: sampler_pb2.RenderRequest, call: Call) -> RenderRequest:
    """The engine's request for one view."""
    if message.WhichOneof("camera") is None:
        raise ConfigError("the request names no camera; give pose or orbit", field="camera")
    options = message.options
    if options.progressive:
        raise ConfigError(
            "progressive is for RenderPath, which a path of one view also takes", field="options.progressive"
        )
    pose = _pose(message.pose) if message.HasField("pose") else None
    orbit = _orbit(message.orbit) if message.HasField("orbit") else None
    return RenderRequest(message.model, (_view(options, pose, orbit),), _normals(options), call=call)


def path_from(message: sampler_pb2.RenderPathRequest, call: Call, limits: SamplerSettings) -> RenderRequest:
    """The engine's request for the views along a path.

    Raises:
        ConfigError: no path, or more views than `limits` allow.
    """
    kind = message.WhichOneof("path")
    if kind is None:
        raise ConfigError("the request names no path; give orbit or poses", field="path")
    count = message.orbit.count if kind == "orbit" else len(message.poses.poses)
    if not 1 <= count <= limits.max_views:
        raise ConfigError(
            f"a path of {count} views is not allowed: ask for 1 to {limits.max_views}", field=kind
        )
    if kind == "poses":
        views = tuple(_view(message.options, _pose(pose), None) for pose in message.poses.poses)
    else:
        views = tuple(_view(message.options, None, orbit) for orbit in _orbits(message.orbit, count))
    options = message.options
    return RenderRequest(message.model, views, _normals(options), options.progressive, call)


def outputs_from(options: sampler_pb2.ViewOptions) -> frozenset[int]:
    """The outputs asked for; none is RGB."""
    known = set(sampler_pb2.RenderOutput.values()) - {sampler_pb2.RENDER_OUTPUT_UNSPECIFIED}
    outputs = frozenset(options.outputs) or frozenset({sampler_pb2.RENDER_OUTPUT_RGB})
    if not outputs <= known:
        raise ConfigError("options.outputs may hold RGB, DEPTH, OPACITY and NORMAL", field="options.outputs")
    return outputs


def _normals(options: sampler_pb2.ViewOptions) -> bool:
    return sampler_pb2.RENDER_OUTPUT_NORMAL in options.outputs


def _orbits(path: sampler_pb2.OrbitPath, count: int) -> list[Orbit]:
    start = _orbit(path.start)
    turn = path.degrees if path.HasField("degrees") else FULL_TURN
    return [
        Orbit(start.azimuth + turn * index / count, start.elevation, start.radius, start.target)
        for index in range(count)
    ]


def _orbit(message: sampler_pb2.Orbit) -> Orbit:
    radius = message.radius if message.HasField("radius") else None
    if radius is not None and not 0 < radius < float("inf"):
        raise ConfigError(
            f"radius = {radius:g} is not allowed: give a positive distance", field="orbit.radius"
        )
    target = _three(message.target, "orbit.target") or (0.0, 0.0, 0.0)
    return Orbit(message.azimuth_degrees, message.elevation_degrees, radius, target)


def _pose(message: sampler_pb2.Pose) -> np.ndarray:
    if len(message.matrix) != 16:
        raise ConfigError(f"a pose of {len(message.matrix)} numbers is no 4 x 4 matrix", field="pose.matrix")
    return np.array(message.matrix, dtype=np.float32).reshape(4, 4)


def _three(values: Sequence[float], field: str) -> tuple[float, float, float] | None:
    if len(values) not in (0, 3):
        raise ConfigError(f"{field} has {len(values)} numbers; give 3, or none for the default", field=field)
    return (values[0], values[1], values[2]) if values else None


def _view(options: sampler_pb2.ViewOptions, pose: np.ndarray | None, orbit: Orbit | None) -> View:
    pinhole = options.intrinsics
    given = options.HasField("intrinsics")
    return View(
        width=options.width,
        height=options.height,
        pose=pose,
        orbit=orbit,
        intrinsics=(pinhole.fx, pinhole.fy, pinhole.cx, pinhole.cy) if given else None,
        fov_degrees=options.fov_degrees if options.HasField("fov_degrees") else None,
        background=_three(options.background, "options.background"),
        distortion=_distortion(options),
        fisheye=options.lens.fisheye,
    )


def _distortion(options: sampler_pb2.ViewOptions) -> tuple[float, ...]:
    values = tuple(options.lens.distortion)
    if len(values) not in (0, 6):
        raise ConfigError(
            f"a lens of {len(values)} coefficients is not allowed; give k1 k2 k3 k4 p1 p2, or none",
            field="options.lens.distortion",
        )
    return values or ((0.0,) * 6 if options.lens.fisheye else ())


def model_to(info: ModelInfo) -> models_pb2.Model:
    """A version as a message."""
    manifest = info.manifest
    numbers = {k: float(v) for k, v in manifest.metrics.items() if not isinstance(v, str)}
    return models_pb2.Model(
        name=manifest.name,
        version=manifest.version,
        aliases=info.aliases,
        kind=manifest.kind,
        state=f"MODEL_STATE_{info.state.upper()}",
        message=info.message,
        backend=info.backend,
        title=manifest.title,
        method=manifest.method,
        paper=manifest.paper,
        licence=manifest.licence,
        created=manifest.created,
        parents=manifest.parents,
        exports=sorted(manifest.exports),
        metrics=numbers,
        generator=_generator(info),
        scene=_scene(info),
        max_batch=info.max_batch,
        instances=info.instances,
        threads=info.threads,
        memory_bytes=info.memory,
        functions=_functions(info),
        card=_card(info),
    )


def _functions(info: ModelInfo) -> list[models_pb2.FunctionInfo]:
    return [
        models_pb2.FunctionInfo(
            name=name,
            inputs=[_tensor_info(key, spec) for key, spec in function.inputs.items()],
            outputs=[_tensor_info(key, spec) for key, spec in function.outputs.items()],
            batched=function.batched,
        )
        for name, function in info.manifest.signature.functions.items()
    ]


def _tensor_info(name: str, spec: TensorSpec) -> models_pb2.TensorInfo:
    return models_pb2.TensorInfo(
        name=name,
        dtype=spec.dtype,
        shape=spec.shape,
        max_shape=spec.max_shape,
        multiple_of=spec.multiple_of,
        optional=spec.optional,
        low=spec.low,
        high=spec.high,
    )


def _card(info: ModelInfo) -> Struct:
    card = Struct()
    card.update(info.manifest.card)
    return card


def _generator(info: ModelInfo) -> models_pb2.GeneratorInfo | None:
    manifest = info.manifest
    card = generator_card(manifest)
    if not (card.image and card.cond and card.sampler):
        return None
    channels, height, width = card.image.picture
    spec, cond = card.sampler, card.cond
    return models_pb2.GeneratorInfo(
        width=width,
        height=height,
        channels=channels,
        condition=cond.kind,
        num_classes=cond.num_classes or 0,
        class_names=cond.class_names,
        num_steps=spec.num_steps,
        max_steps=len(spec.sigmas) if spec.kind == "few_step" else spec.max_steps,
        guidance=spec.guidance,
        guidable=can_guide(card),
    )


def _scene(info: ModelInfo) -> models_pb2.SceneInfo | None:
    scene = scene_spec(info.manifest)
    if scene is None:
        return None
    return models_pb2.SceneInfo(
        field=scene.field,
        bound=scene.bound,
        radius=scene.radius,
        fov_degrees=scene.fov_degrees,
        background=scene.background,
        transform=scene.transform or (),
    )
