"""Requests that begin from pictures, over a socket: editing, inpainting, super-resolution."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser

PICTURE = np.random.default_rng(5).integers(30, 220, (8, 8, 1), dtype=np.uint8)
HOLE = np.zeros((8, 8), bool)
HOLE[2:6, 3:7] = True


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    publish_denoiser(ArtifactStore(folder / "store"), folder / "model")
    with SamplerProcess(str(folder / "store")) as process:
        yield process.client()


def test_a_hole_is_filled_and_the_rest_is_kept_to_the_bit(sampler):
    (made,) = sampler.generate("digits", class_labels=[3], seed=4, image=PICTURE, mask=HOLE)
    (plain,) = sampler.generate("digits", class_labels=[3], seed=4)
    assert np.array_equal(made[~HOLE], PICTURE[~HOLE])
    # the hole starts as the same noise as a plain picture, and this network looks at each pixel by itself
    assert np.abs(made[HOLE].astype(int) - plain[HOLE]).max() <= 1


def test_an_enlarged_picture_shrinks_to_what_was_sent(sampler):
    small = np.random.default_rng(6).integers(60, 190, (4, 4, 1), dtype=np.uint8)
    made, other = sampler.generate("digits", class_labels=[2, 7], num_steps=4, image=small, upscale=True)
    for picture in (made, other):
        means = picture.astype(float).reshape(4, 2, 4, 2).mean((1, 3))
        inside = (picture.reshape(4, 2, 4, 2) % 255 != 0).all((1, 3))  # clipping moves a mean
        assert inside.sum() >= 8
        assert np.abs(means - small[..., 0])[inside].max() <= 1
    assert not np.array_equal(made, other)


def test_strength_says_how_much_of_the_picture_is_left(sampler):
    def far(strength):
        options = {"class_labels": [1], "seed": 2, "num_steps": 4, "image": PICTURE, "strength": strength}
        return np.abs(sampler.generate("digits", **options)[0].astype(float) - PICTURE).mean()

    assert far(0.25) < far(1.0)
    assert far(0.5) == far(None)


def test_a_picture_s_result_depends_on_its_own_request_alone(sampler):
    rng = np.random.default_rng(7)
    pictures = rng.integers(0, 255, (8, 8, 8, 1), dtype=np.uint8)

    def ask(index):
        masked = {"mask": HOLE} if index % 2 else {}
        return sampler.generate("digits", class_labels=[index], seed=index, image=pictures[index], **masked)[
            0
        ]

    alone = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert all(map(np.array_equal, pool.map(ask, range(8)), alone))


def as_bytes(pixels, image_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def kept(sampler, picture):
    """What of a picture a model begins from: with a mask that makes nothing anew, the answer is the picture."""
    (made,) = sampler.generate("digits", class_labels=[3], image=picture, mask=np.zeros((8, 8), bool))
    return made[..., 0]


def test_a_picture_is_read_as_data_of_training_are(sampler):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = PICTURE[..., 0]
    assert np.array_equal(kept(sampler, as_bytes(grey, exif=exif)), grey[::-1].T)
    key = as_bytes(grey, transparency=int(grey[2, 5]))
    assert np.array_equal(kept(sampler, key), np.where(grey == grey[2, 5], 255, grey))
    clear = np.stack([grey, np.where(np.arange(8) < 3, 0, 255).astype(np.uint8).repeat(8).reshape(8, 8)], -1)
    assert np.array_equal(kept(sampler, as_bytes(clear)), np.where(np.arange(8)[:, None] < 3, 255, grey))
    wide = np.zeros((8, 4), np.uint8)
    with pytest.raises(ConfigError, match="is 8 x 4 pixels, and digits@1 makes 8 x 8"):
        sampler.generate("digits", class_labels=[3], image=as_bytes(wide, exif=exif))


def encoded(size, image_format="PNG"):
    buffer = io.BytesIO()
    Image.new("L", size, 100).save(buffer, image_format)
    return buffer.getvalue()


FRAMES = as_bytes(PICTURE[..., 0], save_all=True, append_images=[Image.fromarray(255 - PICTURE[..., 0])])


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        ({"image": b"not a picture"}, "image.image", "is not a picture that can be read"),
        ({"image": encoded((8, 8))[:-30]}, "image.image", "breaks off"),
        ({"image": encoded((8, 8), "GIF")}, "image.image", "PNG, JPEG, WEBP"),
        ({"image": FRAMES}, "image.image", "holds 2 frames"),
        ({"image": as_bytes(np.full((8, 8), 9, np.uint16))}, "image.image", "has I;16 pixels"),
        ({"image": encoded((16, 8))}, "image.image", "is 16 x 8 pixels, and digits@1 makes 8 x 8"),
        ({"image": encoded((20_000, 20_000))}, "image.image", "not a readable picture|20000 x 20000"),
        ({"image": PICTURE, "mask": encoded((4, 4))}, "image.mask", "is 4 x 4 pixels"),
        ({"image": PICTURE, "mask": encoded((8, 8))[:-30]}, "image.mask", "breaks off"),
        ({"image": PICTURE, "strength": 0.0}, "image.strength", "above 0, up to 1"),
        ({"image": PICTURE, "strength": 1.5}, "image.strength", "above 0, up to 1"),
        ({"image": PICTURE, "strength": float("nan")}, "image.strength", "above 0, up to 1"),
        ({"image": PICTURE, "upscale": True}, "image.image", "cannot enlarge"),
        ({"image": encoded((3, 4)), "upscale": True}, "image.image", "cannot enlarge"),
        ({"mask": HOLE}, "image", "give image"),
        ({"image": PICTURE.astype(float)}, "image", "float64"),
    ],
)
def test_pictures_that_cannot_be_are_refused_in_a_sentence(sampler, options, field, said):
    with pytest.raises(ConfigError, match=said) as caught:
        sampler.generate("digits", class_labels=[1], **options)
    assert caught.value.field == field
