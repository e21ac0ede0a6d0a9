"""What a submitted job may read: files under the data roots, asked at the Jobs API and again at the worker."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import tomli_w

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ConfigError, NotFound
from distill_core.job.dry_run import dry_run
from distill_core.recipe import load_recipe, recipe_names
from distill_core.recipe.references import check_job
from distill_service.jobs import queue, specs
from distill_service.jobs.paths import absolute, check_paths
from distill_service.jobs.supervisor import Supervisor
from distill_service.settings import load_settings
from tests.services.jobs.jobs_stack import COMMANDS, submit


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    return tmp_path


def settings(root: Path, **values):
    return load_settings(state_dir=root / "state", **{"data_roots": str(root / "data"), **values})


def train(**tables) -> specs.Draft:
    return specs.draft_train(toml=tomli_w.dumps({"method": "dmd2", "steps": 3, **tables}))


def places(path: str) -> dict[str, dict]:
    """A recipe for each table that may name a file."""
    return {
        "data.path": {"data": {"name": "images", "path": path}},
        "data.labels": {"data": {"name": "idx", "path": path, "labels": path}},
        "teacher.path": {"teacher": {"path": path}},
        "student.path": {"student": {"path": path}},
        "extractor.path": {"extractor": {"path": path}},
        "evaluate.judge.path": {"evaluate": {"judge": {"path": path}}},
        "evaluate.clip.path": {"evaluate": {"clip": {"path": path}}},
        "evaluate.lpips": {"evaluate": {"lpips": path}},
        "evaluate.data.path": {"evaluate": {"data": {"name": "images", "path": path}}},
        "config.deep.0.path": {"config": {"deep": [{"path": path}]}},
    }


@pytest.mark.parametrize("key", places(""))
def test_a_path_outside_the_roots_is_refused_wherever_a_recipe_can_name_one(root, key):
    inside = train(**places(str(root / "data/mine"))[key])
    check_paths(inside.spec, settings(root))
    outside = train(**places(str(root / "secret"))[key])
    with pytest.raises(ConfigError, match="may not be read by a job: give an absolute path under") as caught:
        check_paths(outside.spec, settings(root))
    assert caught.value.field in (key, "data.path")


@pytest.mark.parametrize(
    "name", ["{root}/data/../secret", "data/mine", "~/x", "../secret", "/", "{root}/data2"]
)
def test_detours_do_not_lead_out(root, monkeypatch, name):
    monkeypatch.chdir(root)
    draft = train(teacher={"path": name.format(root=root)})
    with pytest.raises(ConfigError, match="may not be read by a job"):
        check_paths(draft.spec, settings(root))


def test_a_link_inside_a_root_does_not_lead_out(root):
    (root / "data" / "link").symlink_to(root / "secret")
    with pytest.raises(ConfigError, match="may not be read by a job"):
        check_paths(train(teacher={"path": str(root / "data" / "link")}).spec, settings(root))


def test_the_pictures_of_a_capture_stay_in_its_folder(root):
    data = {"name": "capture", "path": str(root / "data/mine")}
    check_paths(train(data={**data, "images": "images/small"}).spec, settings(root))
    with pytest.raises(ConfigError, match="data.images"):
        check_paths(train(data={**data, "images": "../../secret"}).spec, settings(root))


def test_words_are_no_paths(root):
    data = {"name": "images", "path": str(root / "data/mine"), "labels": "folder"}
    check_paths(train(data=data, config={"source": "a lion / a cat", "path_count": 3}).spec, settings(root))


def test_a_recipe_of_the_workers_disk_is_refused(root):
    with pytest.raises(
        ConfigError, match="is a file: a job names recipes that come with the library"
    ) as caught:
        check_paths(train(teacher={"recipe": "/etc/other.toml"}).spec, settings(root))
    assert caught.value.field == "teacher.recipe"


def test_an_evaluations_data_is_looked_at_too(root):
    draft = specs.draft_evaluate({"artifact": "digits@1", "data": {"name": "images", "path": "/etc"}})
    with pytest.raises(ConfigError, match="data.path = '/etc' may not be read"):
        check_paths(draft.spec, settings(root))


SELF_CONTAINED = [name for name in recipe_names() if "path" not in load_recipe(name).to_toml()]


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_a_shipped_recipe_that_names_no_file_passes(root, name):
    check_paths(specs.draft_train(name=name).spec, settings(root))


def test_most_shipped_recipes_name_no_file():
    assert len(SELF_CONTAINED) > len(recipe_names()) / 2


def test_without_roots_only_a_machine_of_its_own_is_free(root):
    draft = train(teacher={"path": str(root / "secret")})
    check_paths(draft.spec, settings(root, data_roots=""))
    for values in ({"jobs_host": "0.0.0.0"}, {"tokens_file": root / "tokens"}):
        with pytest.raises(ConfigError, match="no folder is open to jobs"):
            check_paths(draft.spec, settings(root, data_roots="", **values))
    check_paths(train().spec, settings(root, data_roots="", jobs_host="0.0.0.0"))


def test_several_roots_are_separated_by_colons(root):
    both = settings(root, data_roots=f"{root / 'data'}:{root / 'secret'}")
    check_paths(train(teacher={"path": str(root / "secret")}).spec, both)


def test_a_worker_refuses_what_slipped_into_the_table(db, root):
    job = submit(db, train(data={"name": "images", "path": "/etc"})).job
    claim = queue.claim(db, ["train"], worker="w", lease_s=30)
    outcome = Supervisor(db, settings(root), worker="w", commands=COMMANDS).run(claim)
    assert outcome.verdict == "failed"
    assert "data.path = '/etc' may not be read by a job" in outcome.error["message"]
    assert not (root / "state" / "runs" / job.id).exists()


OUTSIDE = """
from typing import Any
from distill_core.config import DataPath, Words
from distill_core.method import Method, MethodConfig


class Config(MethodConfig):
    soft_labels: DataPath = "none"
    caption: Words = ""
    either: DataPath | None = None
    several: tuple[DataPath, ...] = ()
    by_class: dict[str, DataPath] = {}
    unsaid: dict[str, Any] = {}


class StoredLabels(Method):
    roles = ("student",)

    def __init__(self, config: Config, *, data):
        raise AssertionError("a job is refused before its method is built")
"""


@pytest.fixture
def outside_method(tmp_path, monkeypatch):
    """A method of another package, whose options no list of ours knows."""
    (tmp_path / "stored_labels_package.py").write_text(OUTSIDE)
    info = tmp_path / "stored_labels_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stored-labels-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillery.methods]\nstored_labels = stored_labels_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield "stored_labels"
    sys.modules.pop("stored_labels_package", None)


def in_the_job(draft: specs.Draft, root: Path) -> None:
    """What the job's process asks before it builds anything."""
    roots = [str(path) for path in settings(root).readable_roots()]
    check_job(draft.spec, roots, ArtifactStore(root / "store"))


def of_the_method(config: dict, **tables) -> specs.Draft:
    return train(**{"method": "stored_labels", "data": {"name": "digits"}, "config": config, **tables})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"soft_labels": "{}"}, "soft_labels"),
        ({"either": "{}"}, "either"),
        ({"several": ["{root}/data/mine", "{}"]}, "several.1"),
        ({"by_class": {"cat": "{}"}}, "by_class.cat"),
        ({"unsaid": {"deep": ["word", "{}"]}}, "unsaid.deep.1"),
    ],
)
def test_a_file_of_an_outside_method_is_refused_before_it_is_queued_and_in_the_job(
    root, outside_method, config, key
):
    def filled(value, path):
        if isinstance(value, dict):
            return {name: filled(entry, path) for name, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry, path) for entry in value]
        return value.format(path, root=root)

    for check in (in_the_job, lambda draft, root: check_paths(draft.spec, settings(root))):
        check(of_the_method({"soft_labels": f"{root}/data/mine", **filled(config, root / "data/mine")}), root)
        secret = filled(config, root / "secret")
        with pytest.raises(ConfigError, match="may not be read by a job") as caught:
            check(of_the_method({"soft_labels": f"{root}/data/mine", **secret}), root)
        assert caught.value.field == f"config.{key}"


def test_text_that_a_schema_calls_words_is_no_path_in_the_job(root, outside_method):
    inside = {"soft_labels": str(root / "data/mine")}
    in_the_job(of_the_method({**inside, "caption": "../ and /etc are words here"}), root)


def test_a_link_does_not_lead_out_in_the_job_either(root, outside_method):
    (root / "data" / "link").symlink_to(root / "secret")
    with pytest.raises(ConfigError, match="config.soft_labels = .* may not be read"):
        in_the_job(of_the_method({"soft_labels": str(root / "data" / "link")}), root)


def test_a_job_that_the_early_check_let_through_is_refused_in_its_own_process(db, root, outside_method):
    draft = of_the_method({"soft_labels": "labels.safetensors"})
    check_paths(draft.spec, settings(root))  # a plain word, for all that the names of keys can tell
    submit(db, draft)
    claim = queue.claim(db, ["train"], worker="w", lease_s=60)
    outcome = Supervisor(db, settings(root), worker="w").run(claim)
    assert outcome.verdict == "failed"
    assert outcome.error["field"] == "config.soft_labels"
    assert "config.soft_labels = 'labels.safetensors' may not be read by a job" in outcome.error["message"]


@pytest.mark.parametrize("key", [key for key in places("") if "deep" not in key and key != "evaluate.lpips"])
def test_the_job_refuses_what_our_own_tables_name(root, key):
    if key != "data.path":
        given = {"data": {"name": "digits"}}
    else:
        given = {}
    in_the_job(train(**{**given, **places(str(root / "data/mine"))[key]}), root)
    with pytest.raises(ConfigError, match="may not be read by a job") as caught:
        in_the_job(train(**{**given, **places(str(root / "secret"))[key]}), root)
    assert caught.value.field in (key, "data.path")


def test_further_tables_of_data_and_teachers_are_walked(root):
    secret = str(root / "secret")
    unseen = {"name": "digits", "held_out": {"name": "images", "path": secret}}
    capture = {"name": "capture", "path": str(root / "data/mine"), "images": "link"}
    (root / "data" / "mine" / "link").symlink_to(root / "secret")
    for key, tables in {
        "data.held_out.path": {"data": unseen},
        "data.images": {"data": capture},
        "teachers.second.path": {"teachers": {"second": {"path": secret}}},
        "evaluate.lpips": {"method": "radiance_field", "evaluate": {"lpips": secret}},
        "config.held_out.path": {
            "method": "classifier",
            "config": {"held_out": {"name": "images", "path": secret}},
        },
        "network.args.anything": {"network": {"name": "UNet2DModel", "args": {"anything": secret}}},
    }.items():
        with pytest.raises(ConfigError, match="may not be read by a job") as caught:
            in_the_job(train(**{"data": {"name": "digits"}, **tables}), root)
        assert caught.value.field == key


def test_what_changes_the_data_is_walked_with_the_data_that_it_changes(root):
    data = {"name": "images", "path": str(root / "data/mine")}
    in_the_job(train(method="classifier", data=data, config={"held_out": {"limit": 3}}), root)
    config = {"held_out": {"path": "elsewhere"}}
    with pytest.raises(ConfigError, match="config.held_out.path"):
        in_the_job(train(method="classifier", data=data, config=config), root)


def test_the_job_refuses_a_recipe_that_is_a_file(root):
    inside = str(root / "data" / "mine.toml")
    with pytest.raises(ConfigError, match="teacher.recipe = .* is a file"):
        in_the_job(train(data={"name": "digits"}, teacher={"recipe": inside}), root)


def test_an_evaluation_of_a_folder_instead_of_a_model_is_refused_in_the_job(root):
    draft = specs.Draft("evaluate", {"artifact": str(root / "secret"), "data": {"name": "digits"}}, "x")
    with pytest.raises((ConfigError, NotFound)):
        in_the_job(draft, root)


@pytest.mark.parametrize(
    ("key", "tables"),
    [
        ("data.path", {"data": {"name": "images", "path": "{}"}}),
        ("evaluate.judge.path", {"data": {"name": "digits"}, "evaluate": {"judge": {"path": "{}"}}}),
        (
            "evaluate.data.labels",
            {"evaluate": {"data": {"name": "idx", "path": "{root}/data", "labels": "{}"}}},
        ),
    ],
)
def test_an_evaluations_files_are_looked_at_in_the_job_too(root, key, tables):
    model = root / "model"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"weights")
    ArtifactStore(root / "store").publish(model, Manifest(name="mine", kind="denoiser"))
    for folder in ("data/mine", "secret"):
        text = json.dumps(tables).replace("{}", str(root / folder)).replace("{root}", str(root))
        draft = specs.Draft("evaluate", {"artifact": "mine@1", **json.loads(text)}, "x")
        if folder == "data/mine":
            in_the_job(draft, root)
            continue
        with pytest.raises(ConfigError, match="may not be read by a job") as caught:
            in_the_job(draft, root)
        assert caught.value.field == key


def test_a_dry_run_reads_no_file_that_the_job_may_not_read(root, outside_method):
    draft = of_the_method({"soft_labels": "labels.safetensors"})
    job = {"name": "x", "kind": "train", "spec": draft.spec}
    where = {"store": str(root / "store"), "cache": str(root / "cache"), "roots": [str(root / "data")]}
    with pytest.raises(ConfigError, match="config.soft_labels = 'labels.safetensors' may not be read"):
        dry_run({"jobs": [job], **where}, lambda event: None)


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_the_job_lets_a_shipped_recipe_that_names_no_file_pass(root, name):
    in_the_job(specs.draft_train(name=name), root)


def test_a_submitted_path_is_meant_from_where_its_user_is(root, monkeypatch):
    monkeypatch.chdir(root)
    made = absolute({"title": "~ words", "config": {"soft_labels": "./labels"}, "publish": {"licence": "/x"}})
    assert made["config"]["soft_labels"] == str(root / "labels")
    assert (made["title"], made["publish"]["licence"]) == ("~ words", "/x")
