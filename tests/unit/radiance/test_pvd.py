"""PVD: its losses by hand, its stages by where gradients reach, its transfers bit for bit, each kind into each."""

import dataclasses

import pytest
import torch

from distill_core.artifacts import SceneSpec
from distill_core.data.conditions import Nothing
from distill_core.data.scenes import ProceduralScene
from distill_core.errors import ConfigError
from distill_core.kinds.field.kind import preview_cameras
from distill_core.losses.field_distillation import (
    DEFAULT_WEIGHTS,
    FieldView,
    LossWeights,
    distance,
    distillation_terms,
    weighted_sum,
)
from distill_core.method import Batch
from distill_core.methods import find_method
from distill_core.networks.fields import build_field
from distill_core.networks.fields.transfer import transfer_matching
from distill_core.radiance.analytic.closed_form import closed_form_scene
from distill_core.radiance.analytic.procedural import render_procedural
from distill_core.radiance.cameras.camera import orbit_camera
from distill_core.radiance.rendering.quadrature import over
from distill_core.radiance.scenes.scene import Scene, load_scene, render
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import EvaluateConfig, ModelSource, NetworkConfig
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.helpers import previewed

TINY = {
    "hash": {"levels": 3, "log2_table_size": 10, "max_resolution": 24},
    "mlp": {"width": 16, "layers": 2, "octaves": 3},
    "vm": {"resolution": 12, "density_rank": 2, "color_rank": 3},
    "cp": {"resolution": 12, "density_rank": 4, "color_rank": 6},
    "tensors": {"resolution": 10},
    "sparse": {"resolution": 10},
    "analytic": {},
}
STUDENTS = sorted(set(TINY) - {"analytic"})
OPTIM = {"student": {"name": "adam", "lr": 2e-2, "betas": [0.9, 0.99], "eps": 1e-15}}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def scene(kind, seed=1, **args):
    torch.manual_seed(seed)
    field = build_field(NetworkConfig(name=kind, args=TINY[kind] | args), 1.0)
    cells = torch.cartesian_prod(*3 * [torch.arange(8)])
    occupied = ((cells + 0.5) / 4 - 1).norm(dim=-1).reshape(8, 8, 8) < 0.7
    field.occupy(occupied)
    spec = SceneSpec(field=kind, bound=1.0, radius=2.8)
    return Scene(field.requires_grad_(False).eval(), occupied, spec, num_steps=24)


def build(teacher, kind, data=None, name="pvd", network=None, **config):
    torch.manual_seed(2)
    cls = find_method(name)
    given = {"max_samples": 512, "feature_until": 2, "points_until": 4, "num_test_poses": 2, "test_size": 16}
    network = NetworkConfig(name=kind, args=TINY[kind] | (network or {}))
    return cls(
        cls.Config.parse(given | config),
        teacher=teacher,
        network=network,
        data=data or Nothing(Nothing.Config()),
    )


def train(method, folder, steps, **changes):
    recipe = load_recipe(
        {"method": "pvd", "steps": steps, "batch_size": 64, "threads": 1, "optim": OPTIM} | changes
    )
    Trainer(method, method.data, recipe, Run(folder)).train()
    return method


def update(method, step, count=64):
    torch.manual_seed(3)
    return next(method.updates(Batch.of(count), step))


def test_a_mean_is_a_mean_and_a_norm_is_frobenius():
    one, other = torch.randn(5, 3), torch.randn(5, 3)
    assert distance(one, other, "mean").item() == pytest.approx(float(((one - other) ** 2).mean()))
    assert distance(one, other, "norm").item() == pytest.approx(float(((one - other) ** 2).sum() ** 0.5))


@pytest.mark.parametrize("reduction", ["mean", "norm"])
def test_nothing_to_compare_costs_nothing(reduction):
    student = torch.zeros(0, 3, requires_grad=True)
    loss = distance(student, torch.zeros(0, 3), reduction)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 3)


def view(**changes):
    parts = [torch.randn(6), torch.randn(6, 2), torch.rand(6, 3), torch.rand(6), torch.rand(2, 3)]
    return FieldView(*parts)._replace(**changes)


def test_the_feature_is_the_log_density_beside_geo_and_kept_samples_are_chosen_for_all_but_pixels():
    one, other = view(), view()
    kept = torch.tensor([True, False, True, False, False, True])
    terms = distillation_terms(one, other, "norm", feature=True, kept=kept)
    density = (one.log_density - other.log_density)[kept]
    geo = (one.geo - other.geo)[kept]
    expected = {
        "feature": (density.square().sum() + geo.square().sum()).sqrt(),
        "density": density.norm(),
        "color": (one.radiance - other.radiance)[kept].norm(),
        "pixel": (one.pixels - other.pixels).norm(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_views_of_the_first_stage_compare_features_alone_and_of_the_second_no_pixels():
    first = [view(radiance=None, pixels=None) for _ in range(2)]
    assert distillation_terms(*first, "mean", feature=True).keys() == {"feature"}
    second = [view(pixels=None) for _ in range(2)]
    assert distillation_terms(*second, "mean", feature=False).keys() == {"density", "color"}


def test_the_feature_fades_from_step_0_and_points_count_less_once_there_are_pixels():
    weights = LossWeights(feature=2.0, feature_decay=0.5, density=3.0, color=5.0, pixel=7.0, late=0.1)
    one = {name: torch.tensor(1.0) for name in ("feature", "density", "color", "pixel")}
    points = {name: one[name] for name in ("feature", "density", "color")}
    assert weighted_sum(points, weights, 3).item() == pytest.approx(2 / 8 + 3 + 5)
    assert weighted_sum(one, weights, 1).item() == pytest.approx(1 + 0.3 + 0.5 + 7)


def test_the_official_weights_are_those_of_the_norm():
    assert DEFAULT_WEIGHTS["norm"] == LossWeights(
        feature=0.002, feature_decay=0.995, density=0.002, color=0.002, pixel=1, late=1
    )


def test_the_three_stages_reach_what_they_should():
    method = build(scene("hash"), "vm")
    terms = []
    for step in (0, 2, 4):
        method.zero_grad()
        made = update(method, step)
        made.loss.backward()
        reached = {name.split(".")[0] for name, p in method.student.named_parameters() if p.grad is not None}
        terms.append((set(made.metrics) - {"rays"}, reached))
    assert terms[0] == ({"feature"}, {"factors", "basis"})
    assert terms[1] == ({"feature", "density", "color"}, {"factors", "basis", "color_net"})
    assert terms[2] == ({"feature", "density", "color", "pixel"}, {"factors", "basis", "color_net"})


@pytest.mark.parametrize("kind", ["tensors", "sparse"])
def test_without_a_comparable_feature_there_is_no_first_stage(kind):
    assert set(update(build(scene("hash"), kind), 0).metrics) == {"rays", "density", "color"}
    assert set(update(build(scene("tensors"), "vm"), 0).metrics) == {"rays", "density", "color"}


def test_the_loss_compares_clipped_log_densities_and_lets_a_dead_cell_come_up():
    method = build(scene("tensors"), "tensors", min_log_density=-2.0, points_until=100)
    with torch.no_grad():
        method.student.grid[:, 0] = -9  # far below what is compared
        method.teacher.grid[:, 0] = -8
    made = update(method, 0)
    assert made.metrics["density"].item() == 0
    with torch.no_grad():
        method.teacher.grid[:, 0] = 3  # 2 with its shift of -1
    made = update(method, 0)
    assert made.metrics["density"].item() == pytest.approx((2 + 2) ** 2)
    made.loss.backward()
    assert bool((method.student.grid.grad[:, 0] < 0).any())


def test_teacher_and_student_see_the_same_samples(monkeypatch):
    method = build(scene("hash"), "cp")
    seen = []
    for field in (method.teacher, method.student):
        block1 = field.block1
        monkeypatch.setattr(field, "block1", lambda x, block1=block1: seen.append(x) or block1(x))
    update(method, 5)
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert 0 < len(seen[0]) <= 512


def test_what_matches_is_transferred_bit_for_bit_and_the_grid_too():
    method = build(scene("hash"), "vm")
    assert method.transferred == [f"color_net.{i}.weight" for i in (0, 2, 4)]
    for one, other in zip(method.teacher.color_net.parameters(), method.student.color_net.parameters()):
        assert torch.equal(one, other)
    assert torch.equal(method.student_scene().occupied, method.scene.occupied)
    fresh = build(scene("hash"), "vm", transfer=False)
    assert fresh.transferred == []
    assert not torch.equal(fresh.teacher.color_net[0].weight, fresh.student.color_net[0].weight)


def test_hash_and_mlp_share_block_1s_network_where_their_encodings_are_as_wide():
    method = build(scene("hash"), "mlp", network={"features": 6})
    assert {"sigma_net.0.weight", "sigma_net.2.weight"} <= set(method.transferred)
    assert torch.equal(method.teacher.sigma_net[0].weight, method.student.sigma_net[0].weight)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_of_the_teachers_kind_begins_as_the_teacher(kind):
    method = build(scene(kind), kind)
    figures = method.figures(EvaluateConfig())
    assert figures["psnr_to_teacher"] == figures["worst_ray_psnr"] == 100


def test_a_packed_student_takes_a_dense_teachers_values():
    method = build(scene("tensors"), "sparse")
    assert method.transferred == ["rows"]
    assert method.figures(EvaluateConfig())["psnr_to_teacher"] > 90
    assert len(method.student.rows) < 1000
    other = build(scene("tensors"), "sparse", network={"resolution": 9})
    assert other.transferred == []


def test_transfer_copies_only_equal_names_and_shapes():
    one, two = (
        build_field(NetworkConfig(name="vm", args=TINY["vm"] | a), 1.0) for a in ({}, {"color_rank": 4})
    )
    copied = transfer_matching(one, two)
    assert "factors.density_planes" in copied
    assert "factors.color_planes" not in copied
    assert torch.equal(one.factors["density_planes"], two.factors["density_planes"])


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", sorted(TINY))
def test_every_kind_becomes_every_other(teacher, student, tmp_path):
    method = train(build(scene(teacher), student), tmp_path / "run", steps=6)
    method.main.save(tmp_path / "model")
    loaded = load_scene(tmp_path / "model")
    assert loaded.spec.field == loaded.field.kind == student
    camera = orbit_camera(20, 30, 2.8, fov_degrees=40, width=8, height=8)
    assert torch.equal(render(loaded, camera).rgb, render(method.student_scene(), camera).rgb)


@pytest.mark.slow
def test_a_closed_form_teacher_is_learned_without_a_picture(tmp_path):
    network = {"levels": 5, "log2_table_size": 13, "max_resolution": 48}
    teacher = dataclasses.replace(closed_form_scene("procedural"), num_steps=64)
    method = build(
        teacher, "hash", network=network, max_samples=3000, feature_until=0, points_until=40, test_size=24
    )
    before = method.figures(EvaluateConfig())
    after = train(method, tmp_path, steps=100, batch_size=256).figures(EvaluateConfig())
    assert after["psnr_to_teacher"] > before["psnr_to_teacher"] + 6
    assert after["worst_ray_psnr"] > before["worst_ray_psnr"]
    assert after["worst_ray_psnr"] < after["worst_pose_psnr"] <= after["psnr_to_teacher"]


@pytest.mark.parametrize("name", ["procedural", "alcove"])
def test_a_closed_form_scene_shows_in_its_cells_what_it_shows_in_all(name):
    scene = closed_form_scene(name)
    camera = orbit_camera(10, 25, 2.8, fov_degrees=40, width=32, height=32)
    everywhere = dataclasses.replace(scene, occupied=torch.ones_like(scene.occupied))
    one, other = render(scene, camera).rgb, render(everywhere, camera).rgb
    assert float(scene.occupied.float().mean()) < 0.25
    assert float((one - other).square().mean()) < 1e-5
    if name == "procedural":
        truth = render_procedural(camera, supersample=1)
        assert float((one - over(truth[..., :3], truth[..., 3:], torch.ones(3))).abs().mean()) < 0.02


def test_true_pictures_measure_the_teacher_the_student_and_what_was_lost():
    data = ProceduralScene(ProceduralScene.Config(num_views=1, num_test_views=2, size=24))
    teacher = dataclasses.replace(closed_form_scene("procedural"), num_steps=96)
    figures = build(teacher, "vm", data=data).figures(EvaluateConfig())
    assert figures["teacher_psnr"] > 20
    assert figures["teacher_psnr"] > figures["psnr"] + 5
    assert figures["psnr_lost"] == pytest.approx(figures["teacher_psnr"] - figures["psnr"])
    without = build(teacher, "vm").figures(EvaluateConfig())
    assert "psnr" not in without
    known = torch.ones(data.test.images.shape[:3], dtype=torch.bool)
    known[:, 6:15, 7:18] = False
    judged = []
    for shade in (0.125, 0.875):  # of what a mask ignores
        grey = torch.tensor([shade, shade, shade, 1.0])
        images = torch.where(known[..., None], data.test.images, grey)
        data.test = dataclasses.replace(data.test, images=images, known=known)
        judged.append(build(teacher, "vm", data=data).figures(EvaluateConfig()))
    assert judged[0] == judged[1]
    assert judged[0]["psnr"] != figures["psnr"]


def test_held_out_poses_are_the_same_whatever_was_drawn_before():
    method = build(scene("hash"), "vm")
    before = torch.get_rng_state()
    one = method.test_cameras(0)
    assert torch.equal(torch.get_rng_state(), before)  # looking changes nothing
    torch.rand(7)
    assert all(torch.equal(a.c2w, b.c2w) for a, b in zip(one, method.test_cameras(0)))
    assert not torch.equal(one[0].c2w, method.test_cameras(1)[0].c2w)


def test_rays_that_meet_nothing_make_an_empty_step():
    teacher = scene("hash")
    occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupied[0, 0, 0] = True
    method = build(dataclasses.replace(teacher, occupied=occupied), "vm", points_until=0, feature_until=0)
    made = update(method, 9, count=2)
    made.loss.backward()
    assert bool(torch.isfinite(made.loss))


@pytest.mark.parametrize(
    ("student", "network", "config", "said", "field"),
    [
        ("analytic", {}, {}, "nothing to train", "network.name"),
        ("vm", {"channels": 4}, {}, "channels", "network.args"),
        ("hash", {}, {"regularizers": {"density_l1": 1e-4}}, "density_l1", "config.regularizers.density_l1"),
    ],
)
def test_a_student_that_cannot_be_says_why(student, network, config, said, field):
    with pytest.raises(ConfigError, match=said) as caught:
        build(scene("hash"), student, network=network, **config)
    assert caught.value.field == field


def test_a_teacher_that_is_no_field_is_refused():
    with pytest.raises(ConfigError, match="the teacher is a Linear"):
        build(dataclasses.replace(scene("hash"), field=torch.nn.Linear(1, 1)), "vm")


def test_a_regulariser_is_added_with_the_pixels():
    plain, heavy = (build(scene("hash"), "vm", regularizers={"density_l1": weight}) for weight in (0.0, 3.0))
    added = 3 * float(plain.student.regularizers()["density_l1"].detach())
    assert update(heavy, 2).loss.item() == update(plain, 2).loss.item()
    assert (update(heavy, 4).loss - update(plain, 4).loss).item() == pytest.approx(added, rel=1e-4)


def test_a_formula_is_a_teacher_but_no_folder(context):
    source = ModelSource(scene="alcove")
    loaded = context.load(source)
    assert loaded.field.kind == "analytic"
    assert loaded.field.config.scene == "alcove"
    with pytest.raises(ConfigError, match="is a formula and no folder"):
        context.folder(source)
    with pytest.raises(ConfigError, match="teacher.scene"):
        load_recipe("pvd", {"teacher.scene": "alcov"})


def test_pixels_lie_over_a_background_that_changes_so_that_opacity_is_learned():
    method = build(scene("tensors"), "tensors", points_until=0, transfer=False)
    with torch.no_grad():
        method.student.grid[:, 0] = -20
    chosen = method.choose_rays(32, 0)
    samples = method.march(chosen.rays)
    background = torch.rand(samples.num_rays, 3)
    seen = method.look(method.student, chosen.rays, samples, background, 0)
    torch.testing.assert_close(seen.pixels, background, atol=1e-4, rtol=0)
    one, other = (update(method, 0).loss.item() for _ in range(2))
    assert one == other
    torch.manual_seed(4)
    assert next(method.updates(Batch.of(64), 0)).loss.item() != one


def test_by_the_official_reduction_a_step_costs_what_its_norms_say():
    method = build(scene("hash"), "vm", reduction="norm")
    made = update(method, 5)
    parts = {name: value.item() for name, value in made.metrics.items() if name != "rays"}
    expected = 0.002 * (0.995**5 * parts["feature"] + parts["density"] + parts["color"]) + parts["pixel"]
    assert made.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_steps_rays_come_from_its_own_new_poses():
    method = build(scene("hash"), "vm", poses={"kind": "tank"}, poses_per_step=3)
    steps = [method.choose_rays(30, step).rays.origins.unique(dim=0) for step in range(2)]
    assert [len(origins) for origins in steps] == [3, 3]
    assert not torch.equal(*steps)
    radius = torch.cat(steps).norm(dim=-1)
    assert bool(((radius > 0.74 * 2.8) & (radius < 2.801)).all())
    elevation = (torch.cat(steps)[:, 2] / radius).asin().rad2deg()
    assert bool(((elevation > 4.9) & (elevation < 19.1)).all())


def test_a_preview_shows_the_students_views_above_the_teachers():
    method = build(scene("hash"), "vm", num_steps=30)
    preview = previewed(method, method.data)
    cameras = preview_cameras(method.scene.spec, method.data)
    own, taught = method.compare(cameras[1])
    assert preview.shape == (2 * len(cameras), 3, *own.shape[:2])
    torch.testing.assert_close(preview[1], own.permute(2, 0, 1) * 2 - 1)
    torch.testing.assert_close(preview[len(cameras) + 1], taught.permute(2, 0, 1) * 2 - 1)
    assert (method.student_scene().num_steps, method.teacher_scene().num_steps) == (30, 24)
