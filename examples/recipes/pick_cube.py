"""PickCube-v1: the demos go on after success, since the arm must hold the cube still."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="PickCube-v1",
    demos=dict(num_demos=400, styles=3, noise=0.08, extra_steps=20),
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=4, num_steps=4, n_iterations=8_000),
    total_timesteps=600_000,
    ppo=dict(policy_kwargs=dict(log_std_init=-1.2)),  # a std of 0.3
)
