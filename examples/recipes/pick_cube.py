"""PickCube-v1: few demos, so that there is something left to steer."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="PickCube-v1",
    demos=dict(num_demos=150, styles=3),
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=4, num_steps=4, n_iterations=4_000),
    total_timesteps=200_000,
)
