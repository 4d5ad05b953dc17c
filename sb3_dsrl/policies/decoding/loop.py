"""The plain loop of full forward passes, and what every way of decoding shares with it."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

from sb3_dsrl.policies.networks import VelocityNet

#: Velocity at step i for noises (B, M, T, A), once the conditioning is fixed.
Velocity = Callable[[th.Tensor, int], th.Tensor]
#: From (velocity field, cond, w, num_steps) to chunks, as :func:`~sb3_dsrl.policies.decoding.integrate`.
Integrate = Callable[[VelocityNet, th.Tensor, th.Tensor, int], th.Tensor]


def walk(velocity: Velocity, x: th.Tensor, num_steps: int) -> th.Tensor:
    """
    Takes the steps.

    :param velocity: the velocity at each of them
    :param x: noises, (B, M, T, A)
    :param num_steps: their number
    :return: chunks, (B, M, T, A)
    """
    for i in range(num_steps):
        x = th.add(x, velocity(x, i), alpha=1.0 / num_steps)
    return x


def integrate_plainly(velocity: VelocityNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
    """
    Full forward passes of any velocity field on any device.

    :param velocity: the velocity field
    :param cond: (B, C)
    :param w: noises, (B, M, T, A)
    :param num_steps: n; the step size is 1 / n
    :return: (B, M, T, A)
    """

    def at(x: th.Tensor, i: int) -> th.Tensor:
        d = th.full((x.shape[0] * x.shape[1],), 1.0 / num_steps, device=x.device, dtype=x.dtype)
        return velocity(x.flatten(0, 1), d * i, d, cond.repeat_interleave(x.shape[1], dim=0)).unflatten(0, x.shape[:2])

    return walk(at, w, num_steps)


def walk_back(velocity: VelocityNet, cond: th.Tensor, x: th.Tensor, num_steps: int, n_iterations: int = 3) -> th.Tensor:
    """
    From chunk to about its noise: each step is undone by a fixed-point iteration, which converges where a step does not bring
    all noises together.

    :param velocity: the velocity field
    :param cond: (B, C)
    :param x: chunks, (B, T, A)
    :param num_steps: of the decode
    :param n_iterations: for each step, after the first guess
    :return: noises, (B, T, A)
    """
    d = x.new_full((len(x),), 1.0 / num_steps)
    for i in reversed(range(num_steps)):
        after = x
        for _ in range(1 + n_iterations):
            x = after - velocity(x, d * i, d, cond) / num_steps
    return x


def step_times(num_steps: int, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param num_steps: n
    :param like: gives device and dtype
    :return: t and d of each step, (n,) each
    """
    d = th.full((num_steps,), 1.0 / num_steps, device=like.device, dtype=like.dtype)
    return d * th.arange(num_steps, device=like.device), d
