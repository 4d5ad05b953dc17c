"""PegInsertionSide-v1: 3 mm of play between peg and hole. Noise drawn often frees a peg that is stuck at the hole's edge."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="PegInsertionSide-v1",
    demos=dict(num_demos=1_000),
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=2, num_steps=4, n_iterations=12_000),
    total_timesteps=400_000,
    deterministic=False,
)
