"""Picture files: the one reader of them for data, captures, command line and sampler, and tensors saved as such.

This module loads no torch, which the sampler does without.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from distill_core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SIGNATURES = {
    "PNG": (b"\x89PNG",),
    "JPEG": (b"\xff\xd8",),
    "WEBP": (b"RIFF",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
MAX_PIXELS = 64_000_000  # of one picture; beyond it a small file could fill the memory
MAX_SIDE = 32_768
MAX_NAMED = 20  # of the damaged pictures in one error
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
GREY = ("1", "L", "LA", "La")
READ = (*GREY, "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
DECODER_ERRORS = (  # what Pillow raises on damaged files
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    struct.error,
    Image.DecompressionBombError,
)
Item = TypeVar("Item")
Read = TypeVar("Read")


def read_image(
    source: Path | bytes,
    name: str = "",
    *,
    turn: bool = True,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """A picture of mode L, LA, RGB or RGBA, with alpha where the file has transparency of any kind (a key colour too).

    It is `turn`ed as its EXIF orientation says. Colour profiles are not applied; of 16-bit colours the upper 8 bits are
    read. `name` is what errors call it, unset the path.

    Raises:
        DataError: no such file, no picture of these `formats`, damaged, too large, 16-bit grey, or more than one frame.
    """
    name = _called(source, name)
    with _opened(source, name, formats, max_pixels) as picture:
        _check_key(picture, name)
        # a TIFF is turned when it is decoded
        upright = ImageOps.exif_transpose(picture) if turn else picture
        return _plain(upright)


def upright_size(
    source: Path | bytes, name: str = "", *, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """Width and height of what `read_image` gives, from the file's header alone; it raises the same."""
    with _opened(source, _called(source, name), formats, None) as picture:
        return picture.size[::-1] if _lies(picture) else picture.size


def stored_size(source: Path | bytes, name: str = "", *, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """Width and height without the turn, as `read_image(turn=False)` gives them."""
    with _opened(source, _called(source, name), formats, None) as picture:
        return picture.size


def on_white(picture: Image.Image) -> Image.Image:
    """A picture of mode L or RGB: what `read_image` gives, laid on white."""
    if not picture.mode.endswith("A"):
        return picture
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture.convert("RGBA"))
    return canvas.convert("L" if picture.mode == "LA" else "RGB")


def read_all(items: Sequence[Item], read: Callable[[Item], Read]) -> list[Read]:
    """`read(item)` of every item.

    Raises:
        DataError: some could not be read; one error says of all of them why, up to `MAX_NAMED`.
    """
    results, problems = [], []
    for item in items:
        try:
            results.append(read(item))
        except DataError as error:
            problems.append(error)
    if problems:
        raise together(problems, len(items))
    return results


def together(problems: Sequence[DataError], total: int) -> DataError:
    """One error for the `problems` among `total` pictures."""
    if len(problems) == 1:
        return problems[0]
    shown = "; ".join(map(str, problems[:MAX_NAMED]))
    left = len(problems) - MAX_NAMED
    more = f"; and {left} more" if left > 0 else ""
    return DataError(
        f"{len(problems)} of {total} pictures cannot be used: {shown}{more}", field=problems[0].field
    )


def _called(source: Path | bytes, name: str) -> str:
    return name or ("the picture" if isinstance(source, bytes) else str(source))


@contextmanager
def _opened(
    source: Path | bytes, name: str, formats: Sequence[str], max_pixels: int | None
) -> Iterator[Image.Image]:
    """The picture of a file whose header is in order; pixels are not read yet."""
    try:
        with Image.open(
            BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(formats)
        ) as picture:
            _check_header(picture, name, max_pixels)
            yield picture
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; restore the picture", field="data.path") from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}; give a file that this process can read",
            field="data.path",
        ) from None
    except UnidentifiedImageError:
        if _begins_as(source, formats):
            raise _damaged(name, "its header is incomplete") from None
        kinds = ", ".join(formats)
        raise DataError(
            f"{name} is not a picture that can be read; allowed are {kinds}", field="data.path"
        ) from None
    except DECODER_ERRORS as error:
        raise _damaged(name, str(error)) from None


def _begins_as(source: Path | bytes, formats: Sequence[str]) -> bool:
    """Whether the first bytes are those of one of these formats."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            source = file.read(4)
    return any(source.startswith(SIGNATURES[kind]) for kind in formats)


def _damaged(name: str, reason: str) -> DataError:
    return DataError(
        f"{name} is not a readable picture, it is damaged or breaks off ({reason}); replace or remove it",
        field="data.path",
    )


def _check_header(picture: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = picture.size
    if max_pixels is not None and (width * height > max_pixels or max(width, height) > MAX_SIDE):
        raise DataError(
            f"{name} is {width}x{height}; at most {MAX_SIDE} a side and {max_pixels} pixels are read",
            field="data.path",
        )
    if picture.mode not in READ:
        raise DataError(
            f"{name} has {picture.mode} pixels; grey and RGB pictures of 8 bits per channel are read, convert it",
            field="data.path",
        )
    # a JPEG with a second picture (MPO: previews, depth, stereo) shows its first
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise DataError(
            f"{name} holds {frames} frames; give a still picture, or each frame as a file of its own",
            field="data.path",
        )


def _check_key(picture: Image.Image, name: str) -> None:
    """Bring a PNG's key grey to the scale of its pixels, which the decoder leaves as it is stored."""
    key, tiles = picture.info.get("transparency"), getattr(picture, "tile", ())
    stored = str(tiles[0].args) if picture.format == "PNG" and tiles else ""
    if key is None:
        return
    if "16" in stored:
        raise DataError(
            f"{name} has a key colour of 16 bits; save it with an alpha channel, or 8 bits a channel",
            field="data.path",
        )
    scale = {"L;2": 85, "L;4": 17}.get(stored)
    if scale is not None:
        picture.info["transparency"] = scale * int(key)


def _lies(picture: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges width and height of the header."""
    return picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS


def _plain(picture: Image.Image) -> Image.Image:
    clear = picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    if picture.mode == "La":
        picture = picture.convert("LA")
    kind = ("L" if picture.mode in GREY else "RGB") + ("A" if clear else "")
    if picture.mode == kind:
        picture.load()
        return picture.copy()
    return picture.convert(kind)


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] as (B, H, W, C) uint8, rounded."""
    scaled = (pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def sheet(pictures: Tensor, *, columns: int = 10, gap: int = 1, min_side: int = 32) -> Image.Image:
    """A grid of pictures; small ones are enlarged by whole factors so that people can see them."""
    arrays = to_uint8(pictures)
    arrays = arrays.repeat(3, axis=3) if arrays.shape[3] == 1 else arrays[..., :3]
    factor = max(1, math.ceil(min_side / arrays.shape[1]))
    arrays = arrays.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = arrays.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, array in enumerate(arrays):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = array
    return Image.fromarray(canvas)


def save_sheet(pictures: Tensor, path: Path) -> None:
    """`sheet` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(path)
