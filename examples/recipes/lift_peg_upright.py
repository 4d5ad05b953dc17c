"""LiftPegUpright-v1: the peg turns between the fingers until it stands. Few demos leave something to steer."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="LiftPegUpright-v1",
    demos=dict(num_demos=30, styles=3),
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=4, num_steps=4, n_iterations=3_000),
    total_timesteps=600_000,
    ppo=dict(policy_kwargs=dict(log_std_init=-1.2)),  # a std of 0.3
)
