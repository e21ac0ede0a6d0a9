"""New diffusers networks: for data that a recipe names, or in the place of a teacher's."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.diffusion.schedule import Parameterisation
from distill_core.diffusion.super_resolution import small_shape
from distill_core.errors import ConfigError, nearest, out_of_memory
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser, Sidecar
from distill_core.networks.diffusers_schedule import schedule_of
from distill_core.networks.fake_tensors import real_tensors
from distill_core.networks.families import FAMILIES
from distill_core.networks.foreign.keys import defaults_of, not_understood
from distill_core.networks.foreign.networks import NETWORKS
from distill_core.recipe.tables import NetworkConfig

ENLARGING = ("UNet2DModel", "DiTTransformer2DModel")  # their inputs may have more channels than their answers


def build_denoiser(
    network: NetworkConfig,
    *,
    parameterisation: Parameterisation,
    shape: tuple[int, int, int] | None,
    num_classes: int | None,
    class_names: tuple[str, ...] = (),
    prompts: list[str] | None = None,
    scheduler: dict[str, Any] | None = None,
    num_steps: int = 32,
    codec: ModelMixin | None = None,
    low_resolution: int | None = None,
) -> DiffusersDenoiser:
    """A new network for images of `shape` (C, H, W), or for their latents by `codec`; no `num_classes`: unconditional.

    The null class has the index `num_classes`. A UNet2DConditionModel is conditioned on text instead, by an encoder
    made from the words of `prompts`. `scheduler` are arguments of the diffusers scheduler. With `low_resolution` the
    network enlarges pictures so many times, and is told nothing else.

    Raises:
        ConfigError: an unknown network class, arguments that it refuses, or data without pictures or prompts.
    """
    if network.name not in FAMILIES:
        raise ConfigError(
            f"network.name = {network.name!r} is unknown{nearest(network.name, FAMILIES)}",
            field="network.name",
        )
    family = FAMILIES[network.name]
    if shape is None:
        raise ConfigError(
            "this data has no pictures to learn from; set data.name to digits, images, huggingface or idx",
            field="data.name",
        )
    channels, height, width = shape if codec is None else latent_shape(codec, shape)
    if low_resolution is not None:
        small_shape(shape, low_resolution, field="config.factor")
        _check_told_nothing(network)
        num_classes, prompts = None, None
    text = family.new_text(network, prompts)
    shown = channels if low_resolution is None else 2 * channels
    args = {"in_channels": shown, "out_channels": channels, "sample_size": height, **network.args}
    args |= family.new_args(num_classes, text)
    module = _constructed(network.name, args)
    noise = _new_scheduler(parameterisation, scheduler or {})
    schedule = schedule_of(noise)
    sampler = SamplerSpec(
        kind="heun",
        sigma_min=max(schedule.sigma_min, 0.002),
        sigma_max=min(schedule.sigma_max, 80.0),
        noise_scale=schedule.start_scale(min(schedule.sigma_max, 80.0)),
        num_steps=num_steps,
        max_steps=1000,
        guidable=low_resolution is None,
    )
    image = ImageSpec(channels=channels, height=height, width=width, picture=shape)
    cond = CondSpec(kind="none")
    if low_resolution is not None:
        cond = CondSpec(kind="low_resolution", factor=low_resolution)
    elif text is not None:
        cond = text.cond()
    elif num_classes is not None:
        cond = CondSpec(
            kind="class_label", num_classes=num_classes, null_label=num_classes, class_names=class_names
        )
    sidecar = Sidecar(image=image, cond=cond, sampler=sampler, parameterisation=parameterisation)
    return _tried(DiffusersDenoiser(module, noise, sidecar, codec=codec, text=text))


def _check_told_nothing(network: NetworkConfig) -> None:
    """Refuse a class that cannot be shown a picture beside its own: those that always read prompts."""
    if network.name not in ENLARGING:
        raise ConfigError(
            f"network.name = {network.name!r} cannot enlarge pictures; choose one of {', '.join(ENLARGING)}",
            field="network.name",
        )


def build_codec(args: dict[str, Any], shape: tuple[int, int, int] | None) -> AutoencoderKL:
    """A new diffusers AutoencoderKL for pictures of `shape` (C, H, W); `args` are its own.

    Raises:
        ConfigError: data without pictures, arguments that the class refuses, or sides that do not divide.
    """
    if shape is None:
        raise ConfigError(
            "this data has no pictures to learn from; choose data with pictures", field="data.name"
        )
    count = len(args.get("block_out_channels", (64,)))
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
    }
    sizes = {"in_channels": shape[0], "out_channels": shape[0], "sample_size": shape[1]}
    try:
        codec: AutoencoderKL = AutoencoderKL(**{**blocks, **sizes, **args})
        latent_shape(codec, shape)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"config.codec is refused by AutoencoderKL: {error}", field="config.codec"
        ) from None
    return codec


def latent_shape(codec: ModelMixin, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the latents of pictures of `shape`.

    Raises:
        ConfigError: sides that the codec does not divide.
    """
    factor = 2 ** (len(codec.config["block_out_channels"]) - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ConfigError(
            f"pictures of {shape[2]} x {shape[1]} pixels do not divide by the codec's factor {factor}",
            field="data.size",
        )
    return codec.config["latent_channels"], shape[1] // factor, shape[2] // factor


def scale_latents(codec: ModelMixin, scale: float) -> None:
    """Multiply what `codec` encodes to by `scale` from now on; it is kept in the codec's own config."""
    codec.register_to_config(scaling_factor=scale)


def build_like(teacher: DiffusersDenoiser, network: NetworkConfig) -> DiffusersDenoiser:
    """A new network, random and of any size, that takes and gives what `teacher` does: its conditions and schedule.

    Raises:
        ConfigError: another kind of network than the teacher's, or arguments that it refuses.
    """
    theirs = teacher.network.config
    if network.name != type(teacher.network).__name__:
        raise ConfigError(
            f"student.network.name = {network.name!r} cannot stand in for the teacher's "
            f"{type(teacher.network).__name__}; give that name, with args of your choice",
            field="student.network.name",
        )
    args = {name: theirs[name] for name in teacher.family.interface if theirs.get(name) is not None}
    module = _constructed(network.name, {**network.args, **args})
    return _tried(teacher.with_network(module))


def _constructed(name: str, args: dict[str, Any]) -> ModelMixin:
    cls = getattr(diffusers, name)
    defaults = defaults_of(cls)
    known = {
        key: value for key, value in args.items() if key in defaults
    }  # others are for the class to refuse
    problem = not_understood(known, NETWORKS[name], defaults)
    if problem is not None:
        raise ConfigError(f"network.args says {problem}", field="network.args")
    try:
        network: ModelMixin = cls(**args)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"network.args are refused by {name}: {error}", field="network.args") from None
    return network


def _tried(denoiser: DiffusersDenoiser) -> DiffusersDenoiser:
    """The denoiser after one picture: a class accepts sizes that its own forward pass cannot use."""
    image = denoiser.image
    try:
        with torch.no_grad():
            denoiser(torch.zeros(1, image.channels, image.height, image.width), torch.ones(1))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"network.args do not suit pictures of shape {image.picture}: {str(error).splitlines()[0]}",
            field="network.args",
        ) from None
    return denoiser


@real_tensors()
def _new_scheduler(parameterisation: Parameterisation, args: dict[str, Any]) -> Any:
    if parameterisation == "edm":
        return diffusers.EDMEulerScheduler(**args)
    if parameterisation == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(**args)
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[parameterisation]
    return diffusers.DDPMScheduler(prediction_type=prediction, **args)
