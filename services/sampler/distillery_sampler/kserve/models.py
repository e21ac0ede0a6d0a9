"""Models as KServe v2 describes them: inputs and outputs, configuration, statistics."""

from __future__ import annotations

import math

from tritonclient.grpc import model_config_pb2, service_pb2

from distill_core.artifacts import Manifest
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, small_shape
from distill_core.kinds.cards import generator_card, served_by
from distillery_sampler.backends.opening import check_kind
from distillery_sampler.engine.checks import can_guide
from distillery_sampler.engine.predict import output_bytes
from distillery_sampler.engine.requests import ModelInfo
from distillery_sampler.engine.statistics import Duration, RequestStats
from distillery_sampler.kserve.functions import served_name, tensor_specs
from distillery_sampler.kserve.tensors import FLOATS, TensorSpec
from distillery_sampler.settings import SamplerSettings

PRIORITIES = 2  # Triton's levels: 1 interactive, from 2 on bulk
NANOSECONDS = 1e9


def inputs_of(manifest: Manifest, function: str = "") -> dict[str, TensorSpec]:
    """The inputs of a model, by name; a request that fills in all of them, or but those not optional, is answered.

    Raises:
        ArtifactError: a kind of model that is not sampled. ConfigError: it has no such function.
    """
    check_kind(manifest)
    if function or served_by(manifest) == "call":
        return tensor_specs(manifest.signature.function(function).inputs)
    if served_by(manifest) == "render":
        specs = [
            TensorSpec("pose", "FP32", (-1, 4, 4), accepts=FLOATS),
            TensorSpec("intrinsics", "FP32", (-1, 4), accepts=FLOATS),
        ]
        return {spec.name: spec for spec in specs}
    card = generator_card(manifest)
    image = card.image
    latent = (image.channels, image.height, image.width) if image else (-1, -1, -1)
    specs = [
        TensorSpec("seed", "UINT64", (-1, 1), optional=True),
        TensorSpec("latents", "FP32", (-1, *latent), optional=True, accepts=FLOATS),
    ]
    if card.cond and card.cond.kind == "class_label":
        specs.append(TensorSpec("class_label", "INT64", (-1, 1)))
    if card.cond and card.cond.kind == "prompt":
        specs.append(TensorSpec("prompt", "BYTES", (-1, 1)))
        specs.append(TensorSpec("negative_prompt", "BYTES", (-1, 1), optional=True))
    if card.image and card.cond and card.cond.factor:
        channels, height, width = small_shape(card.image.picture, card.cond.factor)
        specs.append(TensorSpec(LOW_RESOLUTION, "UINT8", (-1, height, width, channels)))
    if can_guide(card):
        specs.append(TensorSpec("guidance_scale", "FP32", (-1, 1), optional=True, accepts=FLOATS))
    return {spec.name: spec for spec in specs}


def outputs_of(manifest: Manifest, function: str = "") -> dict[str, TensorSpec]:
    """The outputs of a model, by name."""
    if function or served_by(manifest) == "call":
        return tensor_specs(manifest.signature.function(function).outputs)
    if served_by(manifest) == "render":
        specs = [TensorSpec("rgb", "UINT8", (-1, -1, -1, 3)), TensorSpec("depth", "FP32", (-1, -1, -1))]
        return {spec.name: spec for spec in specs}
    card = generator_card(manifest)
    channels, height, width = card.image.picture if card.image else (-1, -1, -1)
    return {"images": TensorSpec("images", "UINT8", (-1, height, width, channels))}


def platform(info: ModelInfo) -> str:
    """Kind of the model, where others say `onnxruntime_onnx`."""
    return f"distillery_{info.manifest.kind}"


def metadata(info: ModelInfo, function: str = "") -> service_pb2.ModelMetadataResponse:
    """A version's inputs and outputs."""
    tensor = service_pb2.ModelMetadataResponse.TensorMetadata
    inputs, outputs = (
        [tensor(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs.values()]
        for specs in (inputs_of(info.manifest, function), outputs_of(info.manifest, function))
    )
    return service_pb2.ModelMetadataResponse(
        name=served_name(info.manifest.name, function),
        versions=[str(info.manifest.version)],
        platform=platform(info),
        inputs=inputs,
        outputs=outputs,
    )


def config(info: ModelInfo, settings: SamplerSettings, function: str = "") -> model_config_pb2.ModelConfig:
    """Serving configuration of a version, in the fields that Triton has for it."""
    described = model_config_pb2.ModelConfig(
        name=served_name(info.manifest.name, function),
        platform=platform(info),
        backend=info.backend,
        max_batch_size=_most(
            info.manifest, settings, function
        ),  # of a request; it is split over device batches
    )
    if info.instances:  # found by timing, when the version was loaded
        described.instance_group.add(count=info.instances)
    batching = described.dynamic_batching
    batching.preferred_batch_size.extend([info.max_batch] if info.max_batch else [])
    batching.max_queue_delay_microseconds = round(settings.max_delay_s * 1e6)
    batching.priority_levels, batching.default_priority_level = PRIORITIES, 1
    batching.default_queue_policy.allow_timeout_override = True
    batching.default_queue_policy.max_queue_size = settings.max_queue_images
    for spec in inputs_of(info.manifest, function).values():
        described.input.add(
            name=spec.name, data_type=_type(spec), dims=spec.shape[1:], optional=spec.optional
        )
    for spec in outputs_of(info.manifest, function).values():
        described.output.add(name=spec.name, data_type=_type(spec), dims=spec.shape[1:])
    return described


def _most(manifest: Manifest, settings: SamplerSettings, function: str) -> int:
    """Number of pictures, views or items that one request may ask for."""
    if served_by(manifest) == "call":
        called = manifest.signature.function(function)
        in_a_message = settings.max_reply_bytes // max(1, output_bytes(called))
        waiting = settings.max_queue_images if called.batched else settings.max_images
        return max(1, min(settings.max_images, waiting, in_a_message))
    card = generator_card(manifest)
    if card.image is None:
        return settings.max_views
    in_a_message = settings.max_reply_bytes // math.prod(card.image.picture)
    return max(1, min(settings.max_images, settings.max_queue_images, in_a_message))


def _type(spec: TensorSpec) -> int:
    name = "STRING" if spec.datatype == "BYTES" else spec.datatype
    number: int = model_config_pb2.DataType.Value(f"TYPE_{name}")
    return number


def statistics(name: str, version: int, stats: RequestStats) -> service_pb2.ModelStatistics:
    """Statistics of a version; there is no cache of answers, so `cache_hit` and `cache_miss` stay 0."""
    reply = service_pb2.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=stats.last_ms,
        inference_count=stats.inferences,
        execution_count=sum(batch.count for batch in stats.batches.values()),
    )
    for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
        _write(getattr(reply.inference_stats, name), getattr(stats, name))
    for size, batch in sorted(stats.batches.items()):
        entry = reply.batch_stats.add(batch_size=size)
        _write(entry.compute_infer, batch)
        for moved in (entry.compute_input, entry.compute_output):  # counted in `compute_infer`
            moved.count = batch.count
    return reply


def _write(target: service_pb2.StatisticDuration, duration: Duration) -> None:
    target.count, target.ns = duration.count, int(duration.seconds * NANOSECONDS)
