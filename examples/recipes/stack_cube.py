"""StackCube-v1: chunks of 8 actions, of which 4 are executed."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="StackCube-v1",
    demos=dict(num_demos=1_000, styles=3),
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=4, num_steps=4, n_iterations=8_000),
    total_timesteps=500_000,
)
