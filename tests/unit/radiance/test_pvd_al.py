"""PVD-AL: its pools, its critical points against a loop, and that each level goes where the student is wrong."""

import math

import pytest
import torch

from distill_core.losses.field_distillation import FieldView
from distill_core.method import Batch
from distill_core.methods.radiance._volume_distillation import Chosen
from distill_core.methods.radiance.pvd_al import critical_points
from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.rendering.march import Samples
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import EvaluateConfig
from distill_core.training.checkpoint import load_latest
from distill_core.training.hard_examples import HardExamplePool
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.unit.radiance.test_pvd import OPTIM, build, scene

SMALL = {
    "epoch_poses": 8,
    "first_epoch": 1,
    "pose_share": 0.25,
    "ray_share": 0.25,
    "pose_pool": 4,
    "ray_pool": 24,
    "poses_per_step": 2,
}
PIXELS = {"feature_until": 0, "points_until": 0}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def method(*levels, **config):
    return build(scene("hash"), "vm", name="pvd_al", **{**SMALL, **PIXELS, "levels": levels, **config})


def test_a_pool_fills_then_gives_different_items_and_takes_others_in_their_place():
    pool = HardExamplePool(4, (2,))
    pool.put(torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    assert not pool.full
    pool.put(torch.tensor([[4.0, 4], [5, 5]]))
    assert pool.full
    items, slots = pool.draw(3)
    assert len(set(slots.tolist())) == 3
    assert torch.equal(pool.items[slots], items)
    pool.replace(slots, torch.tensor([[8.0, 8], [9, 9]]))
    assert pool.items[slots[:2]].tolist() == [[8, 8], [9, 9]]
    assert torch.equal(pool.items[slots[2]], items[2])
    assert int((pool.items > 7).all(-1).sum()) == 2
    pool.replace(slots[1:2], torch.tensor([[6.0, 6], [7, 7]]))  # the hardest comes first, and is kept
    assert pool.items[slots].tolist() == [[8, 8], [6, 6], items[2].tolist()]


def test_a_pool_gives_no_more_than_it_holds():
    pool = HardExamplePool(8, ())
    pool.put(torch.tensor([1.0, 2.0]))
    assert sorted(pool.draw(5)[0].tolist()) == [1, 2]


def samples_of(counts):
    ray = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rank = torch.cat([torch.arange(count) for count in counts])
    return Samples(torch.zeros(len(ray), 3), torch.zeros(len(ray)), ray, rank, 0.1, len(counts))


def test_critical_points_are_those_of_a_loop_over_the_rays():
    counts = [5, 0, 1, 12, 7, 3]
    samples = samples_of(counts)
    weights = torch.rand(len(samples.ray)) * 0.3
    expected = torch.zeros(len(weights), dtype=torch.bool)
    for ray, count in enumerate(counts):
        own = (samples.ray == ray).nonzero().squeeze(-1)
        if count and float(weights[own].sum()) >= 0.5:
            expected[own[weights[own].argsort(descending=True)[: math.ceil(0.3 * count)]]] = True
    assert torch.equal(critical_points(weights, samples, 0.3, 0.5), expected)
    assert 0 < int(expected.sum()) < len(weights)


def test_the_point_level_keeps_the_union_of_both_fields_points():
    samples = samples_of([4, 4])
    learnt = torch.tensor([0.6, 0, 0, 0, 0, 0, 0, 0.1])
    taught = torch.tensor([0, 0.9, 0, 0, 0, 0.4, 0, 0])
    views = [FieldView(w, w[:, None], None, w, w[:, None]) for w in (learnt, taught)]
    kept = method("point", point_share=0.25).kept_samples(*views, samples)
    assert kept.tolist() == [True, True, False, False, False, False, False, False]
    assert method("pose", "ray").kept_samples(*views, samples) is None
    assert method("point").kept_samples(views[0]._replace(weights=None), views[1], samples) is None


def test_the_worst_poses_of_an_epoch_go_to_the_pool_and_come_back_turned():
    al = method("pose", turn_degrees=5.0)
    al.begin_epoch(0)
    worst = al.epoch_poses[[2, 6]].clone()
    al.pose_errors[:] = torch.tensor([0.1, 0, 0.9, 0, 0.2, 0, 0.5, 0])
    al.begin_epoch(1)
    assert torch.equal(al.hard_poses.items[:2], worst)
    assert float(al.pose_errors.abs().sum()) == 0
    al.pose_errors[0] = 1.0
    al.begin_epoch(2)
    assert al.hard_poses.full
    pool = al.hard_poses.items.clone()
    again = al.epoch_poses[[7, 1]].clone()
    al.pose_errors[:] = torch.tensor([0, 0.8, 0, 0, 0, 0, 0, 0.9])
    al.begin_epoch(3)
    eyes = [tuple(eye.tolist()) for eye in al.epoch_poses[:, :3, 3]]
    known = [tuple(eye.tolist()) for eye in pool[:, :3, 3]]
    back = [index for index, eye in enumerate(eyes) if eye in known]
    assert len(back) == 2
    for index in back:
        hard = pool[known.index(eyes[index])]
        assert not torch.equal(al.epoch_poses[index], hard)  # turned
        assert float((al.epoch_poses[index][:3, 2] * hard[:3, 2]).sum()) > math.cos(math.radians(7.2))
    replaced = (al.hard_poses.items != pool).flatten(1).any(1)
    assert int(replaced.sum()) == 2
    assert sorted(al.hard_poses.items[replaced][:, 0, 3].tolist()) == sorted(again[:, 0, 3].tolist())


def test_before_the_first_epoch_that_counts_no_pose_is_hard():
    al = method("pose", first_epoch=2)
    for epoch in range(2):
        al.begin_epoch(epoch)
    assert int(al.hard_poses.filled) == 0
    al.begin_epoch(2)
    assert int(al.hard_poses.filled) == 2


def test_without_the_pose_level_every_pose_is_new():
    al = method("ray", "point")
    for epoch in range(4):
        al.begin_epoch(epoch)
    assert int(al.hard_poses.filled) == 0


def test_each_pose_is_rated_by_its_own_rays():
    al = method("pose", "ray")
    chosen = Chosen(Rays(torch.zeros(7, 3), torch.zeros(7, 3)), torch.tensor([3]), torch.tensor([4, 5]))
    al.rate_poses(chosen, torch.tensor([99.0, 1, 10, 2, 20, 3]))  # one pooled ray, then poses 4 5 4 5 4
    assert al.pose_errors.tolist() == [0, 0, 0, 0, 2, 15, 0, 0]


def test_the_worst_rays_fill_the_pool_then_replace_those_that_were_drawn():
    al = method("ray")
    rays = Rays(torch.arange(24.0).reshape(8, 3), torch.randn(8, 3))
    al.rate_rays(Chosen(rays), torch.tensor([0.1, 0.9, 0.2, 0.8, 0, 0, 0, 0]))
    assert torch.equal(al.hard_rays.items[:2, :3], rays.origins[[1, 3]])
    assert torch.equal(al.hard_rays.items[:2, 3:], rays.directions[[1, 3]])
    al.hard_rays.put(torch.randn(24, 6))
    before = al.hard_rays.items.clone()
    al.rate_rays(Chosen(rays, slots=torch.tensor([5, 9])), torch.tensor([0, 0, 0, 0, 0.3, 0, 0, 0.7]))
    assert torch.equal(al.hard_rays.items[[5, 9], :3], rays.origins[[7, 4]])
    assert int((al.hard_rays.items != before).any(1).sum()) == 2


def test_a_full_pool_gives_a_step_its_first_rays():
    al = method("ray")
    assert al.choose_rays(16, 0).slots is None
    al.hard_rays.put(torch.randn(24, 6))
    chosen = al.choose_rays(16, 0)
    assert len(chosen.rays.origins) == 16 + 4
    assert torch.equal(chosen.rays.origins[:4], al.hard_rays.items[chosen.slots][:, :3])
    assert torch.equal(chosen.rays.directions[:4], al.hard_rays.items[chosen.slots][:, 3:])
    al.config = al.config.model_copy(update={"levels": ("pose", "point")})
    assert len(al.choose_rays(16, 0).rays.origins) == 16


def test_a_step_uses_its_epochs_poses_in_turn():
    al = method()
    seen = [al.choose_rays(6, step).poses.tolist() for step in range(5)]
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]
    assert int(al.epoch) == 1


def test_the_rays_that_a_step_keeps_are_those_of_largest_error():
    al = method("ray", ray_pool=400, ray_share=0.1)
    updates = al.updates(Batch.of(64), 0)
    used = next(updates).metrics["rays"]
    assert next(updates, None) is None
    kept = int(al.hard_rays.filled)
    assert kept == int(0.1 * used) > 1
    fresh = al.hard_rays.items[:kept]
    samples = al.march(Rays(fresh[:, :3], fresh[:, 3:]))
    assert samples.num_rays == kept
    assert len(samples.ray) > 0  # hard rays meet the scene


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
def test_an_interrupted_run_with_full_pools_ends_bit_for_bit_where_an_undisturbed_one_does(tmp_path, micro):
    recipe = load_recipe(
        {
            "method": "pvd_al",
            "steps": 24,
            "batch_size": 64,
            "accumulate": micro,
            "threads": 1,
            "optim": OPTIM,
        }
    )

    def run(folder, **arguments):
        torch.manual_seed(0)
        al = method("pose", "ray", "point")
        trainer = Trainer(al, al.data, recipe, Run(folder))
        trainer.train(**arguments)
        return al, load_latest(trainer.run.checkpoints, method="pvd_al")

    whole, one = run(tmp_path / "whole")
    polls = iter([False] * 17 + [True])
    run(tmp_path / "parts", should_stop=lambda: next(polls))
    _, two = run(tmp_path / "parts")
    assert whole.hard_poses.full
    assert whole.hard_rays.full
    assert one[1].keys() == two[1].keys()
    for part, tensors in one[1].items():
        for key, value in tensors.items():
            assert torch.equal(value, two[1][part][key]), f"{part}: {key}"


def test_the_error_at_critical_points_is_zero_for_the_teacher_itself():
    al = build(scene("vm"), "vm", name="pvd_al", **SMALL, **PIXELS, min_opacity=0.0, min_log_density=-30.0)
    assert al.figures(EvaluateConfig())["critical_error"] == 0
    shift = al.student.config.log_density_shift
    al.student.config = al.student.config.model_copy(update={"log_density_shift": shift + 0.25})
    assert al.critical_error(0) == pytest.approx(0.25, rel=1e-3)  # a mean over the critical points alone
    al.student.config = al.student.config.model_copy(update={"log_density_shift": shift})
    with torch.no_grad():
        for name, value in al.student.factors.items():
            if name.startswith("density"):
                value.zero_()
    al.config = al.config.model_copy(update={"point_share": 1.0})
    assert al.critical_error(0) > 0
