"""Recipes: their tables, overrides, claims, paths, and what they mean for another teacher. Imports no torch."""

from distill_core.recipe.overrides import parse_overrides
from distill_core.recipe.reading import load_recipe, recipe_names
from distill_core.recipe.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "parse_overrides", "recipe_names"]
