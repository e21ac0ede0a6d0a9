"""Marching, occupancy and compositing against closed forms."""

import math

import pytest
import torch

from distill_core.networks.fields import build_field
from distill_core.radiance.analytic.procedural import signed_distances
from distill_core.radiance.cameras.camera import Rays, orbit_camera
from distill_core.radiance.rendering.march import box_interval, fit_budget, march, step_length
from distill_core.radiance.rendering.occupancy import OccupancyGrid, cell_index, is_occupied
from distill_core.radiance.rendering.quadrature import composite, over, packed_weights, render_weights
from distill_core.recipe.tables import NetworkConfig


def axis_ray(distance: float = 4.0) -> Rays:
    return Rays(torch.tensor([[distance, 0.0, 0.0]]), torch.tensor([[-1.0, 0.0, 0.0]]))


def view(size: int = 12) -> Rays:
    return orbit_camera(30, 20, 3.0, fov_degrees=40, width=size, height=size).rays()


@pytest.mark.parametrize("density", [0.0, 0.3, 4.0, 500.0])
def test_a_slab_of_constant_density_has_its_closed_form_opacity(density):
    weights, _ = render_weights(torch.full((1, 50), density), torch.full((1, 50), 0.04))
    assert weights.sum() == pytest.approx(1 - math.exp(-density * 2), abs=1e-5)


def test_weights_are_the_opacity_and_light_left_before_each_sample():
    density = torch.rand(5, 30, generator=torch.Generator().manual_seed(0)) * 20
    weights, transmittance = render_weights(density, torch.full_like(density, 0.05))
    opacity = 1 - torch.exp(-0.05 * density.sum(-1))
    torch.testing.assert_close(weights.sum(-1), opacity)
    assert torch.equal(transmittance[:, 0], torch.ones(5))
    torch.testing.assert_close(transmittance[:, 1:], 1 - weights.cumsum(-1)[:, :-1])


def test_a_marched_box_of_constant_density_has_its_closed_form_opacity():
    samples = march(axis_ray(), bound=1.0, num_steps=400, occupied=None)
    weights = packed_weights(torch.full((len(samples.ray),), 0.7), samples)
    assert weights.sum() == pytest.approx(1 - math.exp(-0.7 * 2), abs=0.005)


def test_samples_lie_inside_the_box_in_order_and_one_step_apart():
    samples = march(view(), bound=0.8, num_steps=64, occupied=None)
    assert samples.positions.abs().max() <= 0.8 + 1e-5
    same = samples.ray[1:] == samples.ray[:-1]
    gaps = (samples.distance[1:] - samples.distance[:-1])[same]
    torch.testing.assert_close(gaps, torch.full_like(gaps, step_length(0.8, 64)), atol=1e-5, rtol=0)
    assert bool((samples.rank[1:][same] == samples.rank[:-1][same] + 1).all())
    assert bool((samples.rank[1:][~same] == 0).all())


def test_rays_that_miss_the_box_have_no_samples_and_show_the_background():
    rays = Rays(torch.tensor([[4.0, 3.0, 0.0], [4.0, 0.0, 0.0]]), torch.tensor([[-1.0, 0, 0], [-1.0, 0, 0]]))
    near, far = box_interval(rays, 1.0)
    assert near[0] >= far[0]
    assert (float(near[1]), float(far[1])) == (3.0, 5.0)
    samples = march(rays, bound=1.0, num_steps=32, occupied=None)
    assert set(samples.ray.tolist()) == {1}
    weights = packed_weights(torch.full((len(samples.ray),), 3.0), samples)
    colour = composite(weights, torch.zeros(len(weights), 3), samples)
    opacity = composite(weights, torch.ones(len(weights), 1), samples)
    assert over(colour, opacity, torch.ones(3))[0].tolist() == [1.0, 1.0, 1.0]


def test_a_colour_that_is_multiplied_already_is_laid_over_the_background():
    colour, opacity = torch.tensor([[0.12, 0.3, 0.0]]), torch.tensor([[0.4]])
    found = over(colour, opacity, torch.tensor([1.0, 0.5, 0.25]))
    torch.testing.assert_close(found, torch.tensor([[0.12 + 0.6, 0.3 + 0.3, 0.15]]))


def test_packed_marching_equals_dense_marching_on_a_full_grid():
    rays, bound, steps = view(), 1.0, 48
    full = torch.ones(8, 8, 8, dtype=torch.bool)
    packed = march(rays, bound=bound, num_steps=steps, occupied=full)

    def density(positions):
        return 3 * (1 - positions.norm(dim=-1)).clamp_min(0)

    weights = packed_weights(density(packed.positions), packed)
    colour = composite(weights, packed.positions, packed)

    delta = step_length(bound, steps)
    near, far = box_interval(rays, bound)
    distance = near[:, None] + (torch.arange(steps) + 0.5) * delta
    positions = rays.origins[:, None] + distance[..., None] * rays.directions[:, None]
    dense, _ = render_weights(density(positions) * (distance < far[:, None]), delta)
    torch.testing.assert_close(colour, (dense[..., None] * positions).sum(1), atol=1e-5, rtol=0)


def test_leaving_out_empty_cells_changes_nothing():
    field, rays = build_field(NetworkConfig(name="analytic"), bound=1.0), view(24)
    centres = grid_points(16, 4)  # 4^3 points in every cell
    occupied = (field.log_density(centres.reshape(-1, 3)) > 0).reshape(16, 16, 16, -1).any(-1)
    everywhere = march(rays, bound=1.0, num_steps=96, occupied=None)
    somewhere = march(rays, bound=1.0, num_steps=96, occupied=occupied)
    assert len(somewhere.ray) < len(everywhere.ray) / 2
    opacities = []
    for samples in (everywhere, somewhere):
        weights = packed_weights(field.log_density(samples.positions).exp(), samples)
        opacities.append(composite(weights, torch.ones(len(weights), 1), samples))
    assert (opacities[0] - opacities[1]).abs().mean() < 2e-3  # cells whose 64 points all miss the surface
    torch.testing.assert_close(opacities[0].mean(), opacities[1].mean(), atol=2e-3, rtol=0)


def grid_points(resolution: int, per_axis: int) -> torch.Tensor:
    """(G, G, G, per_axis^3, 3): regular points in each cell of [-1, 1]^3."""
    inside = (torch.arange(per_axis) + 0.5) / per_axis
    axis = (torch.arange(resolution)[:, None] + inside) * (2 / resolution) - 1  # (G, P)
    x, y, z = torch.meshgrid(axis.flatten(), axis.flatten(), axis.flatten(), indexing="ij")
    points = torch.stack([x, y, z], -1).reshape(
        resolution, per_axis, resolution, per_axis, resolution, per_axis, 3
    )
    return points.permute(0, 2, 4, 1, 3, 5, 6).reshape(resolution, resolution, resolution, -1, 3)


def test_the_budget_keeps_whole_rays_and_at_least_one():
    samples = march(view(), bound=1.0, num_steps=64, occupied=None)
    kept = fit_budget(samples, 500)
    assert 400 < len(kept.ray) <= 500
    for ray in range(kept.num_rays):
        assert int((kept.ray == ray).sum()) == int((samples.ray == ray).sum())
    counts = torch.bincount(samples.ray, minlength=samples.num_rays)
    two = counts[counts > 0][:2]
    packed = samples._replace(ray=torch.arange(2).repeat_interleave(two), num_rays=2)
    packed = packed._replace(
        **{n: getattr(samples, n)[: len(packed.ray)] for n in ("positions", "distance", "rank")}
    )
    total = int(two.sum())
    assert [fit_budget(packed, total - less).num_rays for less in (0, 1)] == [2, 1]
    assert fit_budget(samples, 1).num_rays >= 1
    assert fit_budget(samples, 10**9).num_rays == samples.num_rays


def test_a_cell_index_is_the_cell_that_holds_the_position():
    # 4 cells of 0.5 per axis: x = -0.9 lies in 0, y = 0.1 in 2, z = 0.9 in 3.
    assert cell_index(torch.tensor([[-0.9, 0.1, 0.9]]), 1.0, 4).tolist() == [0 * 16 + 2 * 4 + 3]
    grid = torch.zeros(4, 4, 4, dtype=torch.bool)
    grid[0, 2, 3] = True
    assert is_occupied(grid, torch.tensor([[-0.9, 0.1, 0.9], [0.9, 0.1, 0.9]]), 1.0).tolist() == [True, False]


def solid_cells(resolution: int) -> torch.Tensor:
    """Cells wholly inside an object: the centre lies deeper than half the cell's diagonal."""
    centres = grid_points(resolution, 1).reshape(-1, 3)
    inside = signed_distances(centres).amin(-1) < -math.sqrt(3) / resolution
    return inside.reshape(resolution, resolution, resolution)


def test_occupancy_never_culls_solid_cells_and_forgets_empty_ones():
    torch.manual_seed(0)
    field, grid, solid = (
        build_field(NetworkConfig(name="analytic"), bound=1.0),
        OccupancyGrid(24, 1.0, step_length(1.0, 96)),
        solid_cells(24),
    )
    assert int(solid.sum()) > 100
    for update in range(40):
        grid.update(field.log_density, every_cell=update < 8)
        assert bool(grid.occupied[solid].all())
    far_away = signed_distances(grid_points(24, 1).reshape(-1, 3)).amin(-1).reshape(24, 24, 24) > 0.1
    assert not bool(grid.occupied[far_away].any())


def test_a_field_that_became_empty_is_forgotten():
    torch.manual_seed(0)
    grid = OccupancyGrid(8, 1.0, step_length(1.0, 96))
    grid.update(lambda x: torch.full((len(x),), 5.0), every_cell=True)
    assert bool(grid.occupied.all()) or float(grid.density.mean()) > grid.threshold
    for _ in range(150):
        grid.update(lambda x: torch.where(x[:, 0] < 0, 5.0, -20.0), every_cell=True)
    assert bool(grid.occupied[:4].all())
    assert not bool(grid.occupied[4:].any())


def test_an_empty_grid_can_still_be_updated():
    torch.manual_seed(0)
    grid = OccupancyGrid(8, 1.0, step_length(1.0, 96))
    grid.occupied.fill_(False)
    grid.update(lambda x: torch.full((len(x),), 5.0), every_cell=False)
    assert bool(grid.occupied.any())
