"""Init images: bytes to arrays, checked against the model; knows no backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from distill_core.diffusion.image_to_image import InitImage
from distill_core.diffusion.super_resolution import small_shape
from distill_core.errors import ConfigError, DataError
from distill_core.kinds.denoiser.card import Card
from distill_core.pictures import on_white, read_image, upright_size
from distillery_sampler.engine.requests import DecodedImage, ImageInput, ImageItem, InitImageKey

KINDS = ("PNG", "JPEG", "WEBP")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
EDIT_STRENGTH = 0.5  # unset, without a mask: half of the steps


def decode_init_image(wish: ImageInput, card: Card, ref: str) -> tuple[DecodedImage, InitImageKey]:
    """The decoded init image and mask of a request, and what its images share a batch by.

    Raises:
        ConfigError: no such kind of picture, another size than the model's, a strength out of range.
    """
    assert card.image is not None, "a denoiser without image is not loaded"
    channels, height, width = card.image.picture
    latent = (
        card.image.channels,
        card.image.height,
        card.image.width,
    ) != (
        channels,
        height,
        width,
    )
    strength = wish.strength if wish.strength is not None else 1.0 if wish.mask else EDIT_STRENGTH
    if not 0 < strength <= 1:
        raise ConfigError(
            f"strength = {strength:g} is not allowed: give a share of the steps above 0, up to 1",
            field="image.strength",
        )
    mode = _mode(channels, ref)
    size = _size(wish.image, "image.image")
    block = _enlargement(size, (width, height), ref) if wish.upscale else 1
    if not wish.upscale:
        _check_size(size, (width, height), ref, "image.image")
    known = None
    if wish.mask:
        _check_size(_size(wish.mask, "image.mask"), (width, height), ref, "image.mask")
        known = (_pixels(wish.mask, "L", "image.mask") < 128).astype(np.float32)
    pixels = _pixels(wish.image, mode, "image.image").astype(np.float32) / 127.5 - 1
    return DecodedImage(_enlarged(pixels, block), known), InitImageKey(
        strength, known is not None, 1 if latent else block
    )


def decode_small_picture(wish: ImageInput, card: Card, ref: str) -> DecodedImage:
    """The decoded picture of a request to a model that enlarges: its condition, no place where sampling starts.

    Raises:
        ConfigError: no such kind of picture, another size than the model enlarges, or a wish that it cannot honour.
    """
    assert card.image is not None, "a denoiser without image is not loaded"
    assert card.cond is not None
    assert card.cond.factor is not None
    channels, height, width = small_shape(card.image.picture, card.cond.factor)
    for field, given in (
        ("mask", wish.mask),
        ("strength", wish.strength is not None),
        ("upscale", wish.upscale),
    ):
        if given:
            raise ConfigError(
                f"{ref} enlarges the picture by itself and makes all of it anew; leave image.{field} out",
                field=f"image.{field}",
            )
    mode = _mode(channels, ref)
    size = _size(wish.image, "image.image")
    if size != (width, height):
        raise ConfigError(
            f"image.image is {size[0]} x {size[1]} pixels, and {ref} enlarges {width} x {height} to "
            f"{width * card.cond.factor} x {height * card.cond.factor}; send that size",
            field="image.image",
        )
    return DecodedImage(_pixels(wish.image, mode, "image.image").astype(np.float32) / 127.5 - 1, None)


def init_image_of(key: InitImageKey, y: np.ndarray, items: Sequence[ImageItem]) -> InitImage:
    """Init image of a batch: `y` are the items' pictures in the network's own space (B, C, H, W)."""
    known = known_pixels(items)
    if known is not None and known.shape[-2:] != y.shape[-2:]:  # a latent is known if all its pixels are
        rows, columns = known.shape[-2] // y.shape[-2], known.shape[-1] // y.shape[-1]
        cells = (len(items), 1, y.shape[-2], rows, y.shape[-1], columns)
        known = known.reshape(cells).min((3, 5))
    return InitImage(y, key.strength, known, key.block)


def init_pictures(items: Sequence[ImageItem]) -> np.ndarray:
    """The decoded pictures (B, C, H, W) in [-1, 1]."""
    return np.stack([item.init_image.picture for item in items if item.init_image is not None])


def known_pixels(items: Sequence[ImageItem]) -> np.ndarray | None:
    """1 where a pixel stays (B, 1, H, W); None without masks."""
    masks = [
        item.init_image.known
        for item in items
        if item.init_image is not None and item.init_image.known is not None
    ]
    return np.stack(masks) if masks else None


def with_known_pixels(pictures: np.ndarray, items: Sequence[ImageItem]) -> np.ndarray:
    """Finished pictures (B, C, H, W) whose known pixels are the given ones, to the bit."""
    known = known_pixels(items)
    return pictures if known is None else np.where(known > 0, init_pictures(items), pictures)


def _mode(channels: int, ref: str) -> str:
    if channels not in MODES:
        raise ConfigError(
            f"{ref} makes pictures of {channels} channels, which no {', '.join(KINDS)} holds; "
            "leave image out",
            field="image.image",
        )
    return MODES[channels]


def _size(data: bytes, field: str) -> tuple[int, int]:
    """Of the upright picture, by its header; its pixels are read only after its size was checked."""
    try:
        return upright_size(data, field, formats=KINDS)
    except DataError as error:
        raise ConfigError(str(error), field=field) from None


def _check_size(size: tuple[int, int], model_size: tuple[int, int], ref: str, field: str) -> None:
    if size != model_size:
        raise ConfigError(
            f"{field} is {size[0]} x {size[1]} pixels, and {ref} makes {model_size[0]} x {model_size[1]}; "
            "send that size",
            field=field,
        )


def _enlargement(size: tuple[int, int], model_size: tuple[int, int], ref: str) -> int:
    factor = model_size[0] // max(size[0], 1)
    if factor < 2 or (size[0] * factor, size[1] * factor) != model_size:
        raise ConfigError(
            f"image.image is {size[0]} x {size[1]} pixels, which {ref} cannot enlarge to {model_size[0]} x "
            f"{model_size[1]}; send a half, a third … of that size",
            field="image.image",
        )
    return factor


def _pixels(data: bytes, mode: str, field: str) -> np.ndarray:
    """uint8 (C, H, W), as data of training are read: upright, transparency on white unless `mode` has alpha."""
    try:
        picture = read_image(data, field, formats=KINDS)
    except DataError as error:
        raise ConfigError(str(error), field=field) from None
    pixels = np.asarray((picture if mode == "RGBA" else on_white(picture)).convert(mode))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Bicubic, corrected so that the mean of every block is the small picture's pixel."""
    if factor == 1:
        return pixels
    channels, height, width = pixels.shape
    size = width * factor, height * factor
    smooth = np.stack(
        [np.asarray(Image.fromarray(plane, "F").resize(size, Image.Resampling.BICUBIC)) for plane in pixels]
    )
    cells = smooth.reshape(channels, height, factor, width, factor)
    off = pixels - cells.mean((2, 4))
    enlarged: np.ndarray = (cells + off[:, :, None, :, None]).reshape(smooth.shape).astype(np.float32)
    return enlarged
