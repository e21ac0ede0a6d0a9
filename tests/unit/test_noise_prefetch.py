"""Noise prefetch: first draws that are made while images wait."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from distill_core.diffusion.noise import noise_of, unit_normal, unit_normals
from distillery_sampler.engine.noise_prefetch import AT_ONCE, NoisePrefetch
from distillery_sampler.engine.requests import ImageItem


def test_noise_of_many_images_is_that_of_each_to_the_bit():
    images = [(seed, index) for seed in (0, 7, 2**63 - 1) for index in range(5)]
    for shape in ((3, 16, 16), (1, 3, 5)):  # an odd count too
        together = unit_normals(images, 2, shape)
        assert together.dtype == np.float32
        for made, image in zip(together, images, strict=True):
            np.testing.assert_array_equal(made, unit_normal(*image, 2, shape))
            np.testing.assert_array_equal(made, unit_normals([image], 2, shape)[0])


def box_muller(seed: int, index: int, draw: int, count: int) -> np.ndarray:
    """As the docstring says it, from a generator of its own; `count` even."""
    bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, draw]).random_raw(count)
    first, second = np.split((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53, 2)
    radius, angle = np.sqrt(-2.0 * np.log1p(-first)), 2.0 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)


@pytest.fixture
def restless():
    """Threads take turns in the middle of everything."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_noise_is_box_mullers_of_philox_in_every_thread(restless):
    images = [(seed, index) for seed in (0, 7, 2**63 - 1) for index in range(100)]
    with ThreadPoolExecutor(4) as threads:
        for draw in (3, 0, 3):  # a thread's generator keeps nothing of what it drew before
            made = threads.map(lambda image, draw=draw: unit_normal(*image, draw, (3, 8, 8)), images)
            for image, pixels in zip(images, made, strict=True):
                np.testing.assert_array_equal(pixels.ravel(), box_muller(*image, draw, 192))


def test_what_is_drawn_ahead_is_what_the_image_would_have_drawn():
    prefetch = NoisePrefetch()
    items = [ImageItem(seed, index) for seed in range(AT_ONCE) for index in range(2)]
    small = ImageItem(3)
    given = ImageItem(5, draws={0: np.zeros((3, 8, 8), np.float32)})
    prefetch.request([*items, given], (3, 8, 8))
    prefetch.request([small], (1, 2, 2))
    prefetch.request(items[:1], (3, 8, 8))
    prefetch.close()
    while 0 not in small.draws:
        time.sleep(0.001)
    for item in items:
        np.testing.assert_array_equal(item.draws[0], unit_normal(item.seed, item.index, 0, (3, 8, 8)))
    assert not given.draws[0].any()
    np.testing.assert_array_equal(small.draws[0], unit_normal(3, 0, 0, (1, 2, 2)))


def test_who_comes_and_goes_faster_than_it_draws_fills_no_memory(monkeypatch):
    monkeypatch.setattr("distillery_sampler.engine.noise_prefetch.MAX_REQUESTS", 2)
    prefetch, busy = NoisePrefetch(), threading.Event()

    def slow(images, draw, shape):
        busy.wait()
        return unit_normals(images, draw, shape)

    monkeypatch.setattr("distill_core.diffusion.noise.unit_normals", slow)
    prefetch.request([ImageItem(0)], (1, 2, 2))
    while prefetch._requests.qsize():
        time.sleep(0.001)
    prefetch.request([ImageItem(seed) for seed in range(100)], (1, 2, 2))
    assert prefetch._requests.qsize() == 2
    prefetch.close()
    busy.set()


def test_images_with_and_without_a_draw_share_a_batch():
    items = [ImageItem(seed) for seed in range(4)]
    items[1].draws[0] = items[3].draws[0] = np.full((1, 2, 2), 5.0, np.float32)
    first = noise_of(items, 0, (1, 2, 2))
    assert (first[[1, 3]] == 5.0).all()
    for number in (0, 2):
        np.testing.assert_array_equal(first[number], unit_normal(number, 0, 0, (1, 2, 2)))
    np.testing.assert_array_equal(noise_of(items, 1, (1, 2, 2))[1], unit_normal(1, 0, 1, (1, 2, 2)))
