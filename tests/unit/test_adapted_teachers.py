"""Teachers that are a base with adapters: loaded as their sum, recorded, and left behind in the student's files."""

from __future__ import annotations

import pytest
import torch

from distill_core import api
from distill_core.artifacts import Manifest
from distill_core.errors import ConfigError
from distill_core.kinds.cards import described, generator_card
from distill_core.networks.adapters import LoraDenoiser, plain
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe import load_recipe, parse_overrides
from distill_core.recipe.tables import LoraConfig, NetworkConfig, TeacherSource
from tests.helpers import TINY

DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}
TERMS = [{"ref": "bold@1", "scale": 0.8}, {"ref": "soft@1", "scale": -0.3}]


def published(where, folder, name: str, seed: int, base: str | None = None):
    """A random base, or a random adapter over one."""
    torch.manual_seed(seed)
    if base is None:
        network = NetworkConfig(name="DiTTransformer2DModel", args=DIT)
        model = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    else:
        rank = 2 + seed % 3
        model = LoraDenoiser(where.artifact(base), LoraConfig(rank=rank, alpha=3.0, targets="all-linear"))
        model.form = "adapter"
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.2)
    model.save(folder / name)
    return where.store.publish(folder / name, Manifest(name=name, **described(model)))


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    where = api.context(root / "store", root / "cache")
    published(where, root, "base", 0)
    published(where, root, "stranger", 1)
    for seed, (name, base) in enumerate((("bold", "base"), ("soft", "base"), ("other", "stranger")), 2):
        published(where, root, name, seed, base)
    return where


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in plain(model).network.state_dict().items()}


def summed(where) -> dict[str, torch.Tensor]:
    """W0 + 0.8 (W_bold - W0) - 0.3 (W_soft - W0)."""
    base = weights(where.artifact("base"))
    total = dict(base)
    for term in TERMS:
        for name, value in weights(where.artifact(term["ref"])).items():
            total[name] = total[name] + term["scale"] * (value - base[name])
    return total


def recipe(**changes):
    values = {
        "teacher.artifact": "base",
        "teacher.adapters": TERMS,
        "publish": {"name": "student"},
        "student.lora": {"rank": 3, "alpha": 2.0},
        "optim.student.lr": 0.1,
        **changes,
    }
    made = load_recipe("dmd2").override({**TINY, "steps": 3, **values})
    return made.model_copy(
        update={"evaluate": {key: value for key, value in made.evaluate.items() if key != "judge"}}
    )


def assert_alike(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_the_teacher_is_the_base_plus_its_adapters_times_their_scales(where):
    teacher = where.load(TeacherSource(artifact="base@1", adapters=TERMS))
    assert_alike(weights(teacher), summed(where))
    assert teacher.ref == "", "no version has these weights"
    assert teacher.sampler == where.artifact("base").sampler
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            where.artifact("base").parameters(),
            where.load(TeacherSource(artifact="base")).parameters(),
            strict=True,
        )
    )


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_lora_student_is_published_over_the_base_with_the_styles_inside(where, tmp_path, form):
    result = api.train(recipe(**{"publish.form": form}), tmp_path / "run", where)
    manifest = result.manifest
    assert manifest.parents == ("base@1", "bold@1", "soft@1")
    assert (manifest.form, generator_card(manifest).base) == (form, "base@1")
    student = weights(api.load(manifest.ref, where))
    assert_alike(weights(LoraDenoiser.load(where.artifact("base"), where.store.fetch(manifest.ref))), student)
    moved = {name: value - summed(where)[name] for name, value in student.items()}
    changed = {
        name: float(value.abs().max()) for name, value in moved.items() if float(value.abs().max()) > 1e-5
    }
    assert changed, "the student was trained"
    assert all(".attn1.to_" in name for name in changed), "its own factors lie in attention alone"


def test_a_plan_needs_no_adapters_weights(where):
    assert api.plan(recipe(), where) is not None


def test_adapters_are_set_from_the_command_line_and_survive_another_base():
    set_ = ['teacher.adapters=[{ref="bold@1", scale=0.8}]', "teacher.artifact=base@1"]
    for items in (set_, set_[::-1]):
        teacher = load_recipe("dmd2").override(parse_overrides(items)).teacher
        assert (teacher.artifact, teacher.recipe) == ("base@1", None)
        assert [(term.ref, term.scale) for term in teacher.adapters] == [("bold@1", 0.8)]


def test_recipes_without_adapters_are_what_they_were():
    assert "adapters" not in load_recipe("dmd2").to_toml()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            {"adapters": [{"ref": "other@1"}]},
            "other@1 adapts stranger@1, and is to be added to base@1 with other",
        ),
        ({"adapters": [{"ref": "bold@1"}, {"ref": "other"}]}, "other adapts stranger@1"),
        ({"adapters": [{"ref": "stranger@1"}]}, "stranger@1 holds no adapter; name a LoRA of the store"),
    ],
)
def test_adapters_that_do_not_belong_to_the_base_are_refused(where, source, said):
    with pytest.raises(ConfigError, match=said):
        where.load(TeacherSource(artifact="base@1", **source))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ConfigError, match=r"teacher.adapters.0.scale.*finite"):
        recipe(**{"teacher.adapters": [{"ref": "bold@1", "scale": scale}]})


def test_a_scene_takes_no_adapters():
    with pytest.raises(ConfigError, match="a scene has no weights that adapters could be added to"):
        TeacherSource.parse({"scene": "alcove", "adapters": [{"ref": "bold@1"}]})
