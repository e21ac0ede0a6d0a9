"""From a field to Gaussians: where they begin, what the loss is, and that training brings them closer."""

import pytest
import torch
from torch import nn

from distill_core import api
from distill_core.artifacts import SceneSpec
from distill_core.data import build_source
from distill_core.data.scenes import ProceduralScene
from distill_core.errors import ConfigError, DataError
from distill_core.methods import find_method
from distill_core.methods.radiance.field_to_gaussians import Config, linearized, splat_loss
from distill_core.networks.fields.base import FieldSample
from distill_core.radiance.analytic.closed_form import closed_form_scene
from distill_core.radiance.analytic.procedural import shade, signed_distances, surface_normals
from distill_core.radiance.light.spherical_harmonics import C0
from distill_core.radiance.scenes.gaussian_seeding import seed_gaussians
from distill_core.radiance.scenes.gaussians import Splats, load_gaussians, render_gaussians
from distill_core.radiance.scenes.scene import Rendering, Scene
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import EvaluateConfig
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.helpers import previewed

CELL = 2 / 32


@pytest.fixture(scope="module")
def scene():
    return closed_form_scene("procedural")


@pytest.fixture(scope="module")
def data():
    return ProceduralScene(ProceduralScene.Config(num_views=1, num_test_views=1, size=16))


def build(scene, **config):
    torch.manual_seed(0)
    cls = find_method("field_to_gaussians")
    return cls(cls.Config(**{"size": 32, "num_test_poses": 2, **config}), teacher=scene)


def test_seeds_lie_on_the_surface_all_around_it_and_have_its_colours(scene):
    torch.manual_seed(0)
    seeds = seed_gaussians(scene, count=10_000, sh_degree=1, scale=0.5)
    distance = signed_distances(seeds.means).amin(-1)
    assert float(distance.max()) <= 0  # a solid: the densest of the points looked at lies inside
    assert (
        float(distance.min()) > -2 * 3**0.5 * CELL
    )  # of the cells that looked solid: one that is cut may look empty
    area = 5.0  # of the sphere, the box and the torus, without what they share: square units, roughly
    assert 0.6 * area / CELL**2 < len(seeds) < 2.5 * area / CELL**2
    torch.testing.assert_close(seeds.log_scales.exp(), torch.full((len(seeds), 3), CELL / 2))
    assert float(seeds.logit_opacity.sigmoid().min()) > 0.5
    # The colour is that of the surface, seen from outside: where shading is smooth, that at the seed's own normal.
    expected = shade(seeds.means, -surface_normals(seeds.means))
    error = (seeds.sh[:, 0] * C0 + 0.5 - expected).abs().mean(-1)
    assert float(error.median()) < 0.05
    assert float(seeds.sh[:, 1:].abs().max()) == 0
    few = seed_gaussians(scene, count=50, sh_degree=0, scale=0.5)
    assert len(few) == 50
    assert (
        float((few.means.amax(0) - few.means.amin(0)).min()) > 0.3
    )  # spread over the scene, not its first cells


class Block(nn.Module):
    """Dense for x > 0, transparent else."""

    def log_density(self, positions):
        return torch.where(positions[:, 0] > 0, 6.0, -6.0)

    def forward(self, positions, directions):
        return FieldSample(self.log_density(positions).exp(), (1 - directions) / 2)


def test_seeds_see_the_surface_from_outside_and_leave_the_inside_alone():
    spec = SceneSpec(field="block", bound=1.0, radius=3.0)
    seeds = seed_gaussians(
        Scene(Block(), torch.ones(8, 8, 8, dtype=torch.bool), spec, 32), count=1000, sh_degree=0, scale=1.0
    )
    cells = ((seeds.means + 1) * 4).floor()
    outermost = (cells[:, 0] == 4) | (cells == 7).any(-1) | (cells[:, 1:] == 0).any(-1)
    assert bool(outermost.all())
    assert len(seeds) == 4 * 8 * 8 - 2 * 6 * 6  # all cells of half the box but those enclosed
    front = (cells[:, 0] == 4) & ((cells[:, 1:] > 0) & (cells[:, 1:] < 7)).all(-1)
    colour = seeds.sh[front, 0] * C0 + 0.5  # outwards is -x, so it is looked at along +x
    torch.testing.assert_close(colour, torch.tensor([0.0, 0.5, 0.5]).expand_as(colour), atol=1e-4, rtol=0)


class Wall(Block):
    """Dense for 0 < x < 0.25: one cell of eight."""

    def log_density(self, positions):
        return torch.where((positions[:, 0] > 0) & (positions[:, 0] < 0.25), 6.0, -6.0)


def test_a_wall_of_one_cell_is_surface():
    spec = SceneSpec(field="wall", bound=1.0, radius=3.0)
    scene = Scene(Wall(), torch.ones(8, 8, 8, dtype=torch.bool), spec, 32)
    assert len(seed_gaussians(scene, count=1000, sh_degree=0, scale=1.0)) == 64


def test_an_empty_teacher_is_refused(scene):
    empty = Scene(scene.field, torch.zeros_like(scene.occupied), scene.spec, scene.num_steps)
    with pytest.raises(DataError, match="empty"):
        seed_gaussians(empty, count=10, sh_degree=0, scale=1.0)


def test_what_is_no_field_is_refused():
    with pytest.raises(ConfigError, match="radiance field"):
        build(nn.Linear(1, 1))


def test_the_loss_is_its_three_terms():
    ones = torch.ones(2, 2)
    taught = Rendering(torch.full((2, 2, 3), 0.2), 3 * ones, 0.5 * ones)
    splats = Splats(torch.full((2, 2, 3), 0.3), 2 * ones, 0.7 * ones, torch.zeros(2, 2, 0))
    config = Config(opacity_weight=10.0, depth_weight=100.0)
    loss, colour = splat_loss(splats, taught, torch.tensor([1.0, 0.0, 0.5]), config, 4.0)
    by_hand = ((0.1 - 0.2) ** 2 + 0.1**2 + (0.1 - 0.1) ** 2) / 3
    assert float(colour) == pytest.approx(by_hand)
    assert float(loss) == pytest.approx(by_hand + 10 * 0.2**2 + 100 * 0.25**2)


def test_a_linearized_loss_has_the_value_and_the_gradient():
    p = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = (p**3).sum()
    (gradient,) = torch.autograd.grad(loss, [p])
    again = linearized(loss, [p], [gradient])
    assert float(again.detach()) == float(loss.detach())
    torch.testing.assert_close(torch.autograd.grad(again, [p])[0], 3 * p.detach() ** 2)


@pytest.mark.slow
def test_training_brings_the_gaussians_closer_to_the_field(scene, data, tmp_path):
    settings = load_recipe("field_to_gaussians", {"steps": 30})
    method = build(scene)
    before = method.figures(EvaluateConfig())
    Trainer(method, data, settings, Run(tmp_path)).train()
    after = method.figures(EvaluateConfig())
    assert after["psnr_to_teacher"] > before["psnr_to_teacher"] + 1.5
    assert after["opacity_error"] < before["opacity_error"]
    assert after["depth_error"] < before["depth_error"]
    method.main.save(tmp_path / "model")
    loaded, camera = load_gaussians(tmp_path / "model"), method.test_cameras(0)[0]
    assert (method.main.kind, method.main.card().scene) == ("gaussians", loaded.spec)
    assert torch.equal(
        render_gaussians(loaded, camera).rgb, render_gaussians(method.student_scene(), camera).rgb
    )


def test_previews_show_student_and_teacher(scene):
    pictures = previewed(build(scene), build_source({"name": "nothing"}))
    assert pictures.shape == (4, 3, 96, 96)  # the teacher is of another kind
    assert float(pictures.abs().max()) <= 1


@pytest.mark.slow
def test_a_method_that_counts_cells_is_planned_by_a_step(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    plan = api.plan(load_recipe("field_to_gaussians", {"teacher": {"scene": "procedural"}}), where)
    assert [part.name for part in plan.parts if part.role] == ["geometry", "appearance"]
    assert plan.step > 0
    assert where.store.names() == []
