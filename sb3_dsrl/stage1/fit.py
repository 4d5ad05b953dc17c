"""Stage 1 with each weighting: noises that rollouts executed, that demos need, that the critic scores, or of a search."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.evaluation.search_result import SearchResult
from sb3_dsrl.policies.loading import FlowLike
from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage0.critic import train_critic
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import FeatureTransitions, check_demos_fit, demo_transitions
from sb3_dsrl.stage1.aw_mle import FitCallback, Records, fit_policy
from sb3_dsrl.stage1.candidates import Candidates, FreshCandidates, PooledCandidates, Scorer, WeightedCandidates
from sb3_dsrl.stage1.executed import ExecutedNoise
from sb3_dsrl.stage1.gate import Gate
from sb3_dsrl.stage1.inverted import inverted_noise
from sb3_dsrl.stage1.searched import BestOnHeldOut, SearchedNoise, held_out_states
from sb3_dsrl.stage1.settings import CandidateSettings, ExecutedSettings, InvertedSettings, SearchedSettings
from sb3_dsrl.stage1.target import lent, steering_and_policy
from sb3_dsrl.stage1.value import fit_value, fit_value_to_returns
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.steering.contract import Contract, check_agreement
from sb3_dsrl.steering.steering import Steering
from sb3_dsrl.utils.checkpoint import TrainingCheckpoint


def fit_executed(
    target: FlowLike | BaseAlgorithm,
    rollouts: Rollouts,
    settings: ExecutedSettings | None = None,
    *,
    policy_kwargs: dict[str, Any] | None = None,
    gate: Gate | None = None,
    callback: FitCallback | None = None,
    callback_freq: int = 100,
    log_interval: int = 100,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
) -> LatentPolicy:
    """
    Stage 1 from the noises that rollouts executed, weighted by their advantages. It needs neither demos nor a critic.

    :param target: a flow or its folder (returns a new policy), or a model with "LatentPolicy" on a steered env (trained in
        place)
    :param rollouts: of the frozen flow or of the policy so far, from :func:`~sb3_dsrl.collect_rollouts`
    :param settings: None is the recommended ones
    :param policy_kwargs: of the new policy, beside the recommended ones; only when ``target`` is a flow. A model that it is
        copied into must have the same ``net_arch``
    :param gate: tests the result on fresh rollouts and keeps the start if that was better; None keeps the result
    :param callback: called with the number of iterations that are done and the policy, which is in evaluation mode meanwhile;
        what it draws or changes in the policy does not reach the training
    :param callback_freq: iterations between two calls
    :param log_interval: iterations between two records in TensorBoard
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :return: the trained policy, in evaluation mode
    :raises ValueError: if the rollouts do not fit the flow or the env
    """
    settings = ExecutedSettings() if settings is None else settings
    records = Records(tensorboard_log, progress_bar, checkpoint, callback, callback_freq, log_interval)
    if seed is not None:
        th.manual_seed(seed)
    steering, policy = steering_and_policy(target, rollouts, policy_kwargs)
    with lent(policy, steering.flow.device):
        start = deepcopy(policy.state_dict())
        fit_policy(policy, ExecutedNoise.of(rollouts, steering, settings), settings, records)
        if gate is not None:
            gate.decide(policy.eval(), start)
    return policy


def fit_inverted(
    target: FlowLike | BaseAlgorithm,
    demos: Demos | str | Path,
    rollouts: Rollouts | None = None,
    settings: InvertedSettings | None = None,
    *,
    policy_kwargs: dict[str, Any] | None = None,
    gate: Gate | None = None,
    callback: FitCallback | None = None,
    callback_freq: int = 100,
    log_interval: int = 100,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
) -> LatentPolicy:
    """
    Stage 1 from the noises that demos need: each chunk of a demo is inverted (:meth:`FlowPolicy.invert
    <sb3_dsrl.FlowPolicy.invert>`), and its noise is weighted by its advantage, as :func:`fit_executed` does. With rollouts,
    their noises are learned as well, and the value that advantages refer to knows both.

    :param target: a flow or its folder (returns a new policy), or a model with "LatentPolicy" on a steered env (trained in
        place)
    :param demos: demos with rewards, or the path of an ``.h5`` file
    :param rollouts: from :func:`~sb3_dsrl.collect_rollouts`, or None
    :param settings: None is the recommended ones
    :param policy_kwargs: see :func:`fit_executed`, as all that follow
    :param gate: tests the result
    :param callback: called with the number of iterations that are done and the policy
    :param callback_freq: iterations between two calls
    :param log_interval: iterations between two records in TensorBoard
    :param seed: seeds torch's global generator
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk
    :return: the trained policy, in evaluation mode
    :raises ValueError: if demos, rollouts and flow do not fit each other, the demos hold no rewards, not all of the noise is
        steered, or the flow makes none of the demos' chunks
    """
    settings = InvertedSettings() if settings is None else settings
    records = Records(tensorboard_log, progress_bar, checkpoint, callback, callback_freq, log_interval)
    if seed is not None:
        th.manual_seed(seed)
    steering, policy = steering_and_policy(target, rollouts, policy_kwargs)
    demos = demos if isinstance(demos, Demos) else load_demos(demos)
    check_demos_fit(steering.flow, demos)
    of_demos = replace(steering.contract, reward_mode=demos.reward_mode)
    check_agreement("rollouts" if rollouts else "env", steering.contract, "demo file", of_demos, ("reward_mode",))
    with lent(policy, steering.flow.device):
        start = deepcopy(policy.state_dict())
        fit_policy(policy, inverted_noise(demos, rollouts, steering, settings, progress_bar), settings, records)
        if gate is not None:
            gate.decide(policy.eval(), start)
    return policy


def fit_searched(
    target: FlowLike | BaseAlgorithm,
    search: SearchResult,
    settings: SearchedSettings | None = None,
    *,
    policy_kwargs: dict[str, Any] | None = None,
    gate: Gate | None = None,
    callback: FitCallback | None = None,
    callback_freq: int = 100,
    log_interval: int = 100,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
) -> LatentPolicy:
    """
    Stage 1 from a search: the noises that were tried in the simulator, weighted by what really followed. The policy that
    comes of it needs no simulator. (Search with the policy so far as proposal, and learning from that again, is expert
    iteration, https://arxiv.org/abs/1705.08439.)

    :param target: a flow or its folder (returns a new policy), or a model with "LatentPolicy" on a steered env (trained in
        place)
    :param search: from :func:`~sb3_dsrl.search_noise`
    :param settings: None is the recommended ones
    :param policy_kwargs: see :func:`fit_executed`, as all that follow
    :param gate: tests the result
    :param callback: called with the number of iterations that are done and the policy
    :param callback_freq: iterations between two calls
    :param log_interval: iterations between two records in TensorBoard
    :param seed: seeds torch's global generator
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk
    :return: the trained policy, in evaluation mode
    :raises ValueError: if the search does not fit the flow or the env, or holds too few episodes
    """
    settings = SearchedSettings() if settings is None else settings
    records = Records(tensorboard_log, progress_bar, checkpoint, callback, callback_freq, log_interval)
    if seed is not None:
        th.manual_seed(seed)
    steering, policy = steering_and_policy(target, search, policy_kwargs, who="searched noises")
    noise = SearchedNoise.of(search, steering, settings)
    with lent(policy, steering.flow.device):
        start = deepcopy(policy.state_dict())
        best = None
        if settings.held_out:
            noise, unseen = noise.split(held_out_states(search.episode, settings.held_out))
            best = BestOnHeldOut(policy, unseen, settings.kl_coef)
        fit_policy(policy, noise, settings, records, best)
        if best is not None:
            policy.load_state_dict(best.best)
        if gate is not None:
            gate.decide(policy.eval(), start)
        if settings.warm_start_value:
            fit_value_to_returns(policy, search.cond, search.returns_to_go, settings.batch_size, records)
    return policy


def fit_candidates(
    target: FlowLike | BaseAlgorithm,
    demos: Demos | str | Path | None = None,
    rollouts: Rollouts | None = None,
    settings: CandidateSettings | None = None,
    *,
    policy_kwargs: dict[str, Any] | None = None,
    gate: Gate | None = None,
    callback: FitCallback | None = None,
    callback_freq: int = 100,
    log_interval: int = 100,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
) -> LatentPolicy:
    """
    Stage 1 from candidates: M noises in each state, weighted by what the critic says of the chunks that they become. The
    states are those of demos and rollouts. If rollouts are given, a copy of the critic is first trained on all of it, so that
    it has seen failures.

    :param target: a flow or its folder (returns a new policy), or a model with "LatentPolicy" on a steered env (trained in
        place)
    :param demos: demos, or the path of an ``.h5`` file
    :param rollouts: from :func:`~sb3_dsrl.collect_rollouts`
    :param settings: None is the recommended ones
    :param policy_kwargs: see :func:`fit_executed`, as all that follow
    :param gate: tests the result
    :param callback: called with the number of iterations that are done and the policy
    :param callback_freq: iterations between two calls
    :param log_interval: iterations between two records in TensorBoard
    :param seed: seeds torch's global generator
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk
    :return: the trained policy, in evaluation mode
    :raises ValueError: if there is neither demo nor rollout, they do not fit the flow or each other, or the flow has no
        trained critic
    """
    settings = CandidateSettings() if settings is None else settings
    records = Records(tensorboard_log, progress_bar, checkpoint, callback, callback_freq, log_interval)
    if demos is None and rollouts is None:
        raise ValueError("Candidates need states: pass demos, rollouts, or both")
    if seed is not None:
        th.manual_seed(seed)
    steering, policy = steering_and_policy(target, rollouts, policy_kwargs)
    flow = steering.flow
    if demos is not None:
        demos = demos if isinstance(demos, Demos) else load_demos(demos)
        check_demos_fit(flow, demos)
    _check_rewards_agree(steering, demos, rollouts, settings.warm_start_value)
    with lent(policy, flow.device):
        start = deepcopy(policy.state_dict())
        transitions = _transitions(steering, demos, rollouts)
        critic = _critic(steering, transitions, rollouts, records)
        score, cond = Scorer(steering, critic, settings.kappa), transitions.cond
        candidates: Candidates
        if settings.pool_size is None:
            candidates = FreshCandidates(score, cond, settings.n_candidates)
        else:
            candidates = PooledCandidates.build(score, cond, settings.pool_size, settings.n_candidates, progress_bar)
        fit_policy(policy, WeightedCandidates(candidates, settings), settings, records)
        if gate is not None:
            gate.decide(policy.eval(), start)
        if settings.warm_start_value:
            fit_value(policy, steering, critic, cond, settings.batch_size, records)
    return policy


def _check_rewards_agree(steering: Steering, demos: Demos | None, rollouts: Rollouts | None, warm_start_value: bool) -> None:
    """The critic has learned one kind of reward, and demos are read with its gamma and reward scale."""
    known, critics = Contract.of(steering.flow), ("gamma", "reward_scale")
    if rollouts is not None:
        check_agreement("rollouts", rollouts.contract, "flow's critic", known, critics)
        if demos is not None:
            of_demos = replace(known, reward_mode=demos.reward_mode)
            check_agreement("rollouts", rollouts.contract, "demo file", of_demos, ("reward_mode",))
    if warm_start_value:
        check_agreement("env", steering.contract, "critic that warm_start_value uses", known, critics)


def _transitions(steering: Steering, demos: Demos | None, rollouts: Rollouts | None) -> FeatureTransitions:
    """On the CPU, whatever device the flow is on: they are many."""
    parts = []
    if demos is not None:
        of_demos = demo_transitions(steering.flow, demos, steering.contract.ignore_terminations)
        parts.append(of_demos.to(th.device("cpu")))
    if rollouts is not None:
        parts.append(rollouts.transitions())
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _critic(
    steering: Steering, transitions: FeatureTransitions, rollouts: Rollouts | None, records: Records
) -> EnsembleChunkCritic:
    flow = steering.flow
    if flow.critic is None:
        raise ValueError("This flow has no critic to score candidates with: use fit_executed with rollouts")
    if rollouts is not None:
        return train_critic(
            flow,
            transitions,
            critic=deepcopy(flow.critic),
            num_steps=steering.contract.num_steps,
            tensorboard_log=records.tensorboard_log,
            progress_bar=records.progress_bar,
            checkpoint=records.checkpoint,
        )
    if not flow.critic.updates:
        raise ValueError("This flow's critic is untrained: call train_critic(flow, demo_transitions(flow, demos)) first")
    return flow.critic
