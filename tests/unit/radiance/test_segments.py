"""Segments along rays against all samples at once, batches against single tiles, normals against autograd."""

import math

import pytest
import torch
from torch import nn

from distill_core.artifacts import SceneSpec
from distill_core.errors import ConfigError
from distill_core.networks.fields import FIELDS, build_field
from distill_core.radiance.cameras.camera import Camera, Rays, orbit_camera
from distill_core.radiance.rendering.march import march
from distill_core.radiance.rendering.occupancy import is_occupied
from distill_core.radiance.rendering.segments import STOP_TRANSMITTANCE, density_normals, render_tiles
from distill_core.radiance.scenes.scene import (
    Scene,
    bands,
    develop,
    refined,
    render,
    render_rays,
    render_samples,
)
from distill_core.recipe.tables import NetworkConfig

BOUND, STEPS = 1.0, 64
SPEC = SceneSpec(field="hash", bound=BOUND, radius=2.8)


class Ball(nn.Module):
    """Density e^(sharpness (radius - |x|)), so that the slope of its logarithm points away from the centre."""

    def __init__(self, radius: float = 0.5, sharpness: float = 60.0, channels: int = 3) -> None:
        super().__init__()
        self.radius, self.sharpness, self.channels, self.points = radius, sharpness, channels, 0

    def log_density(self, positions):
        return self.sharpness * (self.radius - positions.norm(dim=-1))

    def forward(self, positions, directions):
        self.points += len(positions)
        return self.log_density(positions).exp(), positions.new_full((len(positions), self.channels), 0.5)


def camera(size: int = 24, azimuth: float = 40.0) -> Camera:
    return orbit_camera(azimuth, 30, 2.8, fov_degrees=40, width=size, height=size)


def structured(kind: str) -> nn.Module:
    torch.manual_seed(0)
    field = build_field(NetworkConfig(name=kind), BOUND).eval().requires_grad_(False)
    if kind == "hash":
        field.table.normal_(0, 2)
    return field


def scattered() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(8, 8, 8) > 0.4


@pytest.mark.parametrize("filled", [0.0, 0.03, 0.6, 1.0])
def test_marching_inside_the_set_cells_box_finds_the_samples_that_a_filter_finds(filled):
    torch.manual_seed(2)
    occupied = torch.rand(9, 9, 9) < filled
    rays = camera().rays()
    everywhere = march(rays, bound=BOUND, num_steps=STEPS, occupied=None)
    kept = is_occupied(occupied, everywhere.positions, BOUND)
    found = march(rays, bound=BOUND, num_steps=STEPS, occupied=occupied)
    assert torch.equal(found.positions, everywhere.positions[kept])
    assert torch.equal(found.ray, everywhere.ray[kept])
    assert (len(found.ray) > 0) == (filled > 0)


@pytest.mark.parametrize("kind", ["hash", "mlp"])
def test_segments_with_early_stop_equal_all_samples_at_once(kind):
    field, occupied, rays = structured(kind), scattered(), camera().rays()
    samples = march(rays, bound=BOUND, num_steps=STEPS, occupied=occupied)
    whole = render_samples(field, rays, samples)
    (parts,) = render_tiles(field, [rays], bound=BOUND, num_steps=STEPS, occupied=occupied)
    furthest = float(samples.distance.max())
    assert float((parts - whole).abs().max()) < STOP_TRANSMITTANCE * furthest + 1e-5


def test_a_grid_around_what_is_dense_changes_nothing_and_saves_work():
    ball, rays = Ball(), camera(32).rays()
    centres = (torch.arange(16) + 0.5) / 8 - 1
    cells = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij"), -1)
    near = cells.norm(dim=-1) < 0.5 + 0.3
    (sparse,) = render_tiles(ball, [rays], bound=BOUND, num_steps=128, occupied=near)
    few, ball.points = ball.points, 0
    dense = render_samples(ball, rays, march(rays, bound=BOUND, num_steps=128, occupied=None))
    assert ball.points > 4 * few
    assert float((sparse - dense).abs().max()) < 1e-3


def test_no_light_means_no_more_samples():
    wall = Ball(radius=3.0)  # everything is opaque
    render_tiles(wall, [camera(32).rays()], bound=BOUND, num_steps=200, occupied=None)
    assert wall.points <= 32 * 32 * 4 + 64


@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_a_tile_is_bit_for_bit_the_same_alone_and_with_others(kind, normals):
    torch.set_num_threads(1)
    scene = Scene(structured(kind), scattered(), SPEC, STEPS)
    cameras = [camera(size, azimuth) for size, azimuth in ((3, 0), (17, 50), (9, 100), (1, 7), (13, 222))]
    tiles = [view.rays() for view in cameras]
    with torch.inference_mode():
        together = render_rays(scene, tiles, normals=normals)
        for tile, joined in zip(tiles, together):
            (alone,) = render_rays(scene, [tile], normals=normals)
            assert torch.equal(alone, joined)


def test_bands_of_rows_are_bit_for_bit_the_whole_picture():
    torch.set_num_threads(1)
    scene, view = Scene(structured("hash"), scattered(), SPEC, STEPS), camera(20)
    whole = render(scene, view, normals=True)
    rows = bands(20, 20, 70)
    assert [len(part) for part in rows] == [3] * 6 + [2]
    with torch.inference_mode():
        parts = [develop(scene, render_rays(scene, [view.rays(part)], normals=True)[0], 20) for part in rows]
    for name in whole._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_normals_of_a_ball_point_away_from_its_centre():
    ball = Ball(radius=0.6)
    view = camera(33)
    shown = render(Scene(ball, torch.ones(4, 4, 4, dtype=torch.bool), SPEC, 400), view, normals=True)
    rays = view.rays()
    surface = (rays.origins + shown.depth.reshape(-1, 1) * rays.directions).reshape(33, 33, 3)
    expected = nn.functional.normalize(surface, dim=-1)
    solid = shown.opacity > 0.999
    assert int(solid.sum()) > 150
    cosine = (shown.normal * expected).sum(-1)[solid]
    assert float(cosine.min()) > math.cos(math.radians(6))
    assert float(cosine.mean()) > math.cos(math.radians(2))
    torch.testing.assert_close(shown.normal.norm(dim=-1), shown.opacity, atol=1e-3, rtol=0)
    assert float(shown.normal[shown.opacity == 0].abs().sum()) == 0


def test_normals_are_those_of_autograd():
    def log_density(x):
        return (3 * x[:, 0]).sin() + 5 * x[:, 1] * x[:, 2] - (4 * x[:, 2]).exp()

    positions = torch.rand(50, 3).requires_grad_(True)
    (slope,) = torch.autograd.grad(log_density(positions).sum(), positions)
    found = density_normals(log_density, positions.detach(), 0.01)
    torch.testing.assert_close(found, nn.functional.normalize(-slope, dim=-1), atol=2e-3, rtol=0)


def test_pictures_without_normals_have_none():
    assert render(Scene(Ball(), scattered(), SPEC, 32), camera(4)).normal is None


@pytest.mark.parametrize("empty", [False, True])
def test_latent_fields_are_rendered_but_are_no_pictures(empty):
    occupied = torch.zeros(4, 4, 4, dtype=torch.bool) if empty else scattered()
    scene = Scene(Ball(channels=4), occupied, SPEC, 32)
    (rendered,) = render_rays(scene, [camera(5).rays()])
    assert rendered.shape == (25, 6)
    assert bool(rendered[:, :4].any()) is not empty
    with pytest.raises(ConfigError, match="4 channels, a latent"):
        develop(scene, rendered, 5)


def test_a_camera_inside_an_object_sees_it_at_once():
    inside = Rays(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]))
    (seen,) = render_tiles(Ball(), [inside], bound=BOUND, num_steps=100, occupied=None)
    assert float(seen[0, 4]) == pytest.approx(1, abs=1e-3)
    assert float(seen[0, 3]) < 0.1


def test_larger_pixels_lie_over_those_that_they_replace():
    view = orbit_camera(10, 20, 2.8, fov_degrees=40, width=12, height=9)
    small = view.reduced(4)
    assert (small.width, small.height) == (3, 3)
    fine = view.rays().directions.reshape(9, 12, 3)[:8]
    middle = nn.functional.normalize(fine.reshape(2, 4, 3, 4, 3).mean((1, 3)), dim=-1)
    torch.testing.assert_close(small.rays(range(2)).directions.reshape(2, 3, 3), middle, atol=1e-3, rtol=0)


def test_smaller_cells_lie_where_the_field_is_dense_and_show_the_same_picture():
    ball = Ball(radius=0.4)
    coarse = Scene(ball, torch.ones(32, 32, 32, dtype=torch.bool), SPEC, 100)
    fine = refined(coarse)
    size = len(fine.occupied)
    assert size == 128
    centres = (torch.arange(size) + 0.5) * 2 / size - 1
    distance = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij"), -1).norm(dim=-1)
    assert bool(fine.occupied[distance < 0.4].all())
    assert float(distance[fine.occupied].max()) < 0.4 + math.log(10) / 60 * 3 + 2 * 2 / size
    shown, expected = render(fine, camera()), render(coarse, camera())
    assert float((shown.opacity - expected.opacity).abs().max()) < 0.03
    holed = coarse.occupied & (torch.arange(32) > 15)
    halved = refined(Scene(ball, holed, SPEC, 100))
    assert not halved.occupied[:, :, :64].any()  # what training found empty stays so


class Haze(Ball):
    """A ball in air that hides little in one step and much across the box."""

    def log_density(self, positions):
        return super().log_density(positions).clamp_min(math.log(0.09))


@pytest.mark.slow
def test_a_finer_grid_that_would_show_is_not_taken():
    hazy = Scene(Haze(radius=0.4), torch.ones(32, 32, 32, dtype=torch.bool), SPEC, 32)
    assert float(render(hazy, camera()).opacity[0, 12]) > 0.05  # of the air alone
    assert refined(hazy) is hazy
    clear = Scene(Ball(radius=0.4), torch.ones(32, 32, 32, dtype=torch.bool), SPEC, 32)
    assert len(refined(clear).occupied) == 128


@pytest.mark.slow
def test_thin_fog_is_not_taken_for_empty_and_large_grids_stay_as_they_are():
    fog = Scene(Ball(radius=-0.1, sharpness=1e-3), torch.ones(8, 8, 8, dtype=torch.bool), SPEC, 4096)
    assert float(fog.field.log_density(torch.zeros(1, 3)).exp()) * 2 * 3**0.5 / 4096 < 0.01  # of one step
    assert float(refined(fog).occupied.float().mean()) > 0.3
    nothing = Scene(Ball(), torch.zeros(8, 8, 8, dtype=torch.bool), SPEC, 32)
    assert not refined(nothing).occupied.any()
    large = Scene(Ball(), torch.ones(65, 65, 65, dtype=torch.bool), SPEC, 32)
    assert refined(large) is large
