"""Stage 1: learn the latent policy offline by advantage-weighted maximum likelihood (AW-MLE) of noise.

Two weightings feed one loss. *Candidates*: M noises a state, decoded by the frozen flow, scored by the critic
ensemble. *Executed*: the noises that rollouts of the flow executed, weighted by what came of them.

Letters in shapes: ``B`` batch, ``M`` candidates, ``T`` = pred_horizon, ``A`` action dim, ``C`` features, ``n`` macro-steps.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage0.critic import train_critic
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import FeatureTransitions, check_demos_fit, demo_transitions
from sb3_dsrl.stage0.weights import exp_weights
from sb3_dsrl.stage1.candidates import FreshCandidates, PooledCandidates, WeightedCandidates
from sb3_dsrl.stage1.executed import executed_advantages
from sb3_dsrl.stage1.gate import Gate
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.steering.contract import REWARDS, check_agreement
from sb3_dsrl.steering.steering import Steering
from sb3_dsrl.steering.vec_env import find_steering
from sb3_dsrl.utils.checkpoint import Stateful, TrainingCheckpoint
from sb3_dsrl.utils.progress import ProgressLoop

Weighting = Literal["auto", "candidates", "executed"]


def aw_mle_loss(policy: LatentPolicy, obs: th.Tensor, w: th.Tensor, weights: th.Tensor, kl_coef: float = 1e-3) -> th.Tensor:
    """
    Advantage-weighted negative log-likelihood of noise plus a KL penalty to the prior,
    ``-mean_B sum_M weights * log pi(w | obs) + kl_coef * KL(pi || N(0, I))``.

    :param policy: the latent policy; its density is pi's own, without the prior mix
    :param obs: features, (B, C)
    :param w: noises, (B, M, T, A)
    :param weights: (B, M)
    :param kl_coef: weight of the KL
    """
    return -(weights * policy.log_prob(obs, w)).sum(dim=1).mean() + kl_coef * policy.kl_to_prior(obs).mean()


@dataclass
class _ExecutedNoise:
    """Batches of executed noises with their weights."""

    cond: th.Tensor
    w: th.Tensor
    weights: th.Tensor

    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        index = th.randint(len(self.cond), (batch_size,))
        weights = self.weights[index][:, None]
        share = weights / weights.sum()
        return self.cond[index], self.w[index][:, None], weights, {"stage1/effective_samples": 1.0 / share.pow(2).sum()}


def pretrain_latent(
    target: SteerablePolicy | BaseAlgorithm,
    demos: Demos | str | Path | None = None,
    rollouts: Rollouts | None = None,
    *,
    weighting: Weighting = "auto",
    n_iterations: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    n_candidates: int = 16,
    pool_size: int | None = None,
    kappa: float = 1.0,
    tau: float = 5.0,
    beta: float | None = None,
    kl_coef: float | None = None,
    normalize_advantages: bool = True,
    max_weight: float = 20.0,
    gae_lambda: float = 0.5,
    learn_std: bool = False,
    warm_start_value: bool = False,
    gate: Gate | None = None,
    ignore_terminations: bool | None = None,
    policy_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
) -> LatentPolicy:
    """
    Stage 1: trains a latent policy offline, before PPO or into a model that exists.

    With ``weighting="candidates"`` the method's AW-MLE: ``n_candidates`` noises a state, scored by the critic. If
    rollouts are given, a copy of the critic is first trained on demos and rollouts, so that it has seen failures. With
    ``weighting="executed"`` the noises of the rollouts, weighted by their advantages; no critic is needed. "auto"
    takes "executed" where there are rollouts.

    :param target: a flow (returns a new policy) or a model with "LatentPolicy" on a steered env (trained in place)
    :param demos: demos, or the path of an ``.h5`` file
    :param rollouts: of the frozen flow, from :func:`~sb3_dsrl.collect_rollouts`
    :param weighting: see above
    :param n_iterations: optimiser steps; None is 2,000 for candidates and 500 for executed noises
    :param batch_size: states in a batch
    :param learning_rate: of stage 1's own Adam; a model's optimiser stays as it is
    :param n_candidates: M
    :param pool_size: candidates of each state that are drawn from the prior, decoded and scored once, beforehand; every
        iteration takes M of them. None draws fresh ones at every iteration, which costs a decode of
        ``batch_size * n_candidates`` noises each time.
    :param kappa: the score is mean - kappa * std over the ensemble
    :param tau: temperature of the soft baseline
    :param beta: temperature of the weights; None is 1.0 for candidates and 0.3 for executed noises
    :param kl_coef: weight of KL(pi || N(0, I)); None is 1e-3 for candidates and 1e-2 for executed noises
    :param normalize_advantages: per state for candidates, over all macro-steps for executed noises
    :param max_weight: clip of the weights of executed noises
    :param gae_lambda: of the advantages of executed noises
    :param learn_std: let the policy change its std; False holds it at its start (exactly so if the std does not depend on the
        observation yet, as in a new policy)
    :param warm_start_value: also fit the value network to the critic under the new policy; reward scale, gamma and
        terminations of stage 2 must be the critic's
    :param gate: tests the result on fresh rollouts and keeps the start if that was better; None keeps the result
    :param ignore_terminations: of the demos' transitions, when the critic is trained; the same as in stage 2
    :param policy_kwargs: of the new policy, only when ``target`` is a flow; a model that it is copied into must have the same
        ``net_arch``
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :return: the trained policy, in evaluation mode
    :raises ValueError: if the data does not fit the flow, is missing, or is missing what the weighting needs, or an
        argument is out of range
    """
    if seed is not None:
        th.manual_seed(seed)
    if demos is None and rollouts is None:
        raise ValueError("pretrain_latent needs demos, rollouts, or both")
    if weighting == "auto":
        weighting = "executed" if rollouts is not None else "candidates"
    if weighting not in ("candidates", "executed"):
        raise ValueError(f"weighting must be 'auto', 'candidates' or 'executed', found {weighting!r}")
    executed = weighting == "executed"
    n_iterations = (500 if executed else 2_000) if n_iterations is None else n_iterations
    beta = (0.3 if executed else 1.0) if beta is None else beta
    kl_coef = (1e-2 if executed else 1e-3) if kl_coef is None else kl_coef
    checks = [("n_candidates", n_candidates, 2), ("n_iterations", n_iterations, 1), ("batch_size", batch_size, 1)]
    if pool_size is not None:
        checks.append(("pool_size", pool_size, n_candidates))
    for name, value, smallest in checks:
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, found {value}")
    for name, temperature in (("beta", beta), ("tau", tau)):
        if temperature <= 0:
            raise ValueError(f"{name} is a temperature and must be positive, found {temperature}")
    if kl_coef < 0:
        raise ValueError(f"kl_coef must not be negative, found {kl_coef}")
    if max_weight <= 0:
        raise ValueError(f"max_weight must be positive, found {max_weight}")
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"gae_lambda must lie in [0, 1], found {gae_lambda}")

    steering, policy = _steering_and_policy(target, policy_kwargs)
    flow = steering.flow
    if demos is not None:  # also where only the rollouts are used: a wrong file should not go unnoticed
        demos = demos if isinstance(demos, Demos) else load_demos(demos)
        check_demos_fit(flow, demos)
    if warm_start_value and steering.contract.gamma != flow.gamma:
        raise ValueError(
            f"warm_start_value: the env's gamma is {steering.contract.gamma}, but the flow's critic knows {flow.gamma}"
        )
    if rollouts is not None:
        _check_rollouts_fit(steering, rollouts)
    home = policy.device
    policy.to(flow.device)
    start = deepcopy(policy.state_dict())
    transitions, critic = None, None
    if ignore_terminations is None:
        ignore_terminations = steering.contract.ignore_terminations
    if warm_start_value or not executed:
        transitions = _all_transitions(flow, demos, rollouts, ignore_terminations)
        critic = _critic(flow, transitions, rollouts, tensorboard_log, progress_bar, checkpoint)
    source: _ExecutedNoise | WeightedCandidates
    if executed:
        if rollouts is None:
            raise ValueError("weighting='executed' weighs the noises of rollouts, but no rollouts were given")
        advantages = executed_advantages(rollouts, gae_lambda)
        if normalize_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
        weights = exp_weights(advantages / beta, max_weight)
        w = rollouts.w if rollouts.w.shape[1:] == steering.action_space.shape else rollouts.w[:, steering.rows]
        source = _ExecutedNoise(*(x.to(flow.device) for x in (rollouts.cond, w, weights)))
    else:
        assert critic is not None and transitions is not None
        candidates: FreshCandidates | PooledCandidates
        if pool_size is None:
            candidates = FreshCandidates(steering, critic, transitions.cond, n_candidates, kappa)
        else:
            candidates = PooledCandidates.build(
                steering, critic, transitions.cond, pool_size, n_candidates, kappa, progress_bar
            )
        source = WeightedCandidates(candidates, steering.rows, tau, beta, normalize_advantages)
    _fit_policy(
        policy,
        source,
        n_iterations,
        batch_size,
        learning_rate,
        kl_coef,
        learn_std,
        tensorboard_log,
        progress_bar,
        checkpoint,
    )
    if gate is not None:
        gate.decide(policy.eval(), start)
    if warm_start_value:
        assert critic is not None and transitions is not None
        _fit_value(policy, steering, critic, transitions.cond, batch_size, tensorboard_log, progress_bar, checkpoint)
    return policy.to(home).eval()


def _steering_and_policy(
    target: SteerablePolicy | BaseAlgorithm, policy_kwargs: dict[str, Any] | None
) -> tuple[Steering, LatentPolicy]:
    if isinstance(target, SteerablePolicy):
        steering = Steering(target)
        spaces = steering.observation_space, steering.action_space
        return steering, LatentPolicy(*spaces, lr_schedule=lambda _: 3e-4, **(policy_kwargs or {}))
    if not isinstance(target, BaseAlgorithm):
        raise TypeError(f"pretrain_latent expects a FlowPolicy or a model with 'LatentPolicy', found {type(target).__name__}")
    if policy_kwargs is not None:
        raise ValueError("policy_kwargs describe a new policy, but a model was given; pass them to the model")
    if not isinstance(target.policy, LatentPolicy):
        raise ValueError(f"pretrain_latent expects a model with 'LatentPolicy', found {type(target.policy).__name__}")
    env = target.get_env()
    if env is None:
        raise ValueError("pretrain_latent needs the model's env to find the flow: call model.set_env(env) first")
    return find_steering(env), target.policy


def _check_rollouts_fit(steering: Steering, rollouts: Rollouts) -> None:
    names = ("flow_hash", "act_horizon", *REWARDS, "num_steps")  # not the steering mode: "full" noise also serves the others
    check_agreement("rollouts", rollouts.contract, "env", steering.contract, names)
    entries = steering.rows.stop - steering.rows.start
    usable = (entries,) if steering.contract.steer_mode == "shared" else (entries, steering.flow.pred_horizon)
    if rollouts.w.shape[1] not in usable:
        raise ValueError(f"The rollouts steer {rollouts.w.shape[1]} entries of the noise, expected {entries}: see steer_mode")


def _all_transitions(
    flow: SteerablePolicy, demos: Demos | None, rollouts: Rollouts | None, ignore_terminations: bool | None
) -> FeatureTransitions:
    parts = []
    if demos is not None:
        parts.append(demo_transitions(flow, demos, ignore_terminations))
    if rollouts is not None:
        parts.append(rollouts.transitions().to(flow.device))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _critic(
    flow: SteerablePolicy,
    transitions: FeatureTransitions,
    rollouts: Rollouts | None,
    tensorboard_log: str | Path | None,
    progress_bar: bool,
    checkpoint: TrainingCheckpoint | None,
) -> EnsembleChunkCritic:
    if flow.critic is None:
        raise ValueError("This flow has no critic to score candidates with: use weighting='executed' with rollouts")
    if rollouts is not None:
        critic = deepcopy(flow.critic)
        return train_critic(
            flow,
            transitions,
            critic=critic,
            tensorboard_log=tensorboard_log,
            progress_bar=progress_bar,
            checkpoint=checkpoint,
        )
    if not flow.critic.updates:
        raise ValueError("This flow's critic is untrained: call train_critic(flow, demo_transitions(flow, demos)) first")
    return flow.critic


def _fit_policy(
    policy: LatentPolicy,
    source: _ExecutedNoise | WeightedCandidates,
    n_iterations: int,
    batch_size: int,
    learning_rate: float,
    kl_coef: float,
    learn_std: bool,
    tensorboard_log: str | Path | None,
    progress_bar: bool,
    checkpoint: TrainingCheckpoint | None,
) -> None:
    params = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    params += [policy.log_std] if learn_std else []
    optimizer = th.optim.Adam(params, lr=learning_rate)
    parts: dict[str, Stateful] = dict(policy=policy, optimizer=optimizer)
    loop = ProgressLoop("stage 1", n_iterations, progress_bar, tensorboard_log, checkpoint=checkpoint, parts=parts)
    for _ in loop:
        cond, w, weights, scalars = source.sample(batch_size)
        loss = aw_mle_loss(policy, cond, w, weights, kl_coef)
        optimizer.zero_grad()
        loss.backward()
        if not learn_std:
            _drop_std_gradients(policy.action_net)
        optimizer.step()
        loop.log({"stage1/loss": loss, **scalars})


def _drop_std_gradients(head: nn.Module) -> None:
    # The second half of the head's outputs is the state-dependent part of log_std.
    for parameter in head.parameters():
        if parameter.grad is not None:
            parameter.grad[len(parameter) // 2 :] = 0.0


def _fit_value(
    policy: LatentPolicy,
    steering: Steering,
    critic: EnsembleChunkCritic,
    cond: th.Tensor,
    batch_size: int,
    tensorboard_log: str | Path | None,
    progress_bar: bool,
    checkpoint: TrainingCheckpoint | None,
    n_iterations: int = 500,
) -> None:
    params = [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
    optimizer = th.optim.Adam(params, lr=1e-3)
    parts: dict[str, Stateful] = dict(policy=policy, optimizer=optimizer)
    loop = ProgressLoop("stage 1: value", n_iterations, progress_bar, tensorboard_log, checkpoint=checkpoint, parts=parts)
    for _ in loop:
        batch = cond[th.randint(len(cond), (batch_size,))]
        with th.no_grad():
            chunk = steering.chunk(batch, policy.sample(batch))
            target = critic(batch, chunk).mean(dim=0)
        loss = (policy.predict_values(batch).squeeze(-1) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.log({"stage1/value_loss": loss})
