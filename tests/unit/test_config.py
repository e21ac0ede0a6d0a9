"""A mistake in a recipe becomes one sentence: what was given, what is allowed, where."""

from __future__ import annotations

import pytest

from distill_core.errors import ConfigError, NotFound
from distill_core.recipe import load_recipe, parse_overrides
from distill_core.recipe.tables import NetworkConfig


@pytest.mark.parametrize(
    ("overrides", "sentence", "field"),
    [
        ({"stepz": 3}, r"unknown key stepz; did you mean 'steps'\?", "stepz"),
        ({"optim.student.learning": 1}, r"unknown key optim.student.learning", "optim.student.learning"),
        ({"steps": "many"}, r"steps = 'many' is not allowed", "steps"),
        ({"steps": True}, r"steps: true is no number", "steps"),
        ({"optim.student.lr": True}, r"optim.student.lr: true is no number", "optim.student.lr"),
        ({"steps": -1}, r"steps = -1 is not allowed.*greater than or equal to 1", "steps"),
        ({"seed": 2**63}, r"seed = \d+ is not allowed", "seed"),
        (
            {"optim.student.lr": float("nan")},
            r"optim.student.lr = nan is not allowed.*finite",
            "optim.student.lr",
        ),
        ({"teacher": {}}, r"exactly one of artifact, path, recipe", "teacher"),
        (
            {"publish.name": "../x"},
            r"publish.name = '../x' is not allowed: allowed are 1 to 64",
            "publish.name",
        ),
        ({"publish.alias": "latest"}, r"alias 'latest' is reserved; choose another", "publish.alias"),
        ({"publish.alias": "3"}, r"alias '3' is reserved; choose another", "publish.alias"),
        (
            {"optim.student.betas": [2, 0.9]},
            r"betas.0 = 2 is not allowed.*less than 1",
            "optim.student.betas.0",
        ),
        ({"data": 5}, r"data = 5 is not allowed: a table of keys belongs here", "data"),
        ({"publish": "x"}, r"publish = 'x' is not allowed: a table of keys belongs here", "publish"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_its_key(overrides, sentence, field):
    with pytest.raises(ConfigError, match=sentence) as error:
        load_recipe("dmd2", overrides)
    assert error.value.field == field
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(NotFound, match="did you mean 'dmd2'"):
        load_recipe("dmd")


def test_a_missing_or_broken_recipe_file_is_one_sentence(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(str(tmp_path / "broken.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file; a recipe is TOML"):
        load_recipe(str(tmp_path / "binary.toml"))


def test_overrides_are_toml_values_and_anything_else_is_text():
    found = parse_overrides(["config.guidance=2.5", "data.path=/a/b c", "x=[1, 2]", "flag=true"])
    assert found == {"config.guidance": 2.5, "data.path": "/a/b c", "x": [1, 2], "flag": True}
    with pytest.raises(ConfigError, match="not KEY=VALUE"):
        parse_overrides(["novalue"])


def test_one_teacher_source_replaces_another():
    recipe = load_recipe("dmd2", {"teacher.path": "/models/x"})
    assert recipe.teacher.path == "/models/x"
    assert recipe.teacher.recipe is None


def test_another_network_does_not_take_over_the_arguments_of_the_first():
    other = load_recipe("nerf_procedural", {"network.name": "vm", "network.args.resolution": 32})
    assert other.network == NetworkConfig(name="vm", args={"resolution": 32})
    same = load_recipe("nerf_procedural", {"network.name": "hash"})
    assert same.network == load_recipe("nerf_procedural").network
