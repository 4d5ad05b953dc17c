"""Recipes: how each task is learned, one file a task."""

from recipes import lift_peg_upright, peg_insertion_side, pick_cube, push_cube, stack_cube
from recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.RECIPE.env_id: module.RECIPE for module in (push_cube, pick_cube, lift_peg_upright, stack_cube, peg_insertion_side)
}
