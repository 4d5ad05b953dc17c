"""PushCube-v1 from images: where cube and goal are is seen by a camera only."""

from functools import partial

from recipes.recipe import Recipe
from sb3_dsrl import ImageTraining, VelocityMLP
from sb3_dsrl.policies.encoders import SpatialSoftmaxConv

SIZE = 84  # pixels

RECIPE = Recipe(
    env_id="PushCube-v1",
    variant="rgb",
    demos=dict(num_demos=150, obs_mode="rgb", camera_size=SIZE),
    flow=dict(
        net_class=VelocityMLP,
        backbone=partial(SpatialSoftmaxConv, out_dim=128, sharpness=5.0),
        images=ImageTraining(random_shift_pad=1, repeats=4),
        obs_horizon=1,
        pred_horizon=8,
        act_horizon=4,
        num_steps=4,
        n_iterations=1_200,
        batch_size=512,
    ),
    env=dict(sensor_configs=dict(width=SIZE, height=SIZE)),
    total_timesteps=100000,
)
