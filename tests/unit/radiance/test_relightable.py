"""The relightable scene: what flows where, what a new light changes, and that it is on disk what it was."""

import json
import math

import pytest
import torch

from distill_core.artifacts import SceneSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.loading import load_model
from distill_core.networks.fields import build_field
from distill_core.networks.materials import ALPHA, ALPHA_GAIN, BEGINS, MaterialConfig, MaterialField
from distill_core.radiance.analytic.inverse import environment
from distill_core.radiance.cameras.camera import orbit_camera
from distill_core.radiance.light.environment import EnvironmentLight
from distill_core.radiance.light.shading import physical
from distill_core.radiance.rendering.march import Samples, march
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.relightable import RelightableScene, front_distance, load_relightable
from distill_core.radiance.scenes.scene import render_samples
from distill_core.recipe.tables import NetworkConfig

NETWORK = NetworkConfig(name="hash", args={"levels": 2, "log2_table_size": 10, "max_resolution": 16})
MATERIALS = MaterialConfig(network=NETWORK, normal_width=8)
SPEC = SceneSpec(field="hash", bound=1.0, radius=3.0, background=(0.2, 0.5, 0.9))


@pytest.fixture
def scene():
    torch.manual_seed(0)
    raw = build_field(NETWORK, 1.0)
    torch.nn.init.normal_(raw.table)
    raw.config = raw.config.model_copy(update={"log_density_shift": 1.0})  # thick enough to be seen
    occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupied[2:6, 2:6, 2:6] = True
    light = EnvironmentLight(8)
    made = RelightableScene(
        raw, MaterialField(MATERIALS, 1.0), light, occupied=occupied, spec=SPEC, num_steps=24
    )
    torch.nn.init.normal_(made.materials.features.table, std=0.5)
    return made


@pytest.fixture
def camera():
    return orbit_camera(30, 25, 3, fov_degrees=42, width=12, height=10)


BACKGROUND = torch.tensor(SPEC.background)


def seen(scene, camera, alpha=None):
    rays = camera.rays()
    buffer = scene.buffer(rays, scene.march(rays))
    if alpha is not None:
        buffer = buffer._replace(alpha=torch.full_like(buffer.alpha, alpha))
    return buffer, scene.compose(buffer, rays.directions, BACKGROUND)


def gradients(scene, picture):
    scene.zero_grad(set_to_none=True)
    picture.square().sum().backward()
    return {
        name: sum(0.0 if p.grad is None else float(p.grad.abs().sum()) for p in part.parameters())
        for name, part in {
            "density": scene.raw.sigma_net,
            "raw radiance": scene.raw.color_net,
            "materials": scene.materials.head,
            "normals": scene.materials.normal,
            "light": scene.light,
        }.items()
    }


def test_without_progress_the_picture_is_the_raw_field_s_bit_for_bit(scene, camera):
    rays = camera.rays()
    samples = scene.march(rays)
    raw = render_samples(scene.raw, rays, samples)
    _, picture = seen(scene, camera, alpha=0.0)
    assert torch.equal(picture, over(raw[:, :3], raw[:, -1:], BACKGROUND))


def test_with_all_progress_the_picture_is_the_shader_s(scene, camera):
    buffer, picture = seen(scene, camera, alpha=1.0)
    opacity = buffer.opacity[:, None]
    phy = physical(buffer, camera.rays().directions, scene.light)
    assert torch.equal(picture, over(phy * opacity, opacity, BACKGROUND))
    assert (picture - BACKGROUND).abs().max().item() > 0.1


def test_the_picture_pulls_at_everything_and_at_the_ends_only_at_what_it_shows(scene, camera):
    between = gradients(scene, seen(scene, camera, alpha=0.5)[1])
    assert all(value > 0 for value in between.values()), between
    raw_only = gradients(scene, seen(scene, camera, alpha=0.0)[1])
    assert {name for name, value in raw_only.items() if value > 0} == {"density", "raw radiance"}
    physics = gradients(scene, seen(scene, camera, alpha=1.0)[1])
    assert {name for name, value in physics.items() if value > 0} == {
        "density",
        "materials",
        "normals",
        "light",
    }


def test_materials_begin_where_the_method_says(camera):
    torch.manual_seed(1)
    values = MaterialField(MATERIALS, 1.0)(torch.rand(50, 3) - 0.5)
    assert (values.albedo - BEGINS[0]).abs().max().item() < 0.02
    assert (values.alpha - ALPHA).abs().max().item() < 1e-3
    torch.testing.assert_close(values.normal.norm(dim=-1), torch.ones(50))
    all_physics = MaterialField(MATERIALS.model_copy(update={"progress": "one"}), 1.0)
    assert (all_physics(torch.rand(5, 3)).alpha == 1).all()


def test_attributes_are_weighted_means_along_the_ray(scene, camera):
    buffer, _ = seen(scene, camera)
    hit = buffer.opacity > 0.05
    assert hit.any()
    for value in (buffer.albedo, buffer.roughness, buffer.metallic, buffer.alpha):
        assert (value[hit] >= 0).all()
        assert (value[hit] <= 1).all()
    constant = scene.materials.head
    torch.nn.init.zeros_(constant.weight)
    with torch.no_grad():
        constant.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, math.log(0.7 / 0.3) / ALPHA_GAIN]))
    buffer, _ = seen(scene, camera)
    torch.testing.assert_close(buffer.albedo[hit], torch.tensor([[0.1, 0.2, 0.3]]).expand(int(hit.sum()), 3))
    torch.testing.assert_close(buffer.alpha[hit], torch.full((int(hit.sum()),), 0.7))


def test_samples_that_do_not_count_are_left_out_and_the_rest_is_ranked(scene, camera):
    scene.raw.config = scene.raw.config.model_copy(update={"log_density_shift": 4.0})
    rays = camera.rays()
    every = march(rays, bound=1.0, num_steps=24, occupied=scene.occupied)
    some = scene.march(rays)
    assert 0 < len(some.ray) < len(every.ray)
    for ray in some.ray.unique().tolist():
        assert some.rank[some.ray == ray].tolist() == list(range(int((some.ray == ray).sum())))
    whole, part = (render_samples(scene.raw, rays, samples) for samples in (every, some))
    torch.testing.assert_close(part[:, [0, 1, 2, -1]], whole[:, [0, 1, 2, -1]], atol=2e-2, rtol=0)


def test_another_light_changes_the_picture_only_where_there_is_progress(scene, camera):
    with torch.no_grad():
        scene.materials.head.bias[5] = 6.0  # alpha near 1
    before, _ = scene.render(camera)
    relit, buffer = scene.relight(environment(1, 8)).render(camera)
    assert float((relit - before).abs().max()) > 0.05
    assert torch.equal(scene.render(camera)[0], before)  # the scene itself stays under its light
    assert buffer.alpha[buffer.opacity > 0.1].min() > 0.9
    with torch.no_grad():
        scene.materials.head.weight.zero_()
        scene.materials.head.bias[5] = -40.0
    before, _ = scene.render(camera)
    torch.testing.assert_close(scene.relight(environment(1, 8)).render(camera)[0], before, atol=1e-6, rtol=0)


def test_only_the_part_that_is_moving_gets_gradients(scene, camera):
    rays = camera.rays()
    samples = scene.march(rays)
    for moving, others in (("field", {"materials", "normals"}), ("materials", {"density", "raw radiance"})):
        buffer = scene.buffer(rays, samples, moving=moving)
        buffer = buffer._replace(alpha=buffer.alpha.detach() * 0 + 0.5)
        found = gradients(scene, scene.compose(buffer, rays.directions, BACKGROUND))
        assert {name for name, value in found.items() if value == 0} == others


def test_the_front_of_a_ray_is_where_a_tenth_of_its_light_is_gone():
    ray, rank = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 2, 0, 1])
    samples = Samples(torch.zeros(5, 3), torch.tensor([1.0, 2, 3, 4, 5]), ray, rank, 0.1, 3)
    weights = torch.tensor([0.05, 0.06, 0.8, 0.04, 0.05])
    assert front_distance(weights, samples).tolist() == [2.0, 0.0, 0.0]


def test_a_saved_scene_loads_as_it_was(scene, camera, tmp_path):
    scene.save(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, RelightableScene)
    assert torch.equal(loaded.render(camera)[0], scene.render(camera)[0])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_damaged_folder_says_what_is_wrong(scene, tmp_path):
    scene.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["materials"]["normal_width"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="is not what config.json describes"):
        load_relightable(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="does not describe a relightable scene"):
        load_relightable(tmp_path)
    scene.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        load_relightable(tmp_path)


def test_a_field_without_a_feature_cannot_carry_materials():
    tensors = NetworkConfig(name="tensors", args={})
    with pytest.raises(ConfigError, match="no feature"):
        MaterialField(MaterialConfig(network=tensors), 1.0)
