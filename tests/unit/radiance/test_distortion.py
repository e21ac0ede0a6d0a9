"""Lens distortion against the forward models, against hand-computed numbers, and on a camera's rays."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.radiance.cameras.camera import Camera
from distill_core.radiance.cameras.distortion import distort, look_through

FOX = (0.058, -0.081, 0.0, 0.0, -0.0005, 0.0008)  # like a telephone's lens
FISHEYE = (0.05, -0.01, 0.002, -0.0003, 0.0, 0.0)
GRID = torch.cartesian_prod(torch.linspace(-0.8, 0.8, 9), torch.linspace(-0.6, 0.6, 7)).double()


@pytest.mark.parametrize(
    ("lens", "fisheye"), [(FOX, False), ((0.3, 0.1, 0.05, 0.02, 0.01, -0.02), False), (FISHEYE, True)]
)
def test_looking_through_a_lens_undoes_its_distortion(lens, fisheye):
    coefficients = torch.tensor(lens, dtype=torch.double).expand(len(GRID), 6)
    seen = look_through(distort(GRID, coefficients, fisheye=fisheye), coefficients, fisheye=fisheye)
    torch.testing.assert_close(seen[:, :2] / seen[:, 2:], GRID, atol=1e-9, rtol=0)


def test_the_perspective_model_is_opencv_s():
    """By hand: x = 0.5, y = 0.25, r2 = 0.3125; g = 1 + 0.1 r2 + 0.2 r4; p1 = 0.01, p2 = 0.02."""
    x, y, r2 = 0.5, 0.25, 0.3125
    g = 1 + 0.1 * r2 + 0.2 * r2**2
    wanted = [
        x * g + 2 * 0.01 * x * y + 0.02 * (r2 + 2 * x * x),
        y * g + 2 * 0.02 * x * y + 0.01 * (r2 + 2 * y * y),
    ]
    found = distort(torch.tensor([[x, y]]), torch.tensor([[0.1, 0.2, 0, 0, 0.01, 0.02]]), fisheye=False)
    torch.testing.assert_close(found, torch.tensor([wanted]))


def test_an_equidistant_fisheye_sees_sideways():
    """Without coefficients the distance from the centre is the angle itself: pi / 2 looks along x."""
    plane = torch.tensor([[math.pi / 2, 0.0], [0.0, math.pi / 4], [0.0, 0.0]], dtype=torch.double)
    seen = look_through(plane, torch.zeros(3, 6), fisheye=True)
    half = math.sqrt(0.5)
    wanted = torch.tensor([[1.0, 0, 0], [0, half, half], [0, 0, 1]], dtype=torch.double)
    torch.testing.assert_close(seen, wanted, atol=1e-12, rtol=0)


def test_a_lens_without_coefficients_is_a_pinhole():
    plain = Camera(torch.eye(4), 8.0, 9.0, 4.0, 2.5, 8, 5)
    lens = Camera(torch.eye(4), 8.0, 9.0, 4.0, 2.5, 8, 5, distortion=(0.0,) * 6)
    torch.testing.assert_close(lens.rays().directions, plain.rays().directions)


def test_barrel_distortion_bends_the_rays_at_the_rim_outwards():
    plain = Camera(torch.eye(4), 8.0, 8.0, 4.0, 4.0, 8, 8).rays().directions
    bent = Camera(torch.eye(4), 8.0, 8.0, 4.0, 4.0, 8, 8, distortion=(-0.2, 0, 0, 0, 0, 0)).rays().directions
    away = [(1 - d[:, 2].abs()).reshape(8, 8) for d in (plain, bent)]
    assert (away[1] > away[0]).all()
    assert (away[1] - away[0])[0, 0] > (away[1] - away[0])[3, 3]


@pytest.mark.parametrize("lens", [(0.1,), (float("nan"),) * 6])
def test_coefficients_are_six_finite_numbers(lens):
    with pytest.raises(ConfigError, match="k1 k2 k3 k4 p1 p2"):
        Camera(torch.eye(4), 8.0, 8.0, 4.0, 4.0, 8, 8, distortion=lens)
