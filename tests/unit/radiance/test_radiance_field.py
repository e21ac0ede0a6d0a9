"""The method: it learns held-out views, resumes bit for bit, and saves what it renders."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_core.data.digits import Digits
from distill_core.data.scenes import BlenderScene, ProceduralScene
from distill_core.errors import ConfigError, DataError
from distill_core.kinds.cards import described
from distill_core.kinds.field.card import Evaluate as EvaluateConfig
from distill_core.method import Batch
from distill_core.methods import find_method
from distill_core.metrics.image import psnr, ssim
from distill_core.radiance.scenes.scene import load_scene, render
from distill_core.recipe import load_recipe
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.helpers import previewed

LEGO = Path(__file__).parents[3].parent / "shared" / "data" / "lego_200"
NETWORK = {"name": "hash", "args": {"levels": 4, "log2_table_size": 12, "max_resolution": 48}}


@pytest.fixture(scope="module")
def scene():
    return ProceduralScene(ProceduralScene.Config(num_views=10, num_test_views=2, size=32))


def recipe(**changes):
    values = {
        "method": "radiance_field",
        "steps": 40,
        "batch_size": 256,
        "threads": 1,
        "log_every": 5,
        "data": {"name": "procedural_scene", "num_views": 10, "num_test_views": 2, "size": 32},
        "network": NETWORK,
        "config": {
            "max_samples": 2048,
            "num_steps": 48,
            "grid_resolution": 12,
            "grid_every": 4,
            "grid_warmup": 8,
        },
        "optim": {"field": {"name": "adam", "lr": 2e-2, "betas": [0.9, 0.99], "eps": 1e-15}},
    }
    return load_recipe(values | changes)


def build(scene, settings):
    torch.manual_seed(settings.seed)
    cls = find_method("radiance_field")
    return cls(cls.Config.parse(settings.config), network=settings.network, data=scene)


def trained(scene, settings, folder, **arguments):
    method = build(scene, settings)
    Trainer(method, scene, settings, Run(folder)).train(**arguments)
    return method


def test_ignored_pixels_are_neither_drawn_nor_judged(scene):
    figures, settings = [], recipe()
    for shade in (0.125, 0.875):
        masked = copy.copy(scene)
        for split in ("train", "test"):
            views = getattr(scene, split)
            known = torch.ones(views.images.shape[:3], dtype=torch.bool)
            known[:, 5:28, 9:25] = False
            images = torch.where(known[..., None], views.images, torch.tensor([shade, shade, shade, 1.0]))
            setattr(masked, split, replace(views, images=images, known=known))
        method = build(masked, settings)
        _, rgba = method.draw_rays(5000)
        assert not (rgba[:, :3] == shade).all(-1).any()
        assert (rgba[:, 3] > 0).any()
        figures.append(method.figures(EvaluateConfig()))
    truth, counts = masked.test.truth(masked.spec.background), masked.test.known
    errors = [
        float((method.render_test(index).rgb - truth[index])[counts[index]].square().mean())
        for index in (0, 1)
    ]
    assert figures[1]["psnr"] == pytest.approx(float(np.mean(-10 * np.log10(errors))), abs=1e-3)
    del figures[0]["depth_error"], figures[1]["depth_error"]
    assert figures[0] == figures[1]
    assert figures[0] != build(scene, settings).figures(EvaluateConfig())


KINDS = {
    "hash": NETWORK["args"],
    "mlp": {"width": 48, "layers": 2},
    "vm": {"resolution": 32},
    "cp": {"resolution": 32},
    "tensors": {"resolution": 24},
    "sparse": {"resolution": 24},
}
RATES = {"tensors": 0.3, "sparse": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_field_shows_held_out_views_better_than_before(scene, tmp_path, kind):
    optim = {"field": {"name": "adam", "lr": RATES.get(kind, 2e-2), "betas": [0.9, 0.99], "eps": 1e-15}}
    settings = recipe(network={"name": kind, "args": KINDS[kind]}, steps=80, optim=optim)
    before = build(scene, settings).figures(EvaluateConfig())["psnr"]
    after = trained(scene, settings, tmp_path).figures(EvaluateConfig())["psnr"]
    assert after > before + (4 if kind == "hash" else 1)


def test_a_regulariser_is_added_to_the_loss_with_its_weight(scene):
    plain, heavy = (
        build(scene, recipe(network={"name": "vm"}, config={"regularizers": {"density_l1": weight}}))
        for weight in (0.0, 2.0)
    )
    updates = []
    for method in (plain, heavy):
        torch.manual_seed(0)
        updates.append(next(method.updates(Batch.of(64), 0)))
    added = 2 * plain.field.regularizers()["density_l1"].item()
    assert (updates[1].loss - updates[0].loss).item() == pytest.approx(added, rel=1e-4)
    assert updates[1].metrics["psnr"] == updates[0].metrics["psnr"]


@pytest.mark.parametrize(
    ("network", "config", "said"),
    [
        ({"name": "analytic"}, {}, "nothing to train"),
        ({"name": "hash"}, {"regularizers": {"density_l1": 1e-4}}, "no regulariser 'density_l1'"),
        ({"name": "vm"}, {"regularizers": {"total_variation": 1e-4}}, "no regulariser 'total_variation'"),
    ],
)
def test_a_field_that_cannot_be_trained_so_says_why(scene, network, config, said):
    with pytest.raises(ConfigError, match=said):
        build(scene, recipe(network=network, config=config))


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(scene, tmp_path):
    settings = recipe()
    whole = trained(scene, settings, tmp_path / "whole")
    asked = iter(range(1000))
    trained(scene, settings, tmp_path / "parts", should_stop=lambda: next(asked) == 17)
    resumed = trained(scene, settings, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_published_folder_renders_what_the_method_renders(scene, tmp_path):
    method = trained(scene, recipe(steps=5), tmp_path / "run")
    method.main.save(tmp_path / "model")
    loaded = load_scene(tmp_path / "model")
    fields = described(method.main)
    assert fields["kind"] == "field"
    assert method.main.card().scene == loaded.spec
    assert loaded.spec.field == "hash"
    assert torch.equal(render(loaded, scene.test.camera(0)).rgb, method.render_test(0).rgb)


def test_previews_are_pictures_of_held_out_views(scene):
    pictures = previewed(build(scene, recipe()), scene)
    assert pictures.shape == (2, 3, 32, 32)
    assert float(pictures.min()) >= -1
    assert float(pictures.max()) <= 1


def test_the_sample_budget_is_kept_from_the_first_step(scene):
    method = build(scene, recipe(config={"max_samples": 1000, "num_steps": 96}))
    counted = []
    method.field.register_forward_hook(lambda module, given, result: counted.append(len(given[0])))
    next(method.updates(Batch.of(512), 1))
    assert 0 < counted[0] <= 1000


def test_a_step_whose_rays_meet_nothing_still_updates(scene):
    method = build(scene, recipe())
    method.grid.occupied.fill_(False)
    update = next(method.updates(Batch.of(16), 1))
    update.loss.backward()
    assert torch.isfinite(update.loss)


def test_data_without_cameras_is_refused():
    with pytest.raises(ConfigError, match="posed images") as caught:
        build(Digits(Digits.Config()), recipe())
    assert caught.value.field == "data.name"


def test_psnr_and_ssim_have_their_textbook_values():
    target = np.full((16, 16, 3), 0.5)
    assert psnr(target + 0.1, target) == pytest.approx(20)
    assert psnr(target, target) == float("inf")
    assert ssim(target, target) == pytest.approx(1)
    # Constant pictures: only the luminance term (2ab + c1) / (a^2 + b^2 + c1) is left.
    c1 = 0.01**2
    expected = (2 * 0.5 * 0.6 + c1) / (0.5**2 + 0.6**2 + c1)
    assert ssim(target + 0.1, target) == pytest.approx(expected, abs=1e-6)


def test_pictures_too_small_or_of_other_sizes_are_not_compared():
    with pytest.raises(DataError, match="at least 11"):
        ssim(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)))
    with pytest.raises(DataError, match="cannot be compared"):
        psnr(np.zeros((8, 8, 3)), np.zeros((9, 8, 3)))


@pytest.mark.slow
def test_a_real_blender_scene_trains(tmp_path):
    if not LEGO.is_dir():
        pytest.skip("the lego_200 scene is not here")
    data = {"name": "blender", "path": str(LEGO), "factor": 4, "max_test_views": 2}
    lego = BlenderScene(BlenderScene.Config.parse(data))
    settings = recipe(steps=60, data=data)
    before = build(lego, settings).figures(EvaluateConfig())["psnr"]
    assert trained(lego, settings, tmp_path).figures(EvaluateConfig())["psnr"] > before + 3
