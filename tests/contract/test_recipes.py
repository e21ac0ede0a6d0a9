"""What every shipped recipe must do."""

from __future__ import annotations

import tomllib

import pytest

from distill_core.building import build
from distill_core.methods import find_method
from distill_core.recipe import Recipe, load_recipe, recipe_names
from tests.helpers import self_contained_recipes, tiny_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_the_trip_through_toml(name):
    recipe = load_recipe(name)
    assert Recipe.parse(tomllib.loads(recipe.to_toml())) == recipe
    find_method(recipe.method).Config.parse(recipe.config, where="config")


@pytest.mark.parametrize("name", self_contained_recipes())
def test_a_recipe_builds_what_its_method_needs(name, context):
    method, source = build(tiny_recipe(name), context)
    assert method.roles
    assert source.size > 0


@pytest.mark.parametrize("name", recipe_names())
def test_a_claim_has_an_ablation_and_a_bound(name):
    check = load_recipe(name).check
    if check is None:
        return
    assert check.ablation is not None, "a claim compares with the method's key part off"
    assert any(bound is not None for bound in (check.ratio_at_most, check.at_most, check.at_least))
    assert (check.ratio_at_most is None) == (check.reference is None)
