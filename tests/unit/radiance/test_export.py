"""Exports: a sphere's mesh, splats by an independent reader, cameras that come back, all in the input's frame."""

import math

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.transform import Rotation
from torch import nn

from distill_core.artifacts import SceneSpec
from distill_core.data.captures import CapturedScene
from distill_core.errors import ArtifactError, ConfigError, DataError
from distill_core.networks.fields.base import FieldSample
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.radiance.export.dataset import orbit_cameras, read_cameras, save_dataset
from distill_core.radiance.export.frame import from_input, similarity, to_input
from distill_core.radiance.export.mesh import mesh_of, save_mesh
from distill_core.radiance.export.splats import load_splats, moved, save_splats
from distill_core.radiance.scenes.gaussian_seeding import seed_gaussians
from distill_core.radiance.scenes.gaussians import GaussianModel, GaussianScene, rasterize
from distill_core.radiance.scenes.scene import Scene, render

RADIUS, SHARPNESS = 0.55, 40.0
TURN = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()
SHIFT = np.array([0.3, -0.2, 0.1])


def transform():
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = 0.5 * TURN, SHIFT
    return tuple(matrix.flatten().tolist())


def to_world(positions):
    """By hand: p = 0.5 R w + shift."""
    return (positions - SHIFT) @ TURN / 0.5


class Ball(nn.Module):
    """A sphere that is as bright as it is turned to each axis, and a speck of dust."""

    def log_density(self, positions):
        ball = RADIUS - positions.norm(dim=-1)
        speck = 0.06 - (positions - 0.85).norm(dim=-1)
        return SHARPNESS * torch.maximum(ball, speck) + math.log(10)

    def forward(self, positions, directions):
        return FieldSample(self.log_density(positions).exp(), (1 - directions) / 2)


@pytest.fixture
def ball():
    spec = SceneSpec(field="ball", bound=1.0, radius=3.0, transform=transform())
    return Scene(Ball(), torch.ones(8, 8, 8, dtype=torch.bool), spec, 64)


@pytest.fixture
def splats():
    generator = torch.Generator().manual_seed(0)
    model = GaussianModel.at(torch.zeros(30, 3), sh_degree=3)
    for name, value in model.tensors().items():
        value.copy_(0.4 * torch.randn(value.shape, generator=generator) - (2 if name == "log_scales" else 0))
    return GaussianScene(model, SceneSpec(field="gaussians", bound=1.0, radius=3.0, transform=transform()))


@pytest.mark.parametrize("suffix", [".glb", ".ply", ".obj"])
def test_the_mesh_of_a_sphere_is_that_sphere_in_the_input_frame(ball, tmp_path, suffix):
    save_mesh(mesh_of(ball, resolution=48), tmp_path / f"mesh{suffix}")
    mesh = trimesh.load(tmp_path / f"mesh{suffix}", force="mesh")
    centre = to_world(np.zeros(3))
    away = mesh.vertices - centre
    cell = 2 / 48 / 0.5
    assert np.abs(np.linalg.norm(away, axis=1) - RADIUS / 0.5).max() < 0.25 * cell
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(
        4 / 3 * math.pi * (RADIUS / 0.5) ** 3, rel=0.02
    )  # > 0: faces look outwards
    normals = (
        away @ TURN.T / np.linalg.norm(away, axis=1, keepdims=True)
    )  # in the box, where block 2 is asked
    colours = np.asarray(mesh.visual.vertex_colors)[:, :3] / 255
    np.testing.assert_allclose(colours, (1 + normals) / 2, atol=0.05)


def test_dust_is_left_out_unless_it_is_wanted(ball):
    assert len(mesh_of(ball, resolution=48).split(only_watertight=False)) == 1
    assert len(mesh_of(ball, resolution=48, min_component=0).split(only_watertight=False)) == 2


def test_slabs_are_the_whole_volume(ball, monkeypatch):
    whole = mesh_of(ball, resolution=20)
    monkeypatch.setattr("distill_core.radiance.export.mesh.CHUNK", 500)
    parts = mesh_of(ball, resolution=20)
    np.testing.assert_array_equal(whole.vertices, parts.vertices)
    np.testing.assert_array_equal(whole.faces, parts.faces)
    np.testing.assert_array_equal(whole.visual.vertex_colors, parts.visual.vertex_colors)


def test_unoccupied_cells_are_empty_and_the_box_closes_what_it_cuts(ball):
    ball.occupied[..., :4] = False  # below z = 0
    mesh = mesh_of(ball, resolution=48)
    z = (0.5 * mesh.vertices @ TURN.T + SHIFT)[:, 2]
    assert z.min() > -2 / 48
    assert mesh.is_watertight


def test_a_scene_without_surface_says_so(ball, tmp_path):
    with pytest.raises(DataError, match="lower the threshold"):
        mesh_of(ball, resolution=8, threshold=1e30)
    with pytest.raises(ConfigError, match="at least 2 cells"):
        mesh_of(ball, resolution=1)
    with pytest.raises(ConfigError, match=".glb"):
        save_mesh(mesh_of(ball, resolution=8), tmp_path / "mesh.stl")


def test_a_latent_field_has_no_colours(ball, monkeypatch):
    monkeypatch.setattr(
        Ball, "forward", lambda self, x, d: FieldSample(self.log_density(x).exp(), x.new_zeros(len(x), 4))
    )
    with pytest.raises(ConfigError, match="4 channels"):
        mesh_of(ball, resolution=16)
    with pytest.raises(ConfigError, match="4 channels"):
        seed_gaussians(ball, count=10, sh_degree=0, scale=1.0)


def test_splats_are_the_ply_of_3dgs_by_an_independent_reader(splats, tmp_path):
    save_splats(splats, tmp_path / "splats.ply")
    read = trimesh.load(tmp_path / "splats.ply").metadata["_ply_raw"]["vertex"]["data"]
    model = splats.gaussians
    assert read.dtype.names[:6] == ("x", "y", "z", "nx", "ny", "nz")
    assert len(read.dtype.names) == 6 + 3 + 45 + 1 + 3 + 4
    means = np.stack([read[axis] for axis in "xyz"], -1)
    np.testing.assert_allclose(means, to_world(model.means.numpy()), atol=1e-5)
    np.testing.assert_allclose(read["opacity"].squeeze(), model.logit_opacity.numpy(), atol=1e-6)
    scales = np.stack([read[f"scale_{i}"].squeeze() for i in range(3)], -1)
    np.testing.assert_allclose(scales, model.log_scales.numpy() + math.log(2), atol=1e-5)
    rotations = Rotation.from_quat(
        np.stack([read[f"rot_{i}"].squeeze() for i in (1, 2, 3, 0)], -1)
    ).as_matrix()
    own = Rotation.from_quat(model.quats[:, [1, 2, 3, 0]].numpy()).as_matrix()
    np.testing.assert_allclose(rotations, TURN.T @ own, atol=1e-5)
    np.testing.assert_allclose(read["f_dc_1"].squeeze(), model.sh[:, 0, 1].numpy(), atol=1e-6)


def test_f_rest_holds_all_bands_of_red_first(tmp_path):
    model = GaussianModel.at(torch.zeros(1, 3), sh_degree=2)
    model.sh[0, 1:, 0], model.sh[0, 1:, 1] = torch.arange(8.0), 10 + torch.arange(8.0)
    save_splats(GaussianScene(model, SceneSpec(field="gaussians", bound=1.0, radius=3.0)), tmp_path / "s.ply")
    read = trimesh.load(tmp_path / "s.ply").metadata["_ply_raw"]["vertex"]["data"]
    given = [float(np.squeeze(read[f"f_rest_{i}"])) for i in range(16)]
    np.testing.assert_allclose(given, [*range(8), *range(10, 18)], atol=1e-4)


def test_a_moved_scene_looks_the_same_through_a_moved_camera(splats):
    """SH, rotations and scales go along: every quantity of the picture but the distances stays."""
    seen = orbit_camera(25, 30, 3.0, fov_degrees=35, width=24, height=24)
    back = to_input(splats.spec)
    there = Camera(back.pose(seen.c2w), seen.fx, seen.fy, seen.cx, seen.cy, 24, 24)
    before, after = rasterize(splats.gaussians, seen), rasterize(moved(splats.gaussians, back), there)
    torch.testing.assert_close(after.rgb, before.rgb, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.opacity, before.opacity, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.depth, before.depth * 2, atol=1e-3, rtol=0)


def test_written_splats_are_read_back(splats, tmp_path):
    save_splats(splats, tmp_path / "splats.ply")
    again = moved(load_splats(tmp_path / "splats.ply"), from_input(splats.spec))
    for name in ("means", "log_scales", "logit_opacity", "sh"):
        torch.testing.assert_close(
            getattr(again, name), getattr(splats.gaussians, name), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], "cut off"),
        (lambda data: data.replace(b"float opacity", b"float opacitx"), "lacks opacity"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "little-endian"),
        (lambda data: b"", "no PLY file"),
    ],
)
def test_a_file_that_is_no_splats_is_refused(splats, tmp_path, damage, message):
    path = tmp_path / "splats.ply"
    save_splats(splats, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load_splats(path)


def test_a_rendered_data_set_is_read_back_as_it_was(ball, tmp_path):
    cameras = [*orbit_cameras(ball.spec, 8, 16), *orbit_cameras(ball.spec, 9, 16)[-1:]]
    save_dataset(ball, tmp_path, cameras)
    source = CapturedScene(CapturedScene.Config(path=str(tmp_path)))
    assert [len(source.test), len(source.train)] == [2, 7]
    world = to_input(ball.spec)
    file_to_box = torch.tensor(source.spec.transform, dtype=torch.float64).reshape(4, 4)
    for number, index in ((3, 2), (8, None)):
        views, place = (source.train, index) if index is not None else (source.test, 1)
        camera, wanted = views.camera(place), cameras[number]
        moved_pose = similarity(file_to_box).pose(world.pose(wanted.c2w))
        torch.testing.assert_close(camera.c2w.double(), moved_pose, atol=1e-5, rtol=0)
        torch.testing.assert_close(camera.intrinsics(), wanted.intrinsics())
        rendering = render(ball, wanted, background=(0.0, 0.0, 0.0))
        torch.testing.assert_close(views.images[place, ..., 3], rendering.opacity, atol=0.003, rtol=0)
        torch.testing.assert_close(views.images[place, ..., :3], rendering.rgb, atol=0.006, rtol=0)
    # The training box, in the file's world, lies inside of the new one.
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    inside = similarity(file_to_box).points(world.points(corners)).abs().max()
    assert float(inside) == pytest.approx(source.spec.bound, rel=1e-3)


def test_cameras_of_a_file_are_moved_into_the_box(ball, tmp_path):
    lens = Camera(orbit_cameras(ball.spec, 1, 16)[0].c2w, 20, 21, 8, 7, 16, 14, (0.1, 0, 0, 0, 0.01, 0))
    save_dataset(ball, tmp_path, [lens])
    (camera,) = read_cameras(tmp_path / "transforms.json", ball.spec)
    torch.testing.assert_close(camera.c2w, lens.c2w, atol=1e-6, rtol=0)
    assert (camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height) == (20, 21, 8, 7, 16, 14)
    assert camera.distortion == lens.distortion


def test_a_transform_that_is_no_similarity_is_refused():
    with pytest.raises(ArtifactError, match="one scale"):
        similarity(torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0])))
