"""Keys of cached models: whatever code of the methods made a model is part of its key."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from distill_core.context import _modules, cache_key
from distill_core.method import Method
from distill_core.methods import find_method, method_files
from distill_core.recipe import load_recipe
from tests.test_architecture import imports


@pytest.mark.parametrize("name", sorted(method_files()))
def test_a_key_covers_the_modules_that_a_method_shares_with_others(name):
    bases = [base for base in find_method(name).__mro__ if issubclass(base, Method)]
    covered = {module.__name__ for module in _modules(bases)}
    file = Path(importlib.import_module(method_files()[name]).__file__)
    shared = {found for found in imports(file) if found.startswith("distill_core.methods.")}
    modules = {found for found in shared if found.rpartition(".")[2].startswith("_")}
    assert {"distill_core.method", method_files()[name], *modules} <= covered


def test_a_key_is_of_what_decides_the_weights():
    recipe = load_recipe("edm_digits")
    key = cache_key(recipe)
    assert cache_key(recipe.override({"title": "other", "publish.name": "other"})) == key
    assert len({key, *(cache_key(recipe.override(c)) for c in ({"seed": 3}, {"steps": 7}))}) == 3
