"""Sampling from a picture, against the Gaussian whose denoiser and ODE are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core.diffusion.image_to_image import InitImage
from distill_core.diffusion.noise import unit_normal
from distill_core.diffusion.sampling import SamplerSpec, sample

MEAN, STD = 0.7, 0.4
SHAPE = (2, 3, 4, 6)
Y = np.stack([unit_normal(9, index, 0, SHAPE[1:]) for index in range(2)])
KNOWN = (unit_normal(4, 0, 0, (2, 1, 4, 6)) > 0).astype(np.float32)
HEUN = SamplerSpec(kind="heun", sigma_min=0.002, sigma_max=20.0, noise_scale=20.0, num_steps=64, max_steps=64)
FEW = SamplerSpec.few_step((20.0, 5.0, 1.0, 0.2), noise_scale=20.0)


def denoise(x, sigma):
    """E[x0 | x_sigma] for x0 ~ N(MEAN, STD^2)."""
    return MEAN + (x - MEAN) * (STD**2 / (STD**2 + sigma**2))


def draw(k: int) -> np.ndarray:
    return np.stack([unit_normal(1, index, k, SHAPE[1:]) for index in range(2)])


@pytest.mark.parametrize("spec", [HEUN, FEW])
def test_known_pixels_come_out_as_they_went_in_and_the_others_do_not(spec):
    x0 = sample(denoise, spec, draw, 4, InitImage(Y, 1.0, KNOWN))
    where = np.broadcast_to(KNOWN > 0, SHAPE)
    assert np.abs(x0 - Y)[where].max() < 1e-5
    assert np.abs(x0 - Y)[~where].min() > 1e-4


def test_nothing_of_the_picture_is_left_where_it_is_made_anew():
    other = np.where(KNOWN > 0, Y, -5.0).astype(np.float32)
    first, second = (sample(denoise, FEW, draw, 4, InitImage(y, 1.0, KNOWN)) for y in (Y, other))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("spec", [HEUN, FEW])
@pytest.mark.parametrize("block", [2, (1)])
def test_the_means_over_blocks_are_those_of_the_picture(spec, block):
    x0 = sample(denoise, spec, draw, 4, InitImage(Y, 0.75, block=block))
    means = [v.reshape(2, 3, 2, 2, 3, 2).mean((3, 5)) for v in (x0, Y)]
    assert (np.abs(means[0] - means[1]).max() < 1e-5) == (block == 2)


def test_what_is_not_known_is_what_the_network_says():
    """Restoring changes the part that A sees and nothing else: within a block, differences are the network's."""
    x0 = denoise(Y * 3, 1.0)
    held = InitImage(Y, 1.0, block=2).restore(x0)
    inside = [np.diff(v.reshape(2, 3, 2, 2, 3, 2), axis=5) for v in (x0, held)]
    assert np.allclose(*inside, atol=1e-6)
    masked = InitImage(Y, 1.0, KNOWN).restore(x0)
    where = np.broadcast_to(KNOWN > 0, SHAPE)
    assert np.array_equal(masked[~where], x0[~where])


def test_editing_is_the_ode_from_the_noised_picture():
    init_image = InitImage(Y, 0.5)
    sigma = init_image.levels(HEUN.levels(64))[0]
    start = Y + sigma * draw(0)
    exact = MEAN + (start - MEAN) * STD / np.sqrt(STD**2 + sigma**2)
    assert np.abs(sample(denoise, HEUN, draw, 64, init_image) - exact).mean() < 0.01


@pytest.mark.parametrize(
    ("strength", "count"), [(1.0, 4), (0.75, 3), (0.6, 3), (0.5, 2), (0.25, 1), (1e-6, 1)]
)
def test_strength_is_the_share_of_steps_that_is_done(strength, count):
    assert InitImage(Y, strength).levels(list(FEW.sigmas)) == list(FEW.sigmas[-count:])


def test_a_share_that_is_whole_steps_is_not_rounded_up():
    assert 0.28 * 25 > 7
    assert InitImage(Y, 0.28).levels(list(range(25, 0, -1))) == [7, 6, 5, 4, 3, 2, 1]


def test_a_weaker_change_stays_nearer_to_the_picture():
    far = [np.abs(sample(denoise, FEW, draw, 4, InitImage(Y, s)) - Y).mean() for s in (0.25, 0.5, 1.0)]
    assert far == sorted(far)


def test_torch_and_numpy_agree():
    y, known = torch.from_numpy(Y), torch.from_numpy(KNOWN)
    there = sample(denoise, FEW, lambda k: torch.from_numpy(draw(k)), 4, InitImage(y, 0.5, known, 2))
    assert np.allclose(there.numpy(), sample(denoise, FEW, draw, 4, InitImage(Y, 0.5, KNOWN, 2)), atol=1e-6)
