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
    recipe = tiny_recipe(name)
    method, source = build(recipe, context)
    config = type(method).Config.parse(recipe.config)
    assert set(method.columns(config)) <= set(source.columns)
    for role in method.roles:
        assert list(getattr(method, role).parameters()), role
    frozen = [child for child, _ in method.named_children() if child not in (*method.roles, *method.held)]
    for child in set(frozen) & {"teacher", "extractor", *recipe.teachers}:
        assert not any(value.requires_grad for value in getattr(method, child).parameters()), child
    assert method.main.kind == method.kind
    tables = set(recipe.optim) | set(recipe.ema)
    assert tables <= set(method.roles), "a table of a role that is not there would train nothing"


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).check])
def test_a_claim_has_a_bound_and_an_ablation_that_changes_the_recipe(name):
    recipe = load_recipe(name)
    for claim in (recipe.check, *recipe.check.also):
        bounds = (claim.ratio_at_most, claim.ratio_at_least, claim.at_most, claim.at_least)
        ablation = claim.ablation
        assert any(bound is not None for bound in bounds) or ablation is not None, claim.metric
        if ablation is not None:
            assert (ablation.ratio_at_least is None) != (ablation.gap_at_least is None), claim.metric
            changed = recipe.override({**recipe.check.set, **ablation.set})
            assert changed.differences(recipe.override(recipe.check.set)), "the ablation turns nothing off"
            find_method(changed.method).Config.parse(changed.config, where="config")
    assert recipe.check.ablation is not None, "a claim compares with the method's key part off"
