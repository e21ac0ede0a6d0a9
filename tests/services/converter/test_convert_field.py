"""`distillery convert-field`: the recipe that it fills in, and a conversion from a formula to a published field."""

import json

import pytest
from PIL import Image

from distill_core.artifacts import ArtifactStore
from distill_core.kinds.cards import scene_spec
from distill_core.recipe import load_recipe, parse_overrides
from distill_service.settings import settings as service_settings
from distillery_cli.app import main
from distillery_cli.scenes.convert_field import LEARNING_RATES, STEPS, settings
from distillery_cli.terminal.running import run
from tests.unit.radiance.test_scenes import write_scene
from tools.__main__ import app
from tools.field_kinds import section

TINY = [
    *("-s", "steps=4", "-s", "batch_size=16", "-s", "config.max_samples=128", "-s", "config.test_size=8"),
    *("-s", "config.num_test_poses=1"),
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLERY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DISTILLERY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DISTILLERY_STORE_URL", raising=False)
    service_settings.cache_clear()
    yield tmp_path
    service_settings.cache_clear()


def filled(scene, kind, **arguments):
    return load_recipe("pvd", parse_overrides(settings(scene, kind, **{"steps": 100} | arguments)))


@pytest.mark.parametrize("kind", STEPS)
def test_every_kind_has_a_whole_recipe(kind):
    recipe = filled("lego@3", kind)
    assert recipe.method == "pvd"
    assert recipe.network.name == kind
    assert recipe.optim["student"].lr == LEARNING_RATES[kind]
    assert (recipe.config["feature_until"], recipe.config["points_until"]) == (15, 40)
    assert recipe.data == {"name": "nothing"}


@pytest.mark.parametrize(
    ("scene", "source", "name"),
    [
        ("lego@3", {"artifact": "lego@3"}, "lego-vm"),
        ("nerf_procedural", {"recipe": "nerf_procedural"}, "procedural-scene-vm"),
        ("alcove", {"scene": "alcove"}, "alcove-vm"),
    ],
)
def test_a_scene_is_found_where_it_is_and_names_the_result(scene, source, name):
    recipe = filled(scene, "vm")
    assert recipe.teacher.model_dump(exclude_none=True) == source
    assert recipe.publish.name == name
    assert filled(scene, "vm", publish="mine").publish.name == "mine"


def test_a_folder_is_a_scene_with_its_runs_name(tmp_path):
    folder = tmp_path / "My Run" / "model"
    folder.mkdir(parents=True)
    recipe = filled(str(folder), "cp")
    assert recipe.teacher.path == str(folder)
    assert recipe.publish.name == "my-run-cp"


def test_a_scene_is_converted_published_and_converted_on(home, capsys):
    assert (
        main(["convert-field", "procedural", "tensors", *TINY, "-s", "network.args.resolution=8", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["artifact"] == "procedural-tensors@1"
    assert told["metrics"]["psnr_to_teacher"] > 3
    again = [
        *("convert-field", "procedural-tensors", "sparse", "-s", "network.args.resolution=8"),
        *("-s", "optim.student.lr=0", "--publish", "packed", "--json"),
    ]
    assert main([*again, *TINY]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["artifact"] == "packed@1"
    assert told["metrics"]["psnr_to_teacher"] > 80  # a packed grid is the dense one
    manifest = ArtifactStore(str(home / "state" / "store")).manifest("packed@1")
    assert manifest.kind == "field"
    assert scene_spec(manifest).field == "sparse"
    assert manifest.parents == ("procedural-tensors@1",)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["procedural", "analytic"], 2, "no field that can be trained is called 'analytic'"),
        (["procedural", "tensor"], 2, "did you mean 'tensors'?"),
        (["no-such-scene", "vm"], 67, "no-such-scene"),
        (["procedural", "vm", "-s", "steps=many"], 2, "steps = 'many' is not allowed"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, code, said, home, capsys):
    assert main(["convert-field", *arguments]) == code
    assert said in capsys.readouterr().err


def test_a_scene_as_every_kind_makes_a_table_and_pictures(home, capsys):
    scene, checkout = home / "little", home / "checkout"
    write_scene(scene, size=(16, 16), frames=2, alpha=128)
    (checkout / "docs").mkdir(parents=True)
    little = ("-s", "steps=4", "-s", "batch_size=16", "-s", "config.max_samples=128", "--kinds", "hash,cp")
    assert (
        run(app, "tools", ["field-kinds", str(scene), "--repository", str(checkout), "--json", *little]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert [(row["field"], row["made_from"]) for row in told["rows"]] == [
        ("hash", "images"),
        ("hash", "the hash field"),
        ("cp", "the hash field"),
    ]
    with Image.open(checkout / "docs/images/little.png") as picture:
        assert picture.size == (4 * 2 * 16, 2 * 16)  # the photograph and three fields, twice as large
    page = section(checkout)
    assert page.count("| cp | the hash field |") == 1
    assert "![the photograph, hash, hash, cp](images/little.png)" in page


def test_a_scene_as_an_unknown_kind_is_refused_before_any_training(home, capsys):
    assert run(app, "tools", ["field-kinds", str(home), "--kinds", "vm,wm"]) == 2
    assert "no field is called wm; choose from hash" in capsys.readouterr().err
