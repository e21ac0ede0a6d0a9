"""The factorised, voxel and analytic kinds against sums written out, interpolation by hand and one another."""

import pytest
import torch

from distill_core.artifacts import SceneSpec
from distill_core.errors import ConfigError
from distill_core.networks.fields import build_field
from distill_core.networks.fields.analytic import SOLID_DENSITY
from distill_core.networks.fields.tensors import SparseField, TensorsConfig, TensorsField, touched_vertices
from distill_core.radiance.analytic import alcove, procedural
from distill_core.radiance.cameras.camera import orbit_camera
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics
from distill_core.radiance.rendering.occupancy import is_occupied
from distill_core.radiance.scenes.scene import Scene, load_scene, render, save_scene
from distill_core.recipe.tables import NetworkConfig

SMALL = {"resolution": 5, "density_rank": 2, "color_rank": 3, "geo_dim": 4}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def vertices(resolution):
    """Every vertex (V^3, 3), as integers, and its place in [-1, 1]^3."""
    index = torch.cartesian_prod(*3 * [torch.arange(resolution)])
    return index, index * (2 / (resolution - 1)) - 1


def test_vm_is_the_sum_of_planes_times_lines_at_every_vertex():
    field = build_field(NetworkConfig(name="vm", args=SMALL | {"log_density_shift": 0.0}), bound=1.0)
    index, place = vertices(5)
    planes, lines = field.factors["density_planes"], field.factors["density_lines"]
    expected = torch.zeros(5, 5, 5)
    for axis, letters in enumerate(("ryx,rz->xyz", "rzx,ry->xyz", "rzy,rx->xyz")):
        expected = expected + torch.einsum(letters, planes[axis], lines[axis])
    torch.testing.assert_close(field.log_density(place), expected[tuple(index.T)], atol=1e-5, rtol=1e-4)


def test_cp_is_the_sum_of_products_of_three_lines_at_every_vertex():
    field = build_field(NetworkConfig(name="cp", args=SMALL | {"log_density_shift": 0.0}), bound=2.0)
    index, place = vertices(5)
    lines = field.factors["density_vectors"]
    expected = torch.einsum("rx,ry,rz->xyz", *lines)
    torch.testing.assert_close(field.log_density(2 * place), expected[tuple(index.T)], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vm", "cp"])
def test_the_feature_is_a_linear_map_of_the_color_factors(kind):
    field = build_field(NetworkConfig(name=kind, args=SMALL), bound=1.0)
    place = torch.rand(7, 3) * 2 - 1
    products = field.products("color", place)
    assert products.shape == (9 if kind == "vm" else 3, 7)
    torch.testing.assert_close(field.block1(place).geo, (field.basis.weight @ products).T)


def test_factors_are_linear_between_vertices():
    field = build_field(NetworkConfig(name="cp", args=SMALL | {"density_rank": 1}), bound=1.0)
    with torch.no_grad():
        field.factors["density_vectors"][:2] = 1
    x = torch.tensor([[0.1, 0.2, -1.0], [0.1, 0.2, -0.875], [0.1, 0.2, -0.5]])  # a quarter of one interval
    first, quarter, last = field.raw((x + 1) / 2)[0]
    torch.testing.assert_close(quarter, 0.75 * first + 0.25 * last)


def test_density_l1_is_the_mean_size_of_the_density_factors():
    field = build_field(NetworkConfig(name="vm", args=SMALL), bound=1.0)
    with torch.no_grad():
        field.factors["density_planes"].fill_(-0.5)
        field.factors["density_lines"].fill_(2.0)
    assert field.regularizers()["density_l1"].item() == pytest.approx(3 * (0.5 + 2.0))


def test_total_variation_is_zero_for_a_constant_grid_and_counts_a_step():
    field = TensorsField(TensorsConfig(resolution=3, sh_degree=1), bound=1.0)
    with torch.no_grad():
        field.grid.fill_(4.0)
        assert field.regularizers()["total_variation"].item() == 0
        field.grid[..., 2] += 1  # one of two steps along x, in every value
    assert field.regularizers()["total_variation"].item() == pytest.approx(0.5)


def test_tensors_hold_log_density_and_harmonics_of_each_channel():
    field = TensorsField(TensorsConfig(resolution=4, channels=2, log_density_shift=0.0), bound=1.0)
    index, place = vertices(4)
    directions = torch.nn.functional.normalize(torch.randn(64, 3), dim=-1)
    density, radiance = field(place, directions)
    x, y, z = index.T
    values = field.grid[0, :, z, y, x]
    torch.testing.assert_close(density, values[0].exp())
    basis = spherical_harmonics(directions, 3)
    for channel in range(2):
        own = values[1 + 9 * channel : 10 + 9 * channel]
        torch.testing.assert_close(radiance[:, channel], (own.T * basis).sum(-1).sigmoid())
    assert field.geo_dim == 0


def test_a_latent_field_has_its_channels_and_a_linear_output():
    for kind in ("vm", "tensors"):
        args = {"resolution": 6, "channels": 4, "output": "linear"}
        field = build_field(NetworkConfig(name=kind, args=args), bound=1.0)
        with torch.no_grad():
            for value in field.parameters():
                value *= 200
        radiance = field(torch.rand(50, 3), torch.tensor([[0.0, 0, 1]]).expand(50, 3)).radiance
        assert radiance.shape == (50, 4)
        assert bool((radiance < 0).any())
        assert bool((radiance > 1).any())


def ball(resolution=12, radius=0.6):
    """Cells of [-1, 1]^3 whose centre lies in a ball."""
    centre = (vertices(resolution)[0] + 0.5) * (2 / resolution) - 1
    return (centre.norm(dim=-1) < radius).reshape(3 * (resolution,))


@pytest.mark.parametrize(("resolution", "cells"), [(9, 8), (12, 12), (20, 12), (7, 16)])
def test_the_packed_grid_equals_the_dense_one_in_every_occupied_cell(resolution, cells):
    dense = TensorsField(TensorsConfig(resolution=resolution), bound=1.5)
    occupied = ball(cells, 0.5)
    sparse = SparseField.packed(dense, occupied)
    assert len(sparse.rows) == int(touched_vertices(occupied, resolution).sum()) < resolution**3
    places = torch.cat([torch.rand(4000, 3) * 3 - 1.5, 1.5 * vertices(2 * cells + 1)[1]])
    places = places[is_occupied(occupied, places, 1.5)]
    directions = torch.tensor([[0.6, 0.0, 0.8]]).expand(len(places), 3)
    for one, other in zip(dense(places, directions), sparse(places, directions)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_packed_grid_is_empty_where_nothing_is_stored():
    dense = TensorsField(TensorsConfig(resolution=16), bound=1.0)
    sparse = SparseField.packed(dense, ball(radius=0.3))
    log_density = sparse.log_density(torch.tensor([[0.95, 0.95, -0.95], [0.0, 0.0, 0.0]]))
    assert log_density[0].item() == pytest.approx(dense.config.min_log_density)
    assert log_density[1].item() > -2


def test_an_empty_scene_cannot_be_packed():
    with pytest.raises(ConfigError, match="no cell of the scene is occupied"):
        SparseField.packed(
            TensorsField(TensorsConfig(resolution=4), 1.0), torch.zeros(4, 4, 4, dtype=torch.bool)
        )


def test_a_capacity_above_the_grid_is_refused():
    with pytest.raises(ConfigError, match="more than the 64 vertices") as caught:
        build_field(NetworkConfig(name="sparse", args={"resolution": 4, "capacity": 65}), 1.0)
    assert caught.value.field == "network.args.capacity"


@pytest.mark.parametrize("kind", ["vm", "cp", "tensors", "sparse", "analytic"])
def test_a_kind_is_saved_and_renders_the_same_after_loading(kind, tmp_path):
    args = {} if kind == "analytic" else {"resolution": 12}
    field = build_field(NetworkConfig(name=kind, args=args), bound=1.0)
    occupied = ball(8)
    field.occupy(occupied)
    scene = Scene(field, occupied, SceneSpec(field=kind, bound=1.0, radius=2.8), num_steps=32)
    save_scene(scene, tmp_path)
    loaded = load_scene(tmp_path)
    camera = orbit_camera(30, 20, 2.8, fov_degrees=40, width=16, height=16)
    before, after = render(scene, camera), render(loaded, camera)
    assert torch.equal(before.rgb, after.rgb)
    assert bool((before.opacity > 0.05).any())
    assert sorted(loaded.field.state_dict()) == sorted(field.state_dict())


def test_packing_makes_a_scene_smaller_on_disk_and_not_different(tmp_path):
    dense = TensorsField(TensorsConfig(resolution=24), bound=1.0)
    occupied = ball()
    spec = SceneSpec(field="tensors", bound=1.0, radius=2.8)
    camera = orbit_camera(30, 20, 2.8, fov_degrees=40, width=16, height=16)
    sizes, pictures = {}, []
    for field in (dense, SparseField.packed(dense, occupied)):
        save_scene(Scene(field, occupied, spec, num_steps=48), tmp_path / field.kind)
        sizes[field.kind] = (tmp_path / field.kind / "model.safetensors").stat().st_size
        pictures.append(render(load_scene(tmp_path / field.kind), camera).rgb)
    assert sizes["sparse"] < 0.35 * sizes["tensors"]
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=1e-5)


def test_the_analytic_field_is_its_scene_in_closed_form():
    field = build_field(NetworkConfig(name="analytic"), bound=2.0)
    place = torch.rand(500, 3) * 2 - 1
    directions = torch.nn.functional.normalize(torch.randn(500, 3), dim=-1)
    density, radiance = field(2 * place, directions)
    inside = procedural.signed_distances(place).amin(-1) < 0
    torch.testing.assert_close(density, SOLID_DENSITY * inside, atol=1e-6, rtol=1e-5)
    assert torch.equal(radiance, procedural.shade((2 * place + 2) / 4 * 2 - 1, directions))
    assert not list(field.parameters())


def test_the_alcove_hides_its_plate_from_all_but_a_few_poses():
    """The plate's blue squares are seen from the front and from low down, and from nowhere else."""
    corner = torch.tensor([[-0.36, 0.4, -0.4], [-0.36, 0.0, 0.1]])  # of the plate, and on its front
    torch.testing.assert_close(alcove.signed_distances(corner)[:, 1], torch.zeros(2), atol=1e-6, rtol=0)
    assert alcove.signed_distances(torch.tensor([[0.4, 0.0, 0.2]]))[0, 0].item() > 0  # in the opening
    assert alcove.signed_distances(torch.tensor([[-0.5, 0.0, 0.2]]))[0, 0].item() < 0  # in the wall
    field = build_field(NetworkConfig(name="analytic", args={"scene": "alcove"}), bound=1.0)
    full = torch.ones(8, 8, 8, dtype=torch.bool)
    scene = Scene(field, full, SceneSpec(field="analytic", bound=1.0, radius=2.8), num_steps=300)
    blue = []
    for azimuth, elevation in ((0, 5), (60, 5), (0, 50), (180, 5)):
        camera = orbit_camera(azimuth, elevation, 2.8, fov_degrees=40, width=32, height=32)
        picture = render(scene, camera).rgb
        blue.append(int((picture[..., 2] > picture[..., 0] + 0.1).sum()))
    assert blue[0] > 40
    assert blue[1:] == [0, 0, 0]
