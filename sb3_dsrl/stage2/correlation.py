"""Noise that is correlated in time, with a density that PPO can use.

Independent noise makes a random walk: what takes a push in one direction for many macro-steps is hardly ever tried. An AR(1)
process goes on in one direction for about ``1 / (1 - rho)`` macro-steps::

    w_t = mean(s_t) + std(s_t) z_t,    z_t = rho z_{t-1} + sqrt(1 - rho^2) eps_t,    eps_t ~ N(0, I)

Two densities could stand in PPO's ratio. The marginal one, ``N(mean, std)``, ignores the past, as gSDE
(https://arxiv.org/abs/2005.05719) and coloured noise for PPO (https://arxiv.org/abs/2312.11091) do. Its ratio is 1 before an
update, too, but it is not the density that w_t was drawn from: s_t was reached through z_{t-1}, so given s_t the noise has
another mean than the policy says, the score of an action no longer has mean 0 in a state, and the gradient is biased. The
conditional one is exact. Given the macro-step before, z_{t-1} is known, ``(w_{t-1} - mean(s_{t-1})) / std(s_{t-1})``, and::

    w_t | s_t, s_{t-1}, w_{t-1}  ~  N(mean(s_t) + rho std(s_t) z_{t-1}, sqrt(1 - rho^2) std(s_t)).

This is an autoregressive policy (https://arxiv.org/abs/1903.11524). It looks at the last macro-step as well, and all that it
looks at is in the rollout buffer. The product of its densities is the likelihood of the trajectory, as a function of the
weights, so the gradient flows through mean and std of both macro-steps. Where an episode ends, z goes on. In the first
macro-step of a rollout there is nothing before, and z_t ~ N(0, I).

Stock PPO and A2C evaluate shuffled macro-steps, so each of them must bring the one before along: that is what
:class:`CorrelatedRolloutBuffer` does, and all it does.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import Normal


class Previous(NamedTuple):
    """
    The macro-step before.

    :param obs: (B, C)
    :param actions: as they were drawn, (B, D)
    :param exists: False at the start of a rollout, (B, 1)
    """

    obs: th.Tensor
    actions: th.Tensor
    exists: th.Tensor


class WithPrevious(NamedTuple):
    """
    What stands for the observations of a minibatch.

    :param obs: (B, C)
    :param previous: the macro-step before each of them
    """

    obs: th.Tensor
    previous: Previous


def carried(now: Normal, before: Normal, previous: Previous, rho: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Mean and log standard deviation of an action, given the macro-step before.

    :param now: without regard to it, (B, D)
    :param before: what the action before was drawn from, (B, D), without regard to the one before that
    :param previous: that action
    :param rho: correlation from one macro-step to the next
    :return: mean and log std, (B, D) each
    """
    z = (previous.actions - before.mean) / before.stddev
    mean = now.mean + th.where(previous.exists, rho * now.stddev * z, 0.0)
    return mean, now.stddev.log() + th.where(previous.exists, 0.5 * math.log1p(-(rho**2)), 0.0)


class CorrelatedRolloutBuffer(RolloutBuffer):
    """
    SB3's buffer, whose minibatches hold a :class:`WithPrevious` in the place of observations: for ``PPO`` and ``A2C`` with
    ``noise_correlation``. ``ppo_kwargs(env, noise_correlation=...)`` chooses it.
    """

    _previous_obs: np.ndarray
    _previous_actions: np.ndarray
    _exists: np.ndarray

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:  # type: ignore[override]
        """
        :param batch_size: macro-steps in a minibatch; None is all
        :return: shuffled minibatches
        """
        if not self.generator_ready:  # as they were collected, (n_steps, N, ...)
            exists = np.ones((*self.rewards.shape, 1), bool)
            exists[0] = False
            self._previous_obs, self._previous_actions, self._exists = (
                self.swap_and_flatten(x)
                for x in (np.roll(self.observations, 1, axis=0), np.roll(self.actions, 1, axis=0), exists)
            )
        yield from super().get(batch_size)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> RolloutBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        obs, actions, exists = (
            self.to_torch(x[batch_inds]) for x in (self._previous_obs, self._previous_actions, self._exists)
        )
        together: Any = WithPrevious(samples.observations, Previous(obs, actions, exists))
        return samples._replace(observations=together)
