"""PushCube-v1 from images: where cube and goal are is seen by a camera only."""

from recipes.images import DEMOS, ENV, FLOW
from recipes.recipe import Recipe

RECIPE = Recipe(
    env_id="PushCube-v1",
    variant="rgb",
    demos=dict(DEMOS, num_demos=150),
    flow=dict(FLOW, n_iterations=1_200),
    env=ENV,
    total_timesteps=100_000,
)
