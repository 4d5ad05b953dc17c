"""What the recipes for images have in common."""

from functools import partial

from sb3_dsrl import ImageTraining, VelocityMLP
from sb3_dsrl.policies.encoders import SpatialSoftmaxConv

#: Height and width of the camera's images in pixels.
SIZE = 84

DEMOS = dict(obs_mode="rgb", camera_size=SIZE)
ENV = dict(sensor_configs=dict(width=SIZE, height=SIZE))
FLOW = dict(
    net_class=VelocityMLP,
    backbone=partial(SpatialSoftmaxConv, out_dim=128, sharpness=5.0),
    images=ImageTraining(random_shift_pad=1, repeats=4),
    obs_horizon=1,
    pred_horizon=8,
    act_horizon=4,
    num_steps=4,
    batch_size=512,
)
