"""
Integrating a velocity field from noise to chunk, quickly: the same function as a loop of forward passes, in another order.

What depends on the observation alone is computed once per observation, and what depends on (t, d) alone once per decode,
instead of once per step and noise. The U-Net's convolutions over a few entries become plain matrix products in a
layout with channels last, and large batches are cut into blocks whose activations stay in the cache.

Letters in shapes: ``B`` observations, ``M`` noises for each, ``T`` = pred_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_dsrl.policies.decoding.choice import choose
from sb3_dsrl.policies.decoding.loop import Integrate, integrate_plainly, walk, walk_back
from sb3_dsrl.policies.decoding.mlp import mlp_velocity
from sb3_dsrl.policies.decoding.unet import BLOCK_SIZE, PATHS
from sb3_dsrl.policies.networks import VelocityMLP, VelocityNet, VelocityUNet

__all__ = ["Integrate", "accelerated", "integrate", "walk_back"]


def integrate(velocity: VelocityNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
    """
    Takes ``num_steps`` equal shortcut steps from t = 0 to t = 1. The quick ways are for the CPU: on any other device the loop
    of forward passes is as fast, and it can be compiled, see :func:`accelerated`.

    :param velocity: the velocity field
    :param cond: (B, C)
    :param w: noises, (B, M, T, A)
    :param num_steps: n; the step size is 1 / n
    :return: (B, M, T, A)
    """
    if w.device.type == "cpu" and not th.is_grad_enabled():
        if isinstance(velocity, VelocityUNet):
            path = choose(velocity, cond, w, PATHS, BLOCK_SIZE)
            return PATHS[path](velocity, cond, w, num_steps)
        if isinstance(velocity, VelocityMLP):
            return walk(mlp_velocity(velocity, cond, num_steps), w, num_steps)
    return integrate_plainly(velocity, cond, w, num_steps)


def accelerated(dtype: th.dtype | None, compile_kwargs: dict[str, Any] | None) -> Integrate:
    """
    The plain loop in lower precision and compiled, to take the place of :func:`integrate` on a GPU.

    :param dtype: of the matrix products (autocast), such as ``torch.bfloat16``; None is float32
    :param compile_kwargs: of ``torch.compile``; None compiles nothing
    """

    def run(velocity: VelocityNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
        with th.autocast(w.device.type, dtype, enabled=dtype is not None):
            return integrate_plainly(velocity, cond, w, num_steps).float()

    compiled = run if compile_kwargs is None else th.compile(run, **compile_kwargs)
    return lambda *args: compiled(*args).clone()  # the next replay of a CUDA graph writes to the same memory
