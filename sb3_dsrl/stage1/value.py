"""Warm start of the value network: what the critic says of the policy's own noise, or what followed."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage1.aw_mle import Records
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.steering.scores import score_noises
from sb3_dsrl.steering.steering import Steering


def fit_value(
    policy: LatentPolicy,
    steering: Steering,
    critic: EnsembleChunkCritic,
    cond: th.Tensor,
    batch_size: int,
    records: Records,
    n_iterations: int = 500,
) -> None:
    """
    Fits the value network, and nothing else of the policy, to the critic under the policy.

    :param policy: the latent policy
    :param steering: decodes its noise
    :param critic: ensemble chunk critic
    :param cond: features of the states, (n, C)
    :param batch_size: states in a batch
    :param records: where the training is shown and kept
    :param n_iterations: optimiser steps
    """

    def critics_word(index: th.Tensor, batch: th.Tensor) -> th.Tensor:
        with th.no_grad():
            noise, _ = steering.action_space.split(policy.sample(batch))
            w = steering.full_noise(noise)[:, None]
            return score_noises(steering, critic, batch, w, kappa=0.0)[:, 0]

    _regress(policy, cond, critics_word, batch_size, records, n_iterations)


def fit_value_to_returns(
    policy: LatentPolicy, cond: th.Tensor, returns: th.Tensor, batch_size: int, records: Records, n_iterations: int = 500
) -> None:
    """
    Fits the value network, and nothing else of the policy, to what followed states.

    :param policy: the latent policy
    :param cond: features of the states, (n, C)
    :param returns: discounted macro rewards from them on, (n,)
    :param batch_size: states in a batch
    :param records: where the training is shown and kept
    :param n_iterations: optimiser steps
    """
    _regress(policy, cond, lambda index, batch: returns[index].to(batch), batch_size, records, n_iterations)


def _regress(
    policy: LatentPolicy,
    cond: th.Tensor,
    targets: Callable[[th.Tensor, th.Tensor], th.Tensor],
    batch_size: int,
    records: Records,
    n_iterations: int,
) -> None:
    params = [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
    optimizer = th.optim.Adam(params, lr=1e-3)
    loop = records.loop("stage 1: value", n_iterations, dict(policy=policy, optimizer=optimizer))
    for _ in loop:
        index = th.randint(len(cond), (batch_size,))
        batch = cond[index].to(policy.device)
        target = targets(index, batch)
        loss = (policy.predict_values(batch).squeeze(-1) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.log({"stage1/value_loss": loss})
