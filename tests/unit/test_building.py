"""Finding the models that a recipe names."""

from __future__ import annotations

import pytest

from distill_core import api
from distill_core.config import load_recipe
from distill_core.errors import ConfigError


def test_a_recipe_that_is_its_own_teacher_is_refused_instead_of_waiting_for_itself(tmp_path):
    recipe = tmp_path / "circle.toml"
    recipe.write_text(
        f"""
        method = "dmd2"
        steps = 1
        data = {{ name = "digits" }}
        teacher = {{ recipe = "{recipe}" }}
        """
    )
    with pytest.raises(ConfigError, match="needs itself as a teacher"):
        api.train(
            load_recipe(str(recipe)), tmp_path / "run", api.context(tmp_path / "store", tmp_path / "cache")
        )
