"""Recipes: how each task is learned, one file a task."""

from recipes import lift_peg_upright, peg_insertion_side, pick_cube, pick_cube_rgb, push_cube, push_cube_rgb, stack_cube
from recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (push_cube, pick_cube, lift_peg_upright, stack_cube, peg_insertion_side, push_cube_rgb, pick_cube_rgb)
}
