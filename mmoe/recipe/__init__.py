"""Recipes: the typed schema, the strict loader and the shipped files."""

from mmoe.recipe.load import dump_recipe, list_recipes, load_recipe
from mmoe.recipe.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "list_recipes", "load_recipe"]
