"""Advantage-weighted maximum likelihood (AW-MLE) of noise: the loss and the loop that both weightings feed.

Letters in shapes: ``B`` batch, ``M`` candidates, ``T`` = pred_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch as th
from torch import nn

from sb3_dsrl.stage1.settings import FitSettings
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.utils.checkpoint import Stateful, TrainingCheckpoint, rng_state, set_rng_state
from sb3_dsrl.utils.progress import ProgressLoop

#: Called with the number of iterations that are done and the policy.
FitCallback = Callable[[int, LatentPolicy], None]


class Batch(NamedTuple):
    """
    What one iteration learns from.

    :param cond: features, (B, C)
    :param w: the steered part of noises, (B, M, T, A), (B, M, H, A) or (B, M, 1, A)
    :param weights: (B, M)
    :param scalars: to be logged
    """

    cond: th.Tensor
    w: th.Tensor
    weights: th.Tensor
    scalars: dict[str, th.Tensor]


class Watcher(Protocol):
    """Looks at the policy after every iteration and keeps something of what it saw."""

    def look(self, done: int, policy: LatentPolicy) -> None:
        """
        :param done: iterations
        :param policy: as it is after them
        """

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From checkpoints."""


class WeightedNoise(Protocol):
    """A weighting of noise."""

    def sample(self, batch_size: int) -> Batch:
        """
        :param batch_size: states
        :return: tensors on the CPU
        """


@dataclass(frozen=True)
class Records:
    """
    Who watches a training, and where its state is kept.

    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :param callback: see :data:`FitCallback`, or None
    :param callback_freq: iterations between two calls
    :param log_interval: iterations between two records in TensorBoard
    :raises ValueError: if ``callback_freq`` or ``log_interval`` is below 1
    """

    tensorboard_log: str | Path | None
    progress_bar: bool
    checkpoint: TrainingCheckpoint | None
    callback: FitCallback | None
    callback_freq: int
    log_interval: int

    def __post_init__(self) -> None:
        for name in ("callback_freq", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")

    def loop(self, name: str, n_iterations: int, parts: dict[str, Stateful]) -> ProgressLoop:
        """A loop that shows and keeps what happens in it."""
        return ProgressLoop(
            name,
            n_iterations,
            self.progress_bar,
            self.tensorboard_log,
            self.log_interval,
            checkpoint=self.checkpoint,
            parts=parts,
        )

    def show(self, done: int, policy: LatentPolicy) -> None:
        """
        Calls the callback if it is its turn. The policy is in evaluation mode meanwhile. Whatever the callback draws or
        changes in the policy, training goes on as if it had not been called.
        """
        if self.callback is None or done % self.callback_freq:
            return
        training, state, generators = policy.training, deepcopy(policy.state_dict()), rng_state()
        try:
            self.callback(done, policy.eval())
        finally:
            policy.load_state_dict(state)
            policy.train(training)
            set_rng_state(generators)


def aw_mle_loss(policy: LatentPolicy, obs: th.Tensor, w: th.Tensor, weights: th.Tensor, kl_coef: float = 1e-3) -> th.Tensor:
    """
    Advantage-weighted negative log-likelihood of noise plus a KL penalty to the prior,
    ``-mean_B sum_M weights * log pi(w | obs) + kl_coef * KL(pi || N(0, I))``.

    :param policy: the latent policy; its density is pi's own, without the prior mix
    :param obs: features, (B, C)
    :param w: the steered part of noises, (B, M, T, A), (B, M, H, A) or (B, M, 1, A)
    :param weights: (B, M)
    :param kl_coef: weight of the KL
    :return: the loss, a scalar
    """
    return -(weights * policy.log_prob(obs, w)).sum(dim=1).mean() + kl_coef * policy.kl_to_prior(obs).mean()


def fit_policy(
    policy: LatentPolicy,
    noise: WeightedNoise,
    settings: FitSettings,
    records: Records,
    watcher: Watcher | None = None,
) -> None:
    """
    Fits pi, and nothing else of the policy, to weighted noise. The outputs for a residual get no gradient: a new policy's mean
    of 0 stays 0.

    :param policy: the latent policy
    :param noise: what it learns from
    :param settings: of the training
    :param records: where it is shown and kept
    :param watcher: looks at the policy after every iteration
    """
    params = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    params += [policy.log_std] if settings.learn_std else []
    optimizer = th.optim.Adam(params, lr=settings.learning_rate)
    parts: dict[str, Stateful] = dict(policy=policy, optimizer=optimizer)
    if watcher is not None:
        parts["watcher"] = watcher
    loop = records.loop("stage 1", settings.n_iterations, parts)
    for i in loop:
        batch = noise.sample(settings.batch_size)
        cond, w, weights = (x.to(policy.device) for x in batch[:3])
        loss = aw_mle_loss(policy, cond, w, weights, settings.kl_coef)
        optimizer.zero_grad()
        loss.backward()
        if not settings.learn_std:
            _drop_std_gradients(policy.action_net)
        optimizer.step()
        loop.log({"stage1/loss": loss, **batch.scalars})
        if watcher is not None:
            watcher.look(i + 1, policy)
        records.show(i + 1, policy)


def _drop_std_gradients(head: nn.Module) -> None:
    # The second half of the head's outputs is the state-dependent part of log_std.
    for parameter in head.parameters():
        if parameter.grad is not None:
            parameter.grad[len(parameter) // 2 :] = 0.0
