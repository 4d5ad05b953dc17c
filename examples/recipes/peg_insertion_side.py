"""PegInsertionSide-v1: 3 mm of play between peg and hole."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="PegInsertionSide-v1",
    demos=dict(num_demos=500),
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=4, num_steps=4, n_iterations=8_000),
    total_timesteps=300_000,
)
