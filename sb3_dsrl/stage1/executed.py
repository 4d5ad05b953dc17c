"""The noises that rollouts executed, weighted by their advantages.

Letters in shapes: ``n`` macro-steps, ``B`` batch, ``T`` = pred_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch as th
from torch import nn

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.stage0.weights import exp_weights
from sb3_dsrl.stage1.aw_mle import Batch
from sb3_dsrl.stage1.settings import ExecutedSettings
from sb3_dsrl.steering.steering import Steering


@dataclass
class ExecutedNoise:
    """
    Batches of executed noises with their weights.

    :param cond: features, (n, C)
    :param w: the steered part of the noises, (n, T, A), (n, H, A) or (n, 1, A)
    :param weights: (n,)
    """

    cond: th.Tensor
    w: th.Tensor
    weights: th.Tensor

    @classmethod
    def of(cls, rollouts: Rollouts, steering: Steering, settings: ExecutedSettings) -> ExecutedNoise:
        """
        :param rollouts: whole episodes
        :param steering: says which part of the noise is learned
        :param settings: of the weights
        """
        advantages = executed_advantages(rollouts, settings.gae_lambda)
        if settings.normalize_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
        return cls(
            rollouts.cond, steering.steered_part(rollouts.w), exp_weights(advantages / settings.beta, settings.max_weight)
        )

    def sample(self, batch_size: int) -> Batch:
        index = th.randint(len(self.cond), (batch_size,))
        weights = self.weights[index][:, None]
        share = weights / weights.sum()
        scalars = {"stage1/effective_samples": 1.0 / share.pow(2).sum()}
        return Batch(self.cond[index], self.w[index][:, None], weights, scalars)


def executed_advantages(
    rollouts: Rollouts, gae_lambda: float = 0.5, n_folds: int = 4, n_iterations: int = 300, width: int = 128
) -> th.Tensor:
    """
    Advantage of each executed noise: GAE (https://arxiv.org/abs/1506.02438) towards the return until the end of the episode.

    The value is a network on features and time, fitted to observed returns. It is cross-fitted: the value used in an
    episode has never seen that episode, or it would explain the luck of its noise away.

    :param rollouts: whole episodes
    :param gae_lambda: 1 is Monte Carlo, 0 one macro-step
    :param n_folds: of the cross-fit, over episodes
    :param n_iterations: optimiser steps per fold
    :param width: hidden units of the value network
    :return: (n,), in units of the reward
    """
    starts = np.flatnonzero(np.diff(rollouts.episode, prepend=-1))
    step = np.arange(len(rollouts)) - starts[rollouts.episode]
    longest = int(step.max()) + 1
    inputs = th.cat([rollouts.cond, th.from_numpy(step / longest).to(rollouts.cond)[:, None]], dim=1)
    last = np.append(np.diff(rollouts.episode) != 0, True)
    reward, discount = rollouts.reward.numpy(), rollouts.discount.numpy()
    returns = _discounted_sums(reward, discount, last)
    value = _cross_fitted_value(inputs, th.from_numpy(returns), rollouts.episode, n_folds, n_iterations, width).numpy()
    next_value = np.where(last, 0.0, np.append(value[1:], 0.0))
    return th.from_numpy(_discounted_sums(reward + discount * next_value - value, gae_lambda * discount, last))


def _discounted_sums(x: np.ndarray, discount: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Backward sums y_i = x_i + discount_i * y_{i+1} that restart after the last step of each episode."""
    sums = np.zeros(len(x), np.float32)
    running = 0.0
    for i in reversed(range(len(x))):
        running = x[i] + (0.0 if last[i] else discount[i] * running)
        sums[i] = running
    return sums


def _cross_fitted_value(
    inputs: th.Tensor, targets: th.Tensor, episode: np.ndarray, n_folds: int, n_iterations: int, width: int
) -> th.Tensor:
    mean, std = targets.mean(), targets.std() + 1e-8
    fold = th.from_numpy(episode % min(n_folds, int(episode[-1]) + 1))
    value = th.zeros_like(targets)
    for k in fold.unique():
        train = (fold != k) if len(fold.unique()) > 1 else th.ones_like(fold, dtype=th.bool)
        x, y = inputs[train], (targets[train] - mean) / std
        net = nn.Sequential(nn.Linear(x.shape[1], width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        optimizer = th.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(n_iterations):
            index = th.randint(len(x), (256,))
            loss = (net(x[index]).squeeze(-1) - y[index]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with th.no_grad():
            value[fold == k] = net(inputs[fold == k]).squeeze(-1) * std + mean
    return value
