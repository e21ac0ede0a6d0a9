"""The codec of a latent model: an autoencoder of diffusers, frozen, with the scale of its latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_core.errors import ArtifactError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin


def to_latent(codec: ModelMixin, picture: Tensor) -> Tensor:
    """A picture (B, C, H, W) in [-1, 1] as a latent model's x0."""
    with torch.autocast(
        picture.device.type, enabled=False
    ):  # latents in 8 bits of mantissa are other pictures
        shown = picture.to(codec.dtype)
        answer = codec.encode(shown[:, :, None] if has_frames(codec.config) else shown)
        named = next((name for name in ("latents", "latent") if hasattr(answer, name)), None)
        encoded = answer.latent_dist.mode() if named is None else getattr(answer, named)
        latent: Tensor = (encoded[:, :, 0] if has_frames(codec.config) else encoded).float()
    config = codec.config
    if is_normalised(config):
        mean, std = _measured(codec)
        return (_patches_as_channels(latent) - mean) / std
    scale: float = config.get("scaling_factor", 1.0)
    if config.get("latents_mean") is None:
        shift: float = config.get("shift_factor") or 0.0
        return (latent - shift) * scale
    mean, std = _moments(config, latent)
    return (latent - mean) * scale / std


def unscaled(codec: ModelMixin, x0: Tensor) -> Tensor:
    """The codec's own latent of a model's `x0`."""
    config = codec.config
    if is_normalised(config):
        mean, std = _measured(codec)
        return _channels_as_patches(x0 * std + mean)
    scale: float = config.get("scaling_factor", 1.0)
    if config.get("latents_mean") is None:
        shift: float = config.get("shift_factor") or 0.0
        return x0 / scale + shift
    mean, std = _moments(config, x0)
    return x0 * std / scale + mean


def decode_latent(codec: ModelMixin, x0: Tensor) -> Tensor:
    """The picture (B, C, H, W) in [-1, 1] of a latent model's `x0`."""
    latent = unscaled(codec, x0)
    picture: Tensor = codec.decode(latent[:, :, None] if has_frames(codec.config) else latent).sample
    return picture[:, :, 0] if has_frames(codec.config) else picture


def is_normalised(config: Any) -> bool:
    """Whether a codec of this config has the scale of its latents, with 2 x 2 patches as channels, in its weights."""
    return "batch_norm_eps" in config


def _measured(codec: Any) -> tuple[Tensor, Tensor]:
    norm = codec.bn
    std = (norm.running_var + codec.config["batch_norm_eps"]).sqrt()
    return norm.running_mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


def _patches_as_channels(latent: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) as (B, 4 C, h, w)."""
    patches = latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
    channels: Tensor = patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    return channels


def _channels_as_patches(x: Tensor) -> Tensor:
    """(B, 4 C, h, w) as (B, C, 2 h, 2 w)."""
    latent: Tensor = x.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    return latent


def has_frames(config: Any) -> bool:
    """Whether a codec of this config is one of videos: a picture is a single frame of (B, C, F, H, W)."""
    return "temperal_downsample" in config


def latent_channels(config: Any) -> int:
    """C of the latents that a codec of this config takes."""
    channels = config.get("vq_embed_dim") or config.get("z_dim") or config["latent_channels"]
    return int(channels) * (4 if is_normalised(config) else 1)


def factor_of(config: Any) -> int:
    """Pixels on a side of the square that one latent of a codec of this config stands for."""
    if has_frames(config):
        return int(2 ** len(config["temperal_downsample"]))
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(widths) - 1)) * (2 if is_normalised(config) else 1)


def colours_of(config: Any) -> int:
    """C of the pictures."""
    return int(config.get("out_channels") or config.get("in_channels") or config["input_channels"])


def check_codec(path: Path, config: Any) -> None:
    """Refuse a codec whose scale is none, or is said in two ways.

    Raises:
        ArtifactError: it is; the sentence names file and key.
    """
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if (mean is None) != (std is None):
        raise ArtifactError(f"{path} gives one of latents_mean and latents_std; give both or neither")
    if mean is not None and shift:
        raise ArtifactError(f"{path} gives both latents_mean and shift_factor; give one of them")
    for name in ("scaling_factor", "shift_factor"):
        _check_numbers(path, name, [config.get(name) or 0.0])
    if not config.get("scaling_factor", 1.0):
        raise ArtifactError(
            f"{path} says scaling_factor = 0, and latents are divided by it; give their 1 / std"
        )
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values is not None:
            _check_numbers(path, name, values, count=latent_channels(config))
    if std is not None and min(std) <= 0:
        raise ArtifactError(f"{path} says latents_std = {min(std)}; standard deviations are above 0")
    if config.get("in_channels", colours_of(config)) != colours_of(config):
        raise ArtifactError(
            f"{path} says in_channels = {config['in_channels']} and out_channels = {config['out_channels']}; "
            "a codec that gives back another kind of picture is not supported"
        )


def _check_numbers(path: Path, name: str, values: Any, count: int = 1) -> None:
    listed = isinstance(values, list | tuple) and len(values) == count
    if not listed or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ArtifactError(
            f"{path} says {name} = {values}; it is {count} finite numbers, one a latent channel"
        )


def _moments(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the codec's latents, (1, C, 1, 1) each."""
    mean, std = (like.new_tensor(config[name]) for name in ("latents_mean", "latents_std"))
    return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)
