"""PushCube-v1: a weak flow from 50 bad demos, which come with the repository."""

from recipes.recipe import Recipe
from sb3_dsrl import VelocityMLP

RECIPE = Recipe(
    env_id="PushCube-v1",
    demos=dict(num_demos=50, expert="planner", speedup=5, noise=0.45, trim_pauses=True, max_episode_steps=50),
    spatial_features=False,
    flow=dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=4, act_horizon=4, num_steps=4, n_iterations=800),
    critic_iterations=300,
    total_timesteps=90_000,
)
