"""Virtual poses: where they stand, that they look at the scene, and what pictures their rays fill."""

import math

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.radiance.cameras.camera import look_at
from distill_core.radiance.cameras.sampling import (
    POSES_PER_DEGREE,
    PoseConfig,
    draw_poses,
    draw_rays,
    look_at_centre,
    turned,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def elevations(poses):
    centres = poses[:, :3, 3]
    return (centres[:, 2] / centres.norm(dim=-1)).asin().rad2deg()


def test_an_object_is_seen_from_above_and_from_more_poses_near_the_equator():
    assert POSES_PER_DEGREE[[0, 1, 15, 16, 79]].tolist() == [7, 6, 6, 5, 1]
    poses = draw_poses(PoseConfig(), 2.5, 2000)
    torch.testing.assert_close(poses[:, :3, 3].norm(dim=-1), torch.full((2000,), 2.5))
    up = elevations(poses)
    assert float(up.min()) >= -1e-3
    assert float(up.max()) <= 79.001
    share = POSES_PER_DEGREE / POSES_PER_DEGREE.sum()
    assert float((up <= 15).float().mean()) > float(share[:16].sum()) - 0.04
    assert float((up >= 65).float().mean()) < float(share[65:].sum()) + 0.03
    azimuth = torch.atan2(poses[:, 1, 3], poses[:, 0, 3])
    assert [int(((azimuth > low) & (azimuth < low + math.pi / 2)).sum()) > 400 for low in (-math.pi, 0)] == [
        True
    ] * 2


def test_every_pose_looks_at_the_centre():
    for config in (PoseConfig(), PoseConfig(kind="tank"), front()):
        poses = draw_poses(config, 3.0, 20)
        towards = torch.nn.functional.normalize(-poses[:, :3, 3], dim=-1)
        torch.testing.assert_close(-poses[:, :3, 2], towards, atol=1e-5, rtol=0)


def test_many_poses_are_those_of_one_at_a_time():
    eyes = torch.cat([torch.randn(20, 3), torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, -1.0]])])
    expected = torch.stack([look_at(eye) for eye in eyes.tolist()])
    torch.testing.assert_close(look_at_centre(eyes), expected, atol=1e-6, rtol=1e-5)


def front():
    return PoseConfig(kind="forward_facing", centre_box=(-0.5, -3.0, -0.2, 0.5, -2.0, 0.4))


def test_forward_facing_centres_fill_their_box():
    centres = draw_poses(front(), 9.0, 500)[:, :3, 3]
    for axis, (low, high) in enumerate([(-0.5, 0.5), (-3.0, -2.0), (-0.2, 0.4)]):
        assert low <= float(centres[:, axis].min()) < low + 0.05
        assert high - 0.05 < float(centres[:, axis].max()) <= high


def test_a_tank_is_circled_at_low_elevation_between_three_quarters_and_all_of_the_radius():
    poses = draw_poses(PoseConfig(kind="tank"), 4.0, 500)
    radius, up = poses[:, :3, 3].norm(dim=-1), elevations(poses)
    assert 2.999 <= float(radius.min()) < 3.05
    assert 3.95 < float(radius.max()) <= 4.001
    assert 4.99 <= float(up.min()) < 6
    assert 18 < float(up.max()) <= 19.01


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "forward_facing"}, "centre_box"),
        ({"kind": "tank", "centre_box": [0, 0, 0, 1, 1, 1]}, "forward_facing"),
        ({"kind": "forward_facing", "centre_box": [1, 0, 0, 0, 1, 1]}, "empty"),
    ],
)
def test_a_wrong_sampler_says_what_belongs_to_it(values, said):
    with pytest.raises(ConfigError, match=said):
        PoseConfig.parse(values)


def test_rays_fill_the_picture_and_are_shared_out_among_the_poses():
    poses = torch.stack([look_at((0.0, -3.0, 0.0)), look_at((3.0, 0.0, 0.0))])
    rays = draw_rays(poses, 40.0, 4000)
    assert [int((rays.origins == poses[i, :3, 3]).all(-1).sum()) for i in (0, 1)] == [2000, 2000]
    seen = rays.directions[rays.origins[:, 1] < -1]
    across = (seen[:, 0] / seen[:, 1]).atan().rad2deg()  # this camera looks along +y
    assert -20.01 <= float(across.min()) < -19.5
    assert 19.5 < float(across.max()) <= 20.01


def test_a_turned_pose_keeps_its_place_and_turns_by_no_more_than_asked():
    poses = draw_poses(PoseConfig(), 2.0, 200)
    out = turned(poses, 9.0)
    assert torch.equal(out[:, :3, 3], poses[:, :3, 3])
    rotations = out[:, :3, :3]
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(200, 3, 3), atol=1e-5, rtol=0)
    angle = (out[:, :3, 2] * poses[:, :3, 2]).sum(-1).clamp(-1, 1).acos().rad2deg()
    assert 5 < float(angle.max()) < 9 * math.sqrt(2) + 0.1
    assert torch.equal(turned(poses, 0.0), poses)
