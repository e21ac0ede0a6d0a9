"""What is said of a published model is true, and it is published once."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from distill_core import api
from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.artifacts.model_card import escaped, model_card
from distill_core.building import for_its_teacher
from distill_core.errors import ConfigError
from distill_core.recipe import Recipe, load_recipe, recipe_names
from tests.helpers import tiny_context, tiny_recipe, tiny_text_to_image

OWN = {"name": "images", "path": "/pictures"}
NETWORK = {
    "name": "DiTTransformer2DModel",
    "args": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8},
}


def small(**changes):
    published = {"publish": {"name": "digits", "alias": "prod"}, "evaluate": {}, "network": NETWORK}
    return tiny_recipe("edm_digits").override({**published, **changes})


# -- once


def test_a_finished_run_publishes_nothing_when_it_is_run_again(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    first = api.train(small(), tmp_path / "run", where)
    other = api.train(small(seed=3), tmp_path / "other", where)
    assert (first.manifest.ref, other.manifest.ref, first.again) == ("digits@1", "digits@2", False)
    where.store.set_alias("digits", "prod", 2)

    again = api.train(small(), tmp_path / "run", where)
    assert again.again
    assert (again.manifest, again.figures) == (first.manifest, first.figures)
    assert where.store.versions("digits") == [1, 2]
    assert where.store.aliases("digits") == {"latest": 2, "prod": 2}, "moved on since: it stays there"


@pytest.mark.slow
def test_a_run_that_goes_on_or_changes_its_recipe_is_published_anew(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    api.train(small(), tmp_path / "run", where)
    longer = api.train(small(steps=3), tmp_path / "run", where)
    assert (longer.manifest.ref, longer.step, longer.again) == ("digits@2", 3, False)
    elsewhere = api.context(tmp_path / "another", tmp_path / "cache")
    assert api.train(small(steps=3), tmp_path / "run", elsewhere).manifest.ref == "digits@1"


def test_a_job_that_was_cut_off_before_its_alias_sets_it(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    api.train(small(**{"publish": {"name": "digits"}}), tmp_path / "run", where, job="job-1")
    again = api.train(small(), tmp_path / "run", where, job="job-1")
    assert (again.manifest.ref, where.store.aliases("digits")["prod"]) == ("digits@1", 1)


# -- titles and licences


def test_nobody_chooses_a_licence_or_title_but_the_recipe_of_shipped_data_and_the_user():
    shipped = load_recipe("edm_digits")
    assert (shipped.title, shipped.publish.licence) == ("EDM teacher, 8x8 digits", "Apache-2.0")
    for changes in (
        {"data": OWN},
        {"data.name": "images", "data.path": "/pictures"},
        {"network": NETWORK, "data": OWN},
    ):
        for changed in (load_recipe("edm_digits", changes), shipped.override(changes)):
            assert (changed.title, changed.publish.licence) == ("", "")
    chosen = {"data": OWN, "title": "Cats", "publish.licence": "MIT"}
    changed = load_recipe("edm_digits", chosen)
    assert (changed.title, changed.publish.licence) == ("Cats", "MIT")
    assert load_recipe("edm_digits", {"steps": 7, "data": {"name": "digits"}}).title == shipped.title
    assert Manifest(name="x", kind="denoiser").licence == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.path": "/model"},
        {"teacher.recipe": "ddpm_digits"},
        {"student.path": "/model"},
        {"student": {"network": NETWORK}},
    ],
)
def test_another_teacher_or_student_takes_title_and_licence_along(changes):
    changed = load_recipe("dmd2", changes)
    assert (changed.title, changed.publish.licence) == ("", "")


def test_a_title_that_counts_steps_goes_with_the_levels():
    changed = load_recipe("dmd2_4step", {"config.levels": [5.0]})
    assert (changed.title, changed.publish.licence) == ("", "Apache-2.0")


def test_recipes_that_need_the_user_s_data_choose_no_licence():
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.publish is not None:
            assert recipe.publish.licence == ("" if "path" in (recipe.data or {}) else "Apache-2.0"), name


def test_parents_are_versions_not_aliases(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    api.train(small(), tmp_path / "run", where)
    values = {"teacher": {"artifact": "digits@prod"}, "publish": {"name": "student"}, "evaluate": {}}
    recipe = tiny_recipe("dmd2").override(values | {"config.levels": [5.0]})
    assert api.train(recipe, tmp_path / "student", where).manifest.parents == ("digits@1",)


# -- levels and learning rates of another teacher's schedule


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tiny_context(tmp_path_factory.mktemp("where"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return str(tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline"))


PROMPTS = {"data": {"name": "prompts", "prompts": ["a cat"]}}


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("swiftbrush", "level", None),
        ("dmd2", "levels", 1),
        ("dmd2_4step", "levels", 4),
        ("hyper_sd_score", "levels", 4),
        ("tsm", "levels", 1),
    ],
)
def test_levels_of_the_digits_become_those_of_another_schedule(name, key, count, where, text_folder, caplog):
    recipe = for_its_teacher(load_recipe(name, {"teacher.path": text_folder, **PROMPTS}), where)
    found = recipe.config[key] if count else [recipe.config[key]]
    assert len(found) == (count or 1)
    assert found[0] == pytest.approx(36.912, rel=1e-4)
    if count == 4:  # timesteps 999, 749, 499, 249
        assert found[1:] == pytest.approx([4.990, 1.415, 0.466], rel=1e-3)
    assert {optim.lr for optim in recipe.optim.values()} == {1e-4}
    assert f"config.{key}" in caplog.text
    assert "optim.student.lr = " in caplog.text
    assert for_its_teacher(recipe, where) is recipe, "it is said once"


def test_what_the_user_gives_is_meant_for_the_new_teacher(where, text_folder):
    changes = {"teacher.path": text_folder, "config.levels": [7.0], "optim.student.lr": 3e-6, **PROMPTS}
    recipe = for_its_teacher(load_recipe("dmd2", changes), where)
    assert recipe.config["levels"] == [7.0]
    assert (recipe.optim["student"].lr, recipe.optim["fake_score"].lr) == (3e-6, 1e-4)
    later = load_recipe("dmd2", {"teacher.path": text_folder, **PROMPTS}).override({"config.levels": [6.0]})
    assert for_its_teacher(Recipe.parse(json.loads(later.model_dump_json())), where).config["levels"] == [6.0]


@pytest.mark.slow
def test_a_teacher_of_the_same_schedule_keeps_what_was_found_for_it(where):
    folder = where.folder(load_recipe("dmd2").teacher)
    kept = for_its_teacher(load_recipe("dmd2", {"teacher.path": str(folder)}), where)
    assert (kept.config, kept.optim) == (load_recipe("dmd2").config, load_recipe("dmd2").optim)


def test_data_of_the_former_teacher_are_refused_where_this_one_learnt_from_others(where, tmp_path):
    folder = where.folder(load_recipe("dmd2").teacher)
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    (own / "recipe.toml").write_text('[data]\nname = "images"\npath = "/pictures"\n')
    with pytest.raises(ConfigError, match=r"was on /pictures; give data for it") as caught:
        for_its_teacher(load_recipe("dmd2", {"teacher.path": str(own)}), where)
    assert caught.value.field == "data.name"


# -- the card


HOSTILE = 'a "b": [c](javascript:x) <img src=x>\n---\n# big\u2028`x` *y* _z_ {{ 1 }} \u0007end'


def test_words_of_users_are_data_in_the_card():
    draft = Manifest(name="m", version=3, kind="denoiser", title=HOSTILE, licence=HOSTILE, parents=(HOSTILE,))
    card = model_card(draft)
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == HOSTILE.lower()
    assert text.count("\n# ") == 1, "one heading, of one line"
    assert "<img" not in text
    assert "](" not in text
    assert not [line for line in text.splitlines() if line.startswith(("---", "# big"))]
    assert escaped("plain words 1.5") == "plain words 1.5"


def test_a_card_says_what_the_manifest_knows_and_no_licence_that_nobody_chose(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "README.md").write_text("# somebody's own\n\n## Use in diffusers\n\nso\n")
    store = ArtifactStore(tmp_path / "store")
    draft = Manifest(
        name="m", kind="field", method="pvd", paper="Fang et al. 2023", parents=("a@1",), card={"base": "b@2"}
    )
    first = store.publish(tmp_path / "model", draft)
    second = store.publish(store.fetch(first.ref), draft)
    card = store.read_bytes(second.ref, "README.md").decode()
    for words in ("Version: m@2", "Fang et al. 2023", "Made from: a@1", "Base: b@2", "none was chosen"):
        assert words in card.replace("\\", "")
    assert card.endswith("## Use in diffusers\n\nso\n"), "what a folder says of its use stays with it"
    assert "somebody" not in card
    assert "license" not in card
