"""PRD: its stages, its normals and exposure against closed forms, and that it finds what it should on a small scene."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distill_core.artifacts import SceneSpec
from distill_core.data.analytic_scenes import InverseScene
from distill_core.data.digits import Digits
from distill_core.data.scenes import PosedImages
from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.radiance.prd import PRD, STAGES, Stage, density_normals, exposure
from distill_core.networks.fields import build_field
from distill_core.radiance.analytic.inverse import GLOWS, environment, glow, render_inverse_scene
from distill_core.radiance.cameras.camera import orbit_camera
from distill_core.radiance.light.environment import EnvironmentLight, texels
from distill_core.radiance.light.shading import GBuffer
from distill_core.radiance.scenes.scene import Scene
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from tests.helpers import previewed

NETWORK = NetworkConfig(
    name="hash", args={"levels": 3, "log2_table_size": 12, "max_resolution": 32, "sh_degree": 2}
)
CONFIG = {"materials": {"network": NETWORK.model_dump()}, "environment_height": 8, "patch": 12}


@pytest.fixture(scope="module")
def data():
    return InverseScene(InverseScene.Config(num_views=5, num_test_views=2, size=24))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    field = build_field(NETWORK, 1.0)
    torch.nn.init.normal_(field.table, std=0.5)
    field.config = field.config.model_copy(update={"log_density_shift": 2.0})
    spec = SceneSpec(field="hash", bound=1.0, radius=3.0)
    return Scene(field, torch.ones(8, 8, 8, dtype=torch.bool), spec, 24)


def build(teacher, data, **changes):
    torch.manual_seed(1)
    return PRD(PRD.Config.parse({**CONFIG, **changes}), teacher=teacher, data=data)


def gradients(method, update):
    parameters = list(getattr(method, update.role).parameters())
    return torch.autograd.grad(update.loss, parameters, allow_unused=True)


def test_the_stages_are_those_of_the_paper_in_order():
    assert [stage.alpha for stage in STAGES] == ["zero", "free", "free", "free"]
    assert [stage.metallic for stage in STAGES] == ["one", "one", "free", "free"]
    assert [stage.alpha_weight for stage in STAGES] == [0, 0, 0.08, 0.08]
    assert [stage.light_weight for stage in STAGES] == [0, 0, 0.003, 0.003]
    config = PRD.Config(stages=(Stage(until=2, alpha="zero"), Stage(until=5), Stage(until=6, light="frozen")))
    found = [config.stage(step) for step in (0, 1, 2, 4, 5, 6, 99)]
    assert found == [config.stages[index] for index in (0, 0, 1, 1, 2, 2, 2)]
    with pytest.raises(ConfigError, match="in order"):
        PRD.Config.parse({"stages": [{"until": 5}, {"until": 2}]})


def buffer_of(count=4):
    torch.manual_seed(2)
    single = {name: torch.rand(count, requires_grad=True) for name in ("roughness", "metallic", "alpha")}
    colour, ones = torch.rand(count, 3), torch.ones(count)
    return GBuffer(
        colour, colour, single["roughness"], single["metallic"], single["alpha"], colour, ones, ones
    )


def test_a_stage_holds_what_it_says(teacher, data):
    method, buffer = build(teacher, data), buffer_of()
    assert torch.equal(method.staged(buffer, Stage(until=1)).alpha, buffer.alpha)
    assert (method.staged(buffer, Stage(until=1, alpha="zero")).alpha == 0).all()
    assert (method.staged(buffer, Stage(until=1, metallic="one")).metallic == 1).all()
    slow = method.staged(buffer, Stage(until=1, alpha_gradient=0.25)).alpha
    assert torch.equal(slow, buffer.alpha)
    slow.sum().backward()
    assert torch.equal(buffer.alpha.grad, torch.full((4,), 0.25))


def test_a_step_moves_field_materials_and_light_on_their_own(teacher, data):
    method = build(teacher, data, stages=[{"until": 9, "metallic": "one"}])
    updates = []
    for update in method.updates(Batch.of(144), 0):
        updates.append(update.role)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients(method, update)), update.role
    assert updates == ["field", "materials", "light"]


def test_the_raw_stage_shows_the_field_alone_and_a_frozen_light_is_not_asked_for(teacher, data):
    method = build(teacher, data, stages=[{"until": 1, "alpha": "zero"}, {"until": 9, "light": "frozen"}])
    raw, *_ = method.updates(Batch.of(144), 0)
    assert float(raw.metrics["alpha"]) == 0
    assert [update.role for update in method.updates(Batch.of(144), 0)] == ["field", "materials"]
    assert [update.role for update in method.updates(Batch.of(144), 5)] == ["field", "materials"]


def test_the_weights_of_the_stage_are_in_the_loss(teacher, data):
    losses = []
    for stage in ({}, {"alpha_weight": 1.0}):
        method = build(teacher, data, stages=[{"until": 9, **stage}])
        torch.manual_seed(3)
        losses.append(next(method.updates(Batch.of(144), 0)))
    plain, pushed = (float(update.loss.detach()) for update in losses)
    assert pushed > plain + 0.1  # alpha is 0.01 where the picture is opaque
    lights = []
    for stage in ({}, {"light_weight": 1.0}):
        method = build(teacher, data, stages=[{"until": 9, **stage}])
        with torch.no_grad():
            method.light.log_radiance[..., 0] += 1
        torch.manual_seed(3)
        lights.append(list(method.updates(Batch.of(144), 0))[2].loss)
    torch.testing.assert_close(lights[1] - lights[0], method.light.whiteness())


def test_patches_are_squares_of_the_pictures_with_the_rays_of_their_pixels(teacher, data):
    method = build(teacher, data)
    rays, rgba = method.draw_patches(3)
    patches = method.as_patches(rgba[:, :3]).permute(0, 2, 3, 1)
    whole = data.train.images[..., :3].unfold(1, 12, 1).unfold(2, 12, 1).permute(0, 1, 2, 4, 5, 3)
    for index, patch in enumerate(patches):
        equal = (whole == patch).all(-1).all(-1).all(-1).nonzero()
        assert len(equal) == 1
        view, top, left = equal[0].tolist()
        square = torch.arange(12)
        pixels = view * 576 + ((top + square)[:, None] * 24 + left + square).reshape(-1)
        expected, _ = data.train.take(pixels)
        assert torch.equal(rays.directions[144 * index : 144 * (index + 1)], expected.directions)


def test_patches_of_a_wide_picture_are_its_own_pixels(teacher, data):
    """Each pixel of these pictures is told by its colour: (view, row, column)."""
    method = build(teacher, data)
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(20.0), indexing="ij")
    numbered = torch.stack([torch.stack([rows * 0 + v, rows, columns, rows * 0 + 1], -1) for v in range(3)])
    views = PosedImages(numbered, data.train.c2w[:3], data.train.intrinsics[:3])
    method.data = SimpleNamespace(train=views)
    method.foreground = torch.arange(3 * 14 * 20)
    torch.manual_seed(0)
    corners = set()
    for patch in method.as_patches(method.draw_patches(60)[1][:, :3]).permute(0, 2, 3, 1):
        view, top, left = patch[0, 0].tolist()
        corners.add((top, left))
        assert (patch[..., 0] == view).all()
        assert torch.equal(patch[..., 1], top + torch.arange(12.0)[:, None].expand(12, 12))
        assert torch.equal(patch[..., 2], left + torch.arange(12.0).expand(12, 12))
    assert {top for top, _ in corners} == {0, 1, 2}
    assert {left for _, left in corners} == set(range(9))


def test_alpha_is_pulled_to_the_mask_by_the_square_of_what_the_ray_shows(teacher, data):
    method, buffer = build(teacher, data), buffer_of(144)
    buffer = buffer._replace(opacity=torch.rand(144), alpha=buffer.alpha.detach())
    rays, rgba = method.draw_patches(1)
    plain, pushed = (method.loss(buffer, rays, rgba, Stage(until=9, alpha_weight=w))[0] for w in (0.0, 0.7))
    expected = 0.7 * (rgba[:, 3] - buffer.alpha * buffer.opacity).square().mean()
    torch.testing.assert_close(pushed - plain, expected)


def test_the_normals_loss_is_weighed(teacher, data):
    losses = []
    for weight in (0.0, 0.3):
        method = build(teacher, data, stages=[{"until": 9}], normal_weight=weight)
        torch.manual_seed(3)
        losses.append(list(method.updates(Batch.of(144), 0))[1])
    normal = losses[1].metrics["normal_loss"]
    assert normal > 0.01
    torch.testing.assert_close(losses[1].loss - losses[0].loss, 0.3 * normal)


def test_what_a_mask_ignores_teaches_nothing(teacher, data):
    known = torch.ones(data.train.images.shape[:3], dtype=torch.bool)
    known[:, 4:20, 7:15] = False
    losses, learned = [], []
    for shade in (0.1, 0.8):
        grey = torch.tensor([shade, shade, shade, 2 * shade / (1 + shade)])
        images = torch.where(known[..., None], data.train.images, grey)
        method = build(teacher, data, stages=[{"until": 9, "alpha_weight": 0.3}])
        method.data = SimpleNamespace(train=replace(data.train, images=images, known=known))
        torch.manual_seed(3)
        update = next(method.updates(Batch.of(288), 0))
        losses.append(update.loss.detach())
        learned.append(
            torch.cat([part.reshape(-1) for part in gradients(method, update) if part is not None])
        )
    assert torch.equal(*losses)
    assert torch.equal(*learned)
    assert learned[0].isfinite().all()
    assert learned[0].abs().sum() > 0


class Ball(torch.nn.Module):
    """A solid sphere with noise inside, where no ray comes."""

    def log_density(self, positions):
        distance = positions.norm(dim=-1)
        return torch.where(distance < 0.5, 5 + torch.rand(len(positions)), -12.0)


def test_normals_of_the_density_point_out_of_a_ball():
    directions = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    found = density_normals(Ball(), 0.5 * directions, 0.06, 0.04)
    assert float((found * directions).sum(-1).mean()) > 0.97


def test_the_exposure_is_the_factor_between_two_lights():
    true = environment(0, 8)
    torch.testing.assert_close(
        exposure(true * torch.tensor([2.0, 0.5, 1.5]), true), torch.tensor([2.0, 0.5, 1.5])
    )
    bright = true.clone()
    bright[0] *= 3  # around a pole, where a texel is a small part of the sphere
    weight = texels(8)[1].reshape(8, -1, 1)
    expected = (weight * bright * true).sum((0, 1)) / (weight * true.square()).sum((0, 1))
    torch.testing.assert_close(exposure(bright, true), expected)


def test_the_data_s_glow_is_there_without_light_and_turns_with_the_view():
    seen = {}
    for azimuth in (0, 180):
        camera = orbit_camera(azimuth, 50, 3, fov_degrees=42, width=32, height=32)
        dark, share = render_inverse_scene(camera, EnvironmentLight(radiance=torch.full((16, 32, 3), 1e-4)))
        seen[azimuth] = dark[share > 0.9][:, :3].mean(0)
        assert dark[(share == 0) & (dark[..., 3] > 0.9)][:, :3].max() < 0.1
    assert seen[0][1] > 0.6 > 0.4 > seen[0][0]  # green from +x
    assert seen[180][0] > 0.6 > 0.4 > seen[180][1]  # purple from -x
    directions = torch.tensor([[-1.0, 0, -1], [1.0, 0, -1], [0, 1.0, 0]])
    halfway = torch.tensor(GLOWS).mean(0)
    torch.testing.assert_close(glow(directions), torch.stack([*torch.tensor(GLOWS), halfway]))


def test_figures_of_a_scene_whose_truth_is_known(teacher, data):
    method = build(teacher, data)
    figures = method.figures(EvaluateConfig())
    assert set(figures) == {"psnr", "raw_psnr", "psnr_gain", "relit_psnr", "alpha_inside", "alpha_outside"}
    assert figures["alpha_inside"] == pytest.approx(0.01, abs=5e-3)
    assert figures["psnr_gain"] == pytest.approx(0, abs=0.5)  # alpha has not risen yet
    assert previewed(method, method.data).shape == (2, 3, 24, 24)


def test_what_it_cannot_use_is_said(teacher, data):
    with pytest.raises(ConfigError, match="posed images"):
        build(teacher, Digits(Digits.Config()))
    gaussians = Scene(torch.nn.Linear(1, 1), teacher.occupied, teacher.spec, 24)
    with pytest.raises(ConfigError, match="radiance field as teacher"):
        build(gaussians, data)


def test_the_recipe_s_ablation_is_physics_alone():
    recipe = load_recipe("prd")
    changed = recipe.override(recipe.check.ablation.set)
    config = PRD.Config.parse(changed.config)
    assert config.materials.progress == "one"
    assert config.model_copy(
        update={"materials": PRD.Config.parse(recipe.config).materials}
    ) == PRD.Config.parse(recipe.config)
