"""Losses of stage 0 that fit the network of a policy to demos.

Letters in shapes: ``B`` batch, ``T`` = pred_horizon, ``A`` action dim, ``C`` conditioning features.
"""

from __future__ import annotations

import torch as th
from torch import nn


def shortcut_loss(
    velocity: nn.Module,
    teacher: nn.Module,
    cond: th.Tensor,
    chunk: th.Tensor,
    weights: th.Tensor | None = None,
    consistency_fraction: float = 0.25,
    n_levels: int = 4,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Flow-matching and self-consistency loss of a shortcut model.

    Part of the batch learns the instantaneous velocity ``chunk - noise`` at d = 0. The rest learns that one step of
    size 2d equals two steps of size d taken by the teacher, with ``2d = 1, 1/2, ..., 2^(1-n_levels)`` and a continuous t.

    :param velocity: the velocity field that learns
    :param teacher: its exponential moving average
    :param cond: (B, C)
    :param chunk: (B, T, A)
    :param weights: weight of each sample in the flow-matching part, (B,); None is 1
    :param consistency_fraction: part of the batch for self-consistency
    :param n_levels: number of step sizes; the smallest teacher step is replaced by the instantaneous velocity
    :return: the two losses
    """
    batch, n_consistent = len(chunk), round(len(chunk) * consistency_fraction)
    noise = th.randn_like(chunk)
    t = th.rand(batch, device=chunk.device)
    d = th.zeros_like(t)
    target = chunk - noise
    if n_consistent:
        big = 2.0 ** -th.randint(n_levels, (n_consistent,), device=chunk.device)
        d[:n_consistent] = big
        t[:n_consistent] *= 1 - big
    x = th.lerp(noise, chunk, t[:, None, None])
    if n_consistent:
        with th.no_grad():
            half, start, at = big / 2, t[:n_consistent], x[:n_consistent]
            teacher_d = half * (half > 2.0**-n_levels)
            v1 = teacher(at, start, teacher_d, cond[:n_consistent])
            v2 = teacher(at + half[:, None, None] * v1, start + half, teacher_d, cond[:n_consistent])
            target[:n_consistent] = (v1 + v2) / 2
    error = (velocity(x, t, d, cond) - target).pow(2).mean(dim=(1, 2))
    matching = error[n_consistent:]
    if weights is not None:
        matching = matching * weights[n_consistent:]
    return matching.mean(), error[:n_consistent].mean() if n_consistent else error.new_zeros(())


def noise_prediction_loss(predicted: th.Tensor, noise: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
    """
    Mean squared error of the noise that a diffusion model predicts (https://arxiv.org/abs/2006.11239, "simple" objective).

    :param predicted: (B, T, A)
    :param noise: the noise that was added, (B, T, A)
    :param weights: weight of each sample, (B,); None is 1
    """
    error = (predicted - noise).pow(2).mean(dim=(1, 2))
    return (error if weights is None else error * weights).mean()
