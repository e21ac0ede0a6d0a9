"""LoRA students from recipe to store and back: two forms of a folder, and sums of them from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch

from distill_core import api
from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.artifacts.upgrade import upgraded
from distill_core.context import Context
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.cards import described, generator_card
from distill_core.kinds.loading import load_artifact
from distill_core.networks.adapters import LoraDenoiser, plain
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.tables import NetworkConfig
from distill_service.settings import settings
from distillery_cli.app import main
from tests.helpers import TINY

DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}


MERGE = ("adapter", "merge")


def random_teacher(seed: int) -> DiffusersDenoiser:
    """A denoiser whose every weight matters."""
    network = NetworkConfig(name="DiTTransformer2DModel", args=DIT)
    torch.manual_seed(seed)
    teacher = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return teacher


def student_recipe(name: str, **changes: object) -> Recipe:
    """DMD2 with a LoRA student for three steps over the store's teacher."""
    values = {
        "teacher.artifact": "teacher",
        "student.lora": {"rank": 3, "alpha": 2.0},
        "publish": {"name": name},
        "optim.student.lr": 1.0,
        **changes,
    }
    recipe = load_recipe("dmd2").override({**TINY, "steps": 3, **values})
    return recipe.model_copy(
        update={"evaluate": {key: value for key, value in recipe.evaluate.items() if key != "judge"}}
    )


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> Context:
    """A store with two teachers, one training in both forms, and another training."""
    root = tmp_path_factory.mktemp("lora")
    where = api.context(root / "store", root / "cache")
    for name, seed in (("teacher", 0), ("stranger", 1)):
        teacher = random_teacher(seed)
        teacher.save(root / name)
        where.store.publish(root / name, Manifest(name=name, **described(teacher)))
    api.train(student_recipe("whole"), root / "whole", where)
    api.train(student_recipe("small", **{"publish.form": "adapter"}), root / "small", where)
    api.train(student_recipe("other", **{"publish.form": "adapter", "seed": 5}), root / "other", where)
    return where


def output(denoiser: Denoiser) -> torch.Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, torch.tensor([0.5, 3.0, 9.0]), {"class_label": torch.tensor([1, 2, 10])})


def weights(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return plain(denoiser).network.state_dict()


def difference(one: Denoiser, other: Denoiser) -> float:
    """The largest over all weights."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_the_merged_form_opens_in_diffusers_and_its_adapter_in_peft(where):
    manifest = where.store.manifest("whole")
    assert (manifest.form, generator_card(manifest).base) == ("merged", "teacher@1")
    assert "recipe.toml" in manifest.files
    folder, teacher = where.store.fetch("whole"), where.artifact("teacher")
    opened = load_denoiser(folder)
    assert difference(opened, teacher) > 1e-2, "three steps at this rate move the student"
    assert opened.sampler == generator_card(manifest).sampler
    peft.PeftModel.from_pretrained(teacher.network, folder / "adapter")
    torch.testing.assert_close(output(teacher), output(opened), atol=1e-4, rtol=1e-4)


def test_the_adapter_form_holds_no_base_and_is_loaded_over_it(where):
    manifest = where.store.manifest("small")
    assert (manifest.form, generator_card(manifest).base) == ("adapter", "teacher@1")
    files = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    own = {"distillery.json", "recipe.toml", "preview.png", "README.md", "scheduler/scheduler_config.json"}
    assert manifest.files.keys() == {f"adapter/{name}" for name in files} | own
    loaded = api.load("small@1", where)
    assert isinstance(loaded, LoraDenoiser)
    assert (loaded.ref, loaded.base_ref) == ("small@1", "teacher@1")
    assert (
        loaded.sampler
        == generator_card(manifest).sampler
        == generator_card(where.store.manifest("whole")).sampler
    )
    whole = api.load("whole", where)
    assert difference(loaded, whole) < 1e-6
    torch.testing.assert_close(output(loaded), output(whole), atol=1e-4, rtol=1e-4)
    with loaded.off():
        assert torch.equal(output(loaded), output(where.artifact("teacher")))


def test_the_run_folder_itself_can_be_loaded(where):
    run = Path(where.store.url).parent / "small" / "model"
    assert torch.equal(output(api.load(str(run), where)), output(api.load("small@1", where)))


@pytest.mark.slow
def test_an_interrupted_lora_training_ends_where_an_undisturbed_one_does(where, tmp_path):
    asked = iter([False, True])
    recipe = student_recipe("unused").model_copy(update={"publish": None})
    stopped = api.train(recipe, tmp_path / "run", where, should_stop=lambda: next(asked, True))
    assert stopped.stopped
    assert 0 < stopped.step < 3
    api.train(recipe, tmp_path / "run", where)
    assert difference(load_denoiser(tmp_path / "run" / "model"), api.load("whole", where)) == 0


@pytest.mark.slow
def test_the_base_is_the_version_that_was_trained_over_whatever_latest_is_later(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    for seed in (0, 1):
        teacher = random_teacher(seed)
        teacher.save(tmp_path / f"teacher{seed}")
        where.store.publish(tmp_path / f"teacher{seed}", Manifest(name="teacher", **described(teacher)))
        if seed == 0:
            api.train(student_recipe("small", **{"publish.form": "adapter"}), tmp_path / "run", where)
    loaded = api.load("small", where)
    assert where.store.resolve("teacher") == ("teacher", 2)
    with loaded.off():
        assert torch.equal(output(loaded), output(where.artifact("teacher@1")))


def test_an_adapter_of_the_store_is_a_teacher_and_a_base_as_what_it_amounts_to(where, tmp_path):
    changes = {"teacher.artifact": "small", "publish.form": "adapter", "steps": 1}
    result = api.train(student_recipe("second", **changes), tmp_path / "run", where)
    assert generator_card(result.manifest).base == "small@1"
    loaded = api.load("second", where)
    with loaded.off():
        torch.testing.assert_close(output(loaded), output(api.load("whole", where)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {}}, "needs a LoRA student"),
        ({"teacher.recipe": "edm_digits"}, "needs a base that is in the store"),
        ({"student.path": "somewhere"}, "needs a base that is in the store"),
    ],
)
def test_a_form_that_cannot_be_published_is_refused_before_the_training(changes, said):
    with pytest.raises(ConfigError, match=said):
        student_recipe("small", **{"publish.form": "adapter", **changes})


def test_an_adapter_without_its_base_says_what_is_missing(where, tmp_path):
    alone = ArtifactStore(tmp_path / "store")
    manifest = where.store.manifest("small")
    alone.publish(where.store.fetch("small"), manifest)
    with pytest.raises(ArtifactError, match="is an adapter over teacher@1, which is missing: no model"):
        load_artifact(alone, "small", tmp_path / "cache")


def test_an_adapter_is_not_put_over_another_model_that_is_called_like_its_base(where, tmp_path):
    other = ArtifactStore(tmp_path / "store")
    for ref, name in (("stranger", "teacher"), ("small", "small")):
        manifest = where.store.manifest(ref).model_copy(update={"name": name})
        other.publish(where.store.fetch(ref), manifest)
    with pytest.raises(ArtifactError, match="over teacher@1 with other weights than teacher@1"):
        load_artifact(other, "small", tmp_path / "cache")


def test_manifests_and_folders_of_before_are_read(where, tmp_path):
    values = where.store.manifest("teacher").model_dump(mode="json")
    card = values.pop("card")
    del card["base"], values["signature"]
    old = Manifest.parse(upgraded({**values, **card, "schema_version": 1}))
    assert (old.form, generator_card(old).base) == ("full", "")
    assert generator_card(old) == generator_card(where.store.manifest("teacher"))
    folder = tmp_path / "model"
    shutil.copytree(where.store.fetch("whole"), folder)
    shutil.rmtree(folder / "adapter")
    assert difference(api.load(str(folder), where), api.load("whole", where)) == 0


# -- sums ---------------------------------------------------------------------------------------------------


def added(where: Context, *terms: tuple[str, float]) -> dict[str, torch.Tensor]:
    """W0 + a (W_a - W0) + b (W_b - W0), in float64."""
    base = {name: value.double() for name, value in weights(where.artifact("teacher")).items()}
    total = dict(base)
    for ref, weight in terms:
        for name, value in weights(api.load(ref, where)).items():
            total[name] = total[name] + weight * (value.double() - base[name])
    return total


def test_a_sum_of_published_students_has_the_summed_weights(where):
    terms = [("whole", 1.0), ("other@1", -0.5)]
    found = weights(api.merge_adapters(terms, where))
    for name, value in added(where, *terms).items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-6)


@pytest.fixture
def cli(where, monkeypatch, capsys):
    """Runs `distillery` over the module's store; its exit code, and what it said."""
    monkeypatch.setenv("DISTILLERY_STORE_URL", where.store.url)
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(where.cache))
    settings.cache_clear()

    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out if code == 0 else said.err

    yield run
    settings.cache_clear()


def test_the_command_line_publishes_a_sum_in_either_form(where, cli):
    code, said = cli(*MERGE, "small@1:0.7", "whole:0.3", "--publish", "sum", "--form", "adapter", "--json")
    assert (code, json.loads(said)) == (0, {"artifact": "sum@1", "base": "teacher@1", "form": "adapter"})
    manifest = where.store.manifest("sum")
    assert (manifest.form, generator_card(manifest).base, manifest.parents) == (
        "adapter",
        "teacher@1",
        ("small@1", "whole@1"),
    )
    assert manifest.title == "0.7 small@1 + 0.3 whole"
    assert difference(api.load("sum", where), api.load("whole", where)) < 1e-6  # the same factors, 0.7 + 0.3
    assert cli(*MERGE, "sum", "other:2", "--publish", "sum") == (0, "published: sum@2\n")
    assert where.store.manifest("sum@2").form == "merged"


def test_the_command_line_writes_a_folder_that_diffusers_opens(where, cli, tmp_path):
    code, _ = cli(*MERGE, "small", "other:0.5", "--out", str(tmp_path / "sum"))
    assert code == 0
    opened = weights(load_denoiser(tmp_path / "sum"))
    for name, value in added(where, ("small", 1.0), ("other", 0.5)).items():
        torch.testing.assert_close(opened[name].double(), value, atol=1e-6, rtol=1e-6)


def test_a_base_in_a_folder_is_named_by_hand(where, cli, tmp_path):
    teacher = str(where.store.fetch("teacher@1"))
    recipe = student_recipe("unused", **{"teacher.path": teacher, "steps": 1})
    folder = tmp_path / "copy"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("manifest.json", ".claim"))
    recipe = student_recipe("unused", **{"teacher.path": str(folder), "steps": 1})
    api.train(recipe.model_copy(update={"publish": None}), tmp_path / "run", where)
    model = str(tmp_path / "run" / "model")
    assert cli(*MERGE, model, "--out", str(tmp_path / "a"))[0] == 2
    assert cli(*MERGE, model, "--out", str(tmp_path / "a"), "--base", str(folder))[0] == 0
    assert difference(load_denoiser(tmp_path / "a"), load_denoiser(Path(model))) < 1e-6
    code, said = cli(*MERGE, model, "--out", str(tmp_path / "b"), "--base", "stranger")
    assert code == 66
    assert "with other weights than stranger@1" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["small"], 2, "give --out FOLDER or --publish NAME"),
        (["small", "--publish", "a", "--out", "b"], 2, "give --out FOLDER or --publish NAME"),
        (["small:x", "--publish", "a"], 2, "'small:x' is no adapter and weight; write e.g. style@2:0.5"),
        (["small:nan", "--publish", "a"], 2, "'small:nan' is no adapter and weight"),
        (["small", "--publish", "A"], 2, "is not a plain name"),
        (["smal", "--publish", "a"], 67, "no model is called 'smal'; did you mean 'small'?"),
        (["teacher", "--publish", "a"], 2, "teacher holds no adapter"),
        (["small", "--publish", "a", "--form", "x"], 2, "--form x is unknown; choose merged or adapter"),
        (["small", "--out", "."], 2, "exists; give --out a new folder"),
        (["small", "strange", "--publish", "a"], 2, "small adapts teacher@1, strange adapts stranger@1"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(where, cli, tmp_path, arguments, code, said):
    if "strange" in arguments:
        changes = {"teacher.artifact": "stranger", "publish.form": "adapter", "steps": 1}
        api.train(student_recipe("strange", **changes), tmp_path / "run", where)
    found, message = cli(*MERGE, *arguments)
    assert found == code
    assert said in message


def test_the_list_of_models_shows_form_and_base(where, cli):
    _, said = cli("models", "--json")
    shown = {(entry["model"], entry["form"], entry["base"]) for entry in json.loads(said)}
    expected = {
        ("teacher@1", "full", ""),
        ("whole@1", "merged", "teacher@1"),
        ("small@1", "adapter", "teacher@1"),
    }
    assert expected <= shown
    _, said = cli("models", "small")
    assert "adapter" in said
    assert "teacher@1" in said
