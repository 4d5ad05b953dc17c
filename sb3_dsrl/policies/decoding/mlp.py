"""The MLP's velocity: the first layer is split into what reads x, what reads (t, d), and what reads the observation."""

from __future__ import annotations

from typing import Any

import torch as th
from torch.nn import functional as F

from sb3_dsrl.policies.activations import mish
from sb3_dsrl.policies.decoding.loop import Velocity, step_times
from sb3_dsrl.policies.networks import VelocityMLP


def mlp_velocity(net: VelocityMLP, cond: th.Tensor, num_steps: int) -> Velocity:
    """
    :param net: the velocity field
    :param cond: (B, C)
    :param num_steps: n
    :return: the velocity at each step
    """
    n_x = net.pred_horizon * net.action_dim
    from_x, from_step, from_cond = net.inlet.weight.split([n_x, net.inlet.in_features - n_x - net.cond_dim, net.cond_dim], 1)
    of_steps = F.linear(net.step_embedding(*step_times(num_steps, cond)), from_step, net.inlet.bias)
    of_cond = F.linear(cond, from_cond)[:, None]

    blocks: list[Any] = list(net.blocks)
    outlet: Any = net.outlet

    def at(x: th.Tensor, i: int) -> th.Tensor:
        h = F.linear(x.flatten(2), from_x) + (of_cond + of_steps[i])
        for norm, _, linear1, _, linear2 in blocks:
            h = h + linear2(mish(linear1(mish(norm(h)))))
        norm, _, linear = outlet
        return linear(mish(norm(h))).reshape(x.shape)

    return at
