"""Pictures that repeat without a seam, from a denoiser that was not trained for it (StableMaterials' feature rolling).

    y = roll(conv(wrap(roll(x, s))), -f s),    f = size of y / size of x,    s fresh for every layer and sampler step

`wrap` pads a convolution with the opposite edge instead of zeros, and that alone closes the seam: a convolution on a
torus commutes with every roll that its stride divides. Rolling matters where a layer still tells places apart: in
convolutions that keep their zeros, and in attention over a picture larger than trained, which works on rolled patches.

A tiled denoiser is a twin that shares its base's weights. The base stays as it was, so nothing has to be restored and
no other thread notices; shifts depend on (seed, sampler step, layer), so no picture depends on its batch.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.artifacts import ImageSpec
from distill_core.config import Config
from distill_core.errors import ConfigError
from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser

_step: ContextVar[int] = ContextVar("sampler step of the call under way", default=0)
ATTENTION = ("Attention", "Transformer2DModel")  # diffusers' layers that read a whole (B, C, H, W) map


class Tiling(Config):
    """Options of seamless sampling. `wrap` off and `amplitude` 0 is the plain denoiser, bit for bit."""

    wrap: bool = True  # convolutions pad with the opposite edge
    amplitude: int = Field(
        0, ge=0, le=4096
    )  # largest roll of a feature map, in its own pixels (published: 256)
    plain_share: float = Field(
        0.0, ge=0, lt=1
    )  # first steps left plain, for the layout (published: a quarter)
    scale: int = Field(1, ge=1, le=16)  # pictures so many times as large as trained, along each side
    seed: int = Field(0, ge=0, lt=2**63)  # of the rolls


class TiledDenoiser(Denoiser):
    """`base` on a torus: the same weights, other borders.

    Args:
        base: any denoiser whose network is convolutional; its weights are shared.
        tiling: what is done.
        num_steps: of the sampler that will call it, where that is not the base's own number.

    Raises:
        ConfigError: a network whose seams this cannot close.
    """

    def __init__(self, base: Denoiser, tiling: Tiling, *, num_steps: int | None = None) -> None:
        super().__init__()
        self.base, self.tiling = base, tiling
        self.tiled = _twin(base)
        network = _network(self.tiled)
        if tiling.wrap or tiling.amplitude or tiling.scale > 1:
            _check(network)
        if tiling.wrap:
            make_tileable(self.tiled)
        _roll_layers(network, tiling)
        self.cond, self.sampler, self.schedule = base.cond, base.sampler, base.schedule
        self.image = _scaled(self.tiled.image, tiling.scale)
        size = self.image.height, self.image.width
        self.levels = base.sampler.levels(num_steps or base.sampler.num_steps, size)
        self.plain_steps = math.ceil(tiling.plain_share * len(self.levels))

    def forward(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None, time: Tensor | None = None
    ) -> Tensor:
        with self._at(sigma) as denoiser:
            return denoiser(x_sigma, sigma, cond, *(() if time is None else (time,)))

    def with_features(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        with self._at(sigma) as denoiser:
            return denoiser.with_features(x_sigma, sigma, cond)

    def null_cond(self, batch: int) -> Cond:
        return self.base.null_cond(batch)

    def encode(self, picture: Tensor) -> Tensor:
        return self.base.encode(picture)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        return self.base.encode_prompts(prompts)

    def encode_negative(self, prompts: list[str]) -> Cond:
        return self.base.encode_negative(prompts)

    def decode(self, x0: Tensor) -> Tensor:
        return self.tiled.decode(x0)

    @contextlib.contextmanager
    def _at(self, sigma: Tensor) -> Iterator[Denoiser]:
        """The denoiser for this level, while its layers know the sampler's step."""
        step = self._step(sigma)
        token = _step.set(step)
        try:
            yield self.base if step < self.plain_steps else self.tiled
        finally:
            _step.reset(token)

    def _step(self, sigma: Tensor) -> int:
        """The sampler step at this level; that of the nearest higher one for a level between two."""
        if not (self.plain_steps or self.tiling.amplitude):
            return 0
        level = float(sigma.max())
        return max(sum(level <= above * (1 + 1e-5) for above in self.levels) - 1, 0)


def make_tileable(denoiser: Denoiser) -> None:
    """Let the denoiser's own convolutions wrap around: in training, sampling, its saved folder and its exports.

    Raises:
        ConfigError: a network whose seams this cannot close.
    """
    network = _network(denoiser)
    wrap_around(network)
    _say_tileable(denoiser, True)


def untiled(denoiser: Denoiser) -> Denoiser:
    """A twin of a tileable denoiser that shares its weights and pads with zeros: for pictures that have borders."""
    twin = _twin(denoiser)
    for layer in _network(twin).modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "zeros"
    for layer in _corner_padded(_network(twin), "wrapped"):
        layer.padding = 0
    _say_tileable(twin, False)
    return twin


def _say_tileable(denoiser: Denoiser, tileable: bool) -> None:
    for owner in (denoiser, _network(denoiser)):
        owner.image = denoiser.image.model_copy(update={"tileable": tileable})


def wrap_around(network: nn.Module) -> None:
    """Pad every convolution of `network` with the opposite edge instead of zeros, in place.

    Raises:
        ConfigError: it has no such convolution, or one that enlarges, whose border cannot be wrapped.
    """
    _check(network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
    for layer in _corner_padded(network, 0):
        layer.padding = "wrapped"  # anything but 0: no zeros are added
        layer.conv._reversed_padding_repeated_twice = [0, 1, 0, 1]


def _check(network: nn.Module) -> None:
    layers = list(network.modules())
    padded = any(
        isinstance(layer, nn.Conv2d) and any(layer._reversed_padding_repeated_twice) for layer in layers
    )
    if not padded or any(isinstance(layer, nn.ConvTranspose2d) for layer in layers):
        raise ConfigError(
            f"the borders of a {type(network).__name__} cannot be wrapped: it needs padded convolutions, and none "
            "that is transposed; use a UNet2DModel or UNet2DConditionModel"
        )


def _corner_padded(network: nn.Module, padding: Any) -> list[Any]:
    """Diffusers' layers that halve a map after padding it on the right and below, those set to `padding`."""
    halving = [layer for layer in network.modules() if type(layer).__name__ == "Downsample2D"]
    return [layer for layer in halving if hasattr(layer, "conv") and layer.padding == padding]


def decode_wrapped(decode: Callable[[Tensor], Tensor], latent: Tensor) -> Tensor:
    """The decoded picture whose opposite edges fit: an eighth more of the repeated latent is decoded all around."""
    height, width = latent.shape[2:]
    top, left = math.ceil(height / 8), math.ceil(width / 8)
    picture = decode(F.pad(latent, (left, left, top, top), mode="circular"))
    factor = picture.shape[2] // (height + 2 * top)
    return picture[..., top * factor : -top * factor, left * factor : -left * factor]


class _Rolled(nn.Module):
    """A convolution between a roll and its inverse."""

    def __init__(self, layer: nn.Conv2d, number: int, tiling: Tiling) -> None:
        super().__init__()
        self.layer, self.number, self.tiling = layer, number, tiling
        self.unit = math.lcm(2, *layer.stride)

    def forward(self, x: Tensor) -> Tensor:
        down, right = _shift(self.tiling, self.number, self.unit)
        y: Tensor = self.layer(x.roll((down, right), (2, 3)))
        return y.roll((-down * y.shape[2] // x.shape[2], -right * y.shape[3] // x.shape[3]), (2, 3))


class _Patched(nn.Module):
    """An attention layer on patches of the size it was trained at, their borders elsewhere in every call."""

    def __init__(self, layer: nn.Module, number: int, tiling: Tiling) -> None:
        super().__init__()
        self.layer, self.number, self.tiling = layer, number, tiling

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        n, batch = self.tiling.scale, len(x)
        down, right = _shift(self.tiling, self.number, 1)
        patches = x.roll((down, right), (2, 3)).unflatten(3, (n, -1)).unflatten(2, (n, -1))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B n n, C, H/n, W/n)
        repeated = {name: _per_patch(value, batch, n * n) for name, value in options.items()}
        out = self.layer(patches, *(_per_patch(value, batch, n * n) for value in args), **repeated)
        y = out[0] if isinstance(out, tuple) else out
        y = y.unflatten(0, (batch, n, n)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        y = y.roll((-down, -right), (2, 3))
        return (y, *out[1:]) if isinstance(out, tuple) else y


def _per_patch(value: Any, batch: int, patches: int) -> Any:
    """A layer's argument for every patch of each item; what belongs to no item stays."""
    if isinstance(value, dict):
        return {name: _per_patch(nested, batch, patches) for name, nested in value.items()}
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value.repeat_interleave(patches, 0)
    return value


def _shift(tiling: Tiling, number: int, unit: int) -> tuple[int, int]:
    """Rolls down and right of layer `number` in the sampler step under way: multiples of `unit`."""
    bits = np.random.Philox(key=[tiling.seed, number], counter=[0, 0, 0, _step.get()]).random_raw(2)
    down, right = (unit * (int(raw) % (tiling.amplitude // unit + 1)) for raw in bits)
    return down, right


def _roll_layers(network: nn.Module, tiling: Tiling) -> None:
    """Put every convolution between rolls, and attention on patches where the picture is larger than trained."""
    places = [
        (parent, name, child) for parent in list(network.modules()) for name, child in parent.named_children()
    ]
    for number, (parent, name, child) in enumerate(places):
        if isinstance(child, nn.Conv2d) and tiling.amplitude:
            setattr(parent, name, _Rolled(child, number, tiling))
        elif tiling.scale > 1 and type(child).__name__ in ATTENTION and not _inside_attention(parent):
            setattr(parent, name, _Patched(child, number, tiling))


def _inside_attention(parent: nn.Module) -> bool:
    return type(parent).__name__ == "BasicTransformerBlock"  # reads tokens, not a map


def _twin(base: Denoiser) -> Denoiser:
    """Modules of its own around the same weights."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def _network(denoiser: Denoiser) -> Denoiser:
    return getattr(denoiser, "adapted", denoiser)  # a LoRA denoiser keeps its layers there


def _scaled(image: ImageSpec, scale: int) -> ImageSpec:
    channels, height, width = image.picture
    larger = {"height": scale * image.height, "width": scale * image.width}
    return image.model_copy(update={**larger, "picture": (channels, scale * height, scale * width)})
