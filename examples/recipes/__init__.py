"""Recipes: how each task is learned, one file a task."""

from recipes import push_cube, stack_cube
from recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.env_id: recipe for recipe in (push_cube.RECIPE, stack_cube.RECIPE)}
