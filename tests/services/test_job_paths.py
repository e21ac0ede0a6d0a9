"""What a submitted job may read: files under the data roots, asked at the Jobs API and again at the worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from distill_core.config import load_recipe, recipe_names
from distill_core.data import source_types
from distill_core.errors import ConfigError
from distill_service.jobs import queue, specs
from distill_service.jobs.paths import FILE_KEYS, PATH_KEYS, check_paths
from distill_service.jobs.supervisor import Supervisor
from distill_service.settings import load_settings
from tests.services.jobs_stack import COMMANDS, submit


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


def test_every_option_of_a_data_source_that_is_a_file_is_known(root):
    """A new source with a new name for a file must add it to PATH_KEYS or FILE_KEYS."""
    words = {"name", "split", "format", "column", "label_column", "image_column", "prompt_column", "captions"}
    for name, source in source_types().items():
        for option, field in source.Config.model_fields.items():
            if field.annotation in (str, str | None):
                assert option in PATH_KEYS | FILE_KEYS | words, f"{name}.{option}: a file, or a word?"
