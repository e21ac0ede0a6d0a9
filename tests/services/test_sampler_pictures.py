"""Requests that begin from pictures, over a socket: editing, inpainting, super-resolution."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError
from tests.services.sampler_helpers import SamplerProcess, publish_denoiser

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


def encoded(size, image_format="PNG"):
    buffer = io.BytesIO()
    Image.new("L", size, 100).save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        ({"image": b"not a picture"}, "image.image", "is no picture that can be read"),
        ({"image": encoded((8, 8))[:-30]}, "image.image", "breaks off"),
        ({"image": encoded((8, 8), "GIF")}, "image.image", "PNG, JPEG, WEBP"),
        ({"image": encoded((16, 8))}, "image.image", "is 16 x 8 pixels, and digits@1 makes 8 x 8"),
        ({"image": encoded((20_000, 20_000))}, "image.image", "no picture|20000 x 20000"),
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
