"""PickCube-v1 from images: the goal is part of the state, the cube is seen by a camera only."""

from recipes.images import DEMOS, ENV, FLOW
from recipes.recipe import Recipe

RECIPE = Recipe(
    env_id="PickCube-v1",
    variant="rgb",
    demos=dict(DEMOS, num_demos=200),
    flow=dict(FLOW, n_iterations=2_500),
    env=ENV,
    total_timesteps=150_000,
)
