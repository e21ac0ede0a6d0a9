"""What `submit` sends: the same values as `train` reads, from the same folder."""

from __future__ import annotations

import pytest
import tomli_w

from distill_core.errors import ConfigError
from distill_core.recipe import load_recipe, parse_overrides
from distill_service.jobs.specs import draft_train
from distill_service.jobs.sweeps import draft_sweep
from distillery_cli.jobs.submit import _training
from distillery_cli.jobs.sweeps import could_be_value
from distillery_cli.terminal.parsing import split_sweep
from distillery_trainer.client import evaluate_spec, train_spec

IMAGES = ["data.name=images", "data.path=/x"]


@pytest.mark.parametrize(
    ("key", "text", "others"),
    [
        ("data.path", "/x/a,b", ()),
        ("data.path", "a,b", ()),
        ("evaluate.data.path", "1,2", ()),
        ("teacher.path", "a,b", ()),
        ("evaluate.lpips", "a,b", ()),
        ("title", "a cat, on a mat", ()),
        ("title", "1,2", ()),
        ("data.split", "a,b", ["data.name=huggingface", "data.path=/x"]),
        ("data.images", "a,b", ["data.name=capture", "data.path=/x"]),
        ("teacher.recipe", "a,b.toml", ()),
    ],
)
def test_a_text_that_a_key_may_have_is_one_value_as_in_train(key, text, others):
    assert could_be_value("dmd2", key, text, others)
    single, axes = split_sweep(
        [f"{key}={text}"], is_value=lambda *given: could_be_value("dmd2", *given, others)
    )
    assert axes == {}
    assert parse_overrides(single) == {key: text}


@pytest.mark.parametrize(
    ("key", "text", "others"),
    [
        ("optim.student.lr", "1e-4,3e-4", ()),
        ("seed", "1,2", ()),
        ("precision", "fp32,bf16", ()),
        ("config.critic_steps", "1,5", ()),
        ("data.split", "train,test", ()),
        ("data.name", "digits,shapes", ()),
        ("data.labels", "folder,none", IMAGES),
        ("teacher.artifact", "edm-a@1,edm-b@prod", ()),
        ("teacher.recipe", "edm_digits,ddpm_digits", ()),
        ("publish.name", "a,b", ()),
        ("network.args.width", "8,16", ()),
        ("student.lora.targets", "to_q,to_k", ()),
        ("nonsense", "1,2", ()),
    ],
)
def test_what_no_value_of_a_key_could_be_is_still_a_sweep(key, text, others):
    assert not could_be_value("dmd2", key, text, others)


def test_a_marked_sweep_is_one_whatever_its_key():
    single, axes = split_sweep(["seed=3"], ["data.path=/x/a,/x/b", "steps=7"], is_value=lambda *_: True)
    assert single == ["seed=3"]
    assert axes == {"data.path": ["/x/a", "/x/b"], "steps": ["7"]}
    assert split_sweep(['title="a","b"'], is_value=lambda *_: True)[1] == {"title": ['"a"', '"b"']}
    for wrong in ("seed", "=1,2", ""):
        with pytest.raises(ConfigError, match="is not KEY=A,B"):
            split_sweep([], [wrong])
    with pytest.raises(ConfigError, match="given twice"):
        split_sweep(["seed=1,2"], ["seed=3,4"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of-mine")
    return tmp_path


def resolved(spec):
    changes = parse_overrides(f"{key}={value}" for key, value in spec.overrides.items())
    toml, name = spec.recipe_toml or None, spec.recipe_name or None
    return draft_train(toml=toml, name=name, overrides=changes).spec["recipe"]


TABLES = {
    "data": {"name": "idx", "path": "set/pictures.idx", "labels": "labels.idx"},
    "teacher": {"path": "./teacher"},
    "student": {"path": "~/student"},
    "extractor": {"recipe": "reader.toml"},
    "evaluate": {
        "judge": {"path": "../judge"},
        "lpips": "weights",
        "data": {"name": "images", "path": "other", "labels": "folder", "rename_classes": {"path": "road"}},
    },
    "config": {"deep": [{"path": "x"}, 3], "held_out": {"path": "/absolute"}},
    "network": {"name": "UNet2DModel", "args": {"codec": {"path": "codec"}}},
}


def expected(here):
    at = f"{here}/"
    return {
        "data": {"name": "idx", "path": at + "set/pictures.idx", "labels": at + "labels.idx"},
        "teacher": {"path": at + "teacher"},
        "student": {"path": "/home/of-mine/student"},
        "extractor": {"recipe": at + "reader.toml"},
        "evaluate": {
            "judge": {"path": at + "../judge"},
            "lpips": at + "weights",
            "data": {
                "name": "images",
                "path": at + "other",
                "labels": "folder",
                "rename_classes": {"path": "road"},
            },
        },
        "config": {"deep": [{"path": at + "x"}, 3], "held_out": {"path": "/absolute"}},
        "network": {"name": "UNet2DModel", "args": {"codec": {"path": at + "codec"}}},
    }


@pytest.mark.parametrize("way", ["values", "file", "overrides"])
def test_relative_paths_of_a_recipe_are_those_of_the_folder_where_it_is_submitted(here, way):
    values = {"method": "dmd2", "steps": 3}
    if way == "overrides":
        spec = train_spec(values, {key: table for key, table in TABLES.items()})
    elif way == "values":
        spec = train_spec({**values, **TABLES})
    else:
        (here / "mine.toml").write_text(tomli_w.dumps({**values, **TABLES}))
        spec = train_spec("mine.toml")
    found = resolved(spec)
    for table, wanted in expected(here).items():
        shown = {key: found[table].get(key) for key in wanted}
        assert shown == wanted, table


def test_a_shipped_recipe_s_own_relative_path_is_that_of_the_folder_too(here):
    assert resolved(train_spec("nerf_blender"))["data"]["path"] == f"{here}/data/lego"
    assert resolved(train_spec("nerf_blender", {"data.path": "lego,2"}))["data"]["path"] == f"{here}/lego,2"
    assert not train_spec("edm_digits").overrides
    assert load_recipe("nerf_blender").data["path"] == "data/lego"


def test_the_paths_of_sweeps_and_evaluations_are_those_of_the_folder_too(here):
    work = _training("dmd2", ["data.name=images", "data.path=first"], ["teacher.path=a,'b c',/d", "seed=1,2"])
    axes = [(axis.key, list(axis.values)) for axis in work.axes]
    assert dict(axes)["seed"] == ["1", "2"]
    drafts = draft_sweep(axes, name="dmd2", overrides=dict(work.train.overrides))
    teachers = {draft.spec["recipe"]["teacher"]["path"] for draft in drafts}
    assert teachers == {f"{here}/a", f"{here}/b c", "/d"}
    assert {draft.spec["recipe"]["data"]["path"] for draft in drafts} == {f"{here}/first"}

    spec = evaluate_spec(
        "digits@1", {"judge": {"path": "judge"}, "lpips": "w"}, {"name": "images", "path": "set"}
    )
    assert spec.evaluate["judge"]["path"] == f"{here}/judge"
    assert (spec.evaluate["lpips"], spec.data["path"]) == (f"{here}/w", f"{here}/set")


def test_what_is_submitted_as_one_value_is_said(here, capsys):
    work = _training("dmd2", ["data.name=images", "data.path=a,b"], [])
    assert resolved(work)["data"]["path"] == f"{here}/a,b"
    assert "data.path = 'a,b' is one value; a run for each of several is --sweep data.path=A,B" in (
        capsys.readouterr().err.replace("\n", " ")
    )
