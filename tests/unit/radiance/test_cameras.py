"""Cameras: axes by hand, orbits by geometry, refusals by sentence."""

import math

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.radiance.cameras.camera import Camera, look_at, orbit_camera
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics

EYE = torch.eye(4)


def test_an_identity_pose_looks_along_minus_z_with_x_right_and_y_up():
    camera = Camera(EYE, fx=2.0, fy=4.0, cx=2.0, cy=1.0, width=4, height=2)
    origins, directions = camera.rays()
    assert origins.shape == (8, 3)
    assert origins.abs().max() == 0
    # The first row ends 1.5 right of and 0.5 above the principal point; the focal lengths are 2 and 4.
    by_hand = torch.tensor([1.5 / 2, 0.5 / 4, -1.0])
    torch.testing.assert_close(directions[3], by_hand / by_hand.norm())
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(8))


def test_a_pose_turns_and_moves_the_rays():
    # The camera stands at (5, 0, 0) and looks along -x: its right is world +y, its up world +z.
    pose = torch.tensor([[0.0, 0, 1, 5], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    origins, directions = Camera(pose, 1.0, 1.0, 0.5, 0.5, 1, 1).rays()
    torch.testing.assert_close(origins[0], torch.tensor([5.0, 0, 0]))
    torch.testing.assert_close(directions[0], torch.tensor([-1.0, 0, 0]))
    torch.testing.assert_close(look_at((5.0, 0.0, 0.0)), pose)


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (90, 30), (211, -45), (10, 90), (33, -90)])
def test_an_orbit_camera_looks_at_its_target_from_its_radius(azimuth, elevation):
    target = (0.5, -1.0, 2.0)
    camera = orbit_camera(azimuth, elevation, 3.0, fov_degrees=40, width=7, height=5, target=target)
    origins, directions = camera.rays()
    reached = origins[17] + 3.0 * directions[17]  # the middle pixel's ray, `radius` further on
    torch.testing.assert_close(reached, torch.tensor(target), atol=1e-5, rtol=0)
    torch.testing.assert_close(camera.c2w[:3, :3] @ camera.c2w[:3, :3].T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.linalg.det(camera.c2w[:3, :3]) == pytest.approx(1, abs=1e-5)
    assert camera.c2w[2, 3] - target[2] == pytest.approx(3 * math.sin(math.radians(elevation)), abs=1e-5)


def test_a_reduced_camera_sees_the_same_view_in_larger_pixels():
    small = Camera(EYE, fx=20.0, fy=30.0, cx=9.0, cy=4.5, width=17, height=8).reduced(3)
    assert (small.width, small.height) == (6, 3)
    assert small.intrinsics().tolist() == pytest.approx([20 / 3, 10.0, 3.0, 1.5])


def test_world_up_is_up_in_the_picture():
    camera = orbit_camera(25, 20, 3.0, fov_degrees=40, width=3, height=3)
    directions = camera.rays().directions
    assert directions[1, 2] > directions[4, 2] > directions[7, 2]


def test_the_field_of_view_spans_the_width():
    camera = orbit_camera(0, 0, 3.0, fov_degrees=90, width=1000, height=10)
    left, right = camera.rays().directions[5000], camera.rays().directions[5999]
    assert math.degrees(math.acos(float(left @ right))) == pytest.approx(90, abs=0.1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"c2w": torch.full((4, 4), math.nan)}, "c2w"),
        ({"c2w": torch.zeros(4, 4)}, "c2w"),
        ({"c2w": torch.eye(3)}, "c2w"),
        ({"width": 0}, "width"),
        ({"height": -3}, "height"),
        ({"fx": 0.0}, "fx"),
        ({"fy": math.inf}, "fy"),
        ({"cx": math.nan}, "cx"),
    ],
)
def test_an_impossible_camera_is_refused_and_its_field_named(change, field):
    values = {"c2w": EYE, "fx": 1.0, "fy": 1.0, "cx": 1.0, "cy": 1.0, "width": 2, "height": 2}
    with pytest.raises(ConfigError) as caught:
        Camera(**(values | change))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"azimuth_deg": math.nan}, "azimuth"),
        ({"radius": 0}, "radius"),
        ({"fov_degrees": 180}, "fov_degrees"),
    ],
)
def test_an_impossible_orbit_is_refused_and_its_field_named(change, field):
    values = {"azimuth_deg": 0, "elevation_deg": 0, "radius": 2, "fov_degrees": 40, "width": 4, "height": 4}
    with pytest.raises(ConfigError) as caught:
        orbit_camera(**(values | change))
    assert caught.value.field == field


def test_the_harmonics_are_orthonormal_over_the_sphere():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=generator), dim=-1)
    basis = spherical_harmonics(directions, 4)
    gram = 4 * math.pi * basis.T @ basis / len(basis)
    torch.testing.assert_close(gram, torch.eye(16), atol=0.03, rtol=0)


def test_the_first_band_has_the_signs_of_3dgs():
    basis = spherical_harmonics(torch.eye(3), 2)
    c1 = 0.48860251
    torch.testing.assert_close(basis[:, 1:], c1 * torch.tensor([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]]))
