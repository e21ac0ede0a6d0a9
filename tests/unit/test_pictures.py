"""The one reader of pictures, against pixels told by hand, and the readers that go through it."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.data.pictures import decode
from distill_core.data.posed import read_image as read_rgba
from distill_core.errors import DataError
from distill_core.pictures import on_white, read_all, read_image, upright_size
from distillery_cli.models import generate

RGB = np.random.default_rng(3).integers(0, 255, (5, 7, 3), dtype=np.uint8)


def encoded(picture, image_format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: list[bytes], width: int, *, trns: bytes | None = None) -> bytes:
    """A PNG chunk by chunk, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    key = b"" if trns is None else chunk(b"tRNS", trns)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + key + body + chunk(b"IEND", b"")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, RGB[::-1].transpose(1, 0, 2)),
        (8, RGB[:, ::-1].transpose(1, 0, 2)),
    ],
)
def test_a_picture_is_turned_as_the_camera_s_mark_says(image_format, orientation, upright):
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(Image.fromarray(RGB), image_format, exif=turned(orientation), **options)
    assert np.array_equal(read_image(data), upright)
    assert upright_size(data) == (upright.shape[1], upright.shape[0])
    assert np.array_equal(decode(data, "x").permute(1, 2, 0), upright)


def test_a_key_colour_is_transparent_in_every_kind_of_png():
    magenta = np.array([[[255, 0, 255], [255, 0, 254]]], np.uint8)
    data = encoded(Image.fromarray(magenta), transparency=(255, 0, 255))
    assert np.asarray(read_image(data)).tolist() == [[[255, 0, 255, 0], [255, 0, 254, 255]]]
    assert decode(data, "x")[:, 0].T.tolist() == [[255, 255, 255], [255, 0, 254]]
    grey = encoded(Image.fromarray(np.array([[90, 91]], np.uint8)), transparency=91)
    assert np.asarray(read_image(grey)).tolist() == [[[90, 255], [91, 0]]]
    assert decode(grey, "x").tolist() == [[[90, 255]]]


@pytest.mark.parametrize(
    ("depth", "row", "key", "wanted"),
    [
        (1, 0b01000000, 1, [[0, 255], [255, 0], [0, 255], [0, 255]]),
        (2, 0b00011011, 2, [[0, 255], [85, 255], [170, 0], [255, 255]]),
        (4, 0x3C, 12, [[51, 255], [204, 0]]),
    ],
)
def test_a_key_grey_is_meant_at_the_depth_of_the_file(depth, row, key, wanted):
    data = png(depth, 0, [bytes([row])], len(wanted), trns=struct.pack(">H", key))
    assert np.asarray(read_image(data))[0].tolist() == wanted


def test_a_palette_with_transparency_and_grey_with_alpha_keep_their_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, transparency=bytes([255, 51]))
    assert np.asarray(read_image(data))[0].tolist() == [[10, 20, 30, 255], [40, 50, 60, 51]]
    grey = encoded(Image.fromarray(np.array([[[100, 51], [7, 255]]], np.uint8), "LA"))
    assert read_image(grey).mode == "LA"
    assert decode(grey, "x").tolist() == [[[round(0.2 * 100 + 0.8 * 255), 7]]]


def test_cmyk_is_read_as_its_colours():
    data = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")
    assert read_image(data).getpixel((1, 2)) == (255, 0, 0)
    assert encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[:2] == b"\xff\xd8"
    jpeg = read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert jpeg.mode == "RGB"
    assert np.abs(np.asarray(jpeg).astype(int) - [255, 0, 0]).max() <= 3


def test_of_16_bit_colours_the_upper_8_bits_are_read():
    row = struct.pack(">6H", 0x0302, 0x80FF, 0xFFFF, 0x1000, 0x2000, 0x3000)
    assert np.asarray(read_image(png(16, 2, [row], 2)))[0].tolist() == [[3, 128, 255], [16, 32, 48]]


def test_the_first_picture_of_a_phone_s_jpeg_is_the_picture():
    small = Image.fromarray(RGB[:2, :2])
    data = encoded(Image.fromarray(RGB), "MPO", save_all=True, append_images=[small])
    assert read_image(data).size == (7, 5)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"hello", "p.png is not a picture that can be read; allowed are PNG"),
        (encoded(Image.fromarray(RGB), "GIF"), "is not a picture that can be read"),
        (encoded(Image.fromarray(RGB))[:60], "p.png is not a readable picture"),
        (encoded(Image.fromarray(np.full((4, 4), 9, np.uint16))), "p.png has I;16 pixels"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "has F pixels"),
        (
            png(16, 2, [struct.pack(">3H", 1, 2, 3)], 1, trns=struct.pack(">3H", 1, 2, 3)),
            "key colour of 16 bits",
        ),
        *(
            (
                encoded(
                    Image.fromarray(RGB),
                    kind,
                    save_all=True,
                    append_images=[Image.fromarray(255 - RGB), Image.fromarray(RGB[::-1].copy())],
                ),
                "p.png holds 3 frames",
            )
            for kind in ("PNG", "WEBP", "TIFF")
        ),
        (encoded(Image.new("1", (40_000, 2))), "p.png is 40000x2; at most"),
    ],
)
def test_what_is_no_still_picture_of_8_bits_is_refused_in_a_sentence(data, said):
    with pytest.raises(DataError, match=said):
        read_image(data, "p.png")


def test_a_field_s_reader_and_the_pictures_reader_agree(tmp_path):
    path = tmp_path / "a.png"
    alpha = np.random.default_rng(4).integers(0, 255, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(alpha).save(path, exif=turned(6))
    rgba = read_rgba(path)
    over_white = (rgba[..., :3] + 1 - rgba[..., 3:]) * 255
    assert np.abs(over_white.numpy() - np.asarray(on_white(read_image(path)))).max() <= 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP"])
def test_the_command_line_sends_what_training_would_read(tmp_path, image_format):
    path = tmp_path / "photograph"
    mark = {} if image_format == "BMP" else {"exif": turned(8)}
    Image.fromarray(RGB).save(path, image_format, **mark)
    sent = generate._read(path, "image")
    assert sent.startswith(b"\x89PNG")
    assert torch.equal(decode(sent, "sent"), decode(path, "file"))
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(DataError, match="--image .*photograph is not a") as caught:
        generate._read(path, "image")
    assert caught.value.field == "image"


def test_all_damaged_pictures_are_named_at_once():
    def read(number):
        if number % 2:
            raise DataError(f"picture {number} is bad", field="data.path")
        return number

    assert read_all([0, 2, 4], read) == [0, 2, 4]
    with pytest.raises(DataError) as caught:
        read_all(range(50), read)
    said = str(caught.value)
    assert said.startswith("25 of 50 pictures cannot be used: picture 1 is bad; picture 3 is bad; ")
    assert said.count("is bad") == 20
    assert said.endswith("and 5 more")
    assert caught.value.field == "data.path"


def test_pictures_are_read_without_torch():
    code = "import sys, distill_core.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
