"""Stage 0: learn the shortcut flow and its chunk critic from demos.

The flow is trained by flow matching with a self-consistency loss (shortcut models, https://arxiv.org/abs/2410.12557),
optionally weighted by exponentiated advantages as in AWAC (https://arxiv.org/abs/2006.09359). The critic is trained by
SMDP temporal differences whose next chunks come from the flow.

Letters in shapes: ``B`` batch, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` conditioning features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_dsrl.demos import ChunkTransitions, Demos, action_windows, chunk_transitions, load_demos
from sb3_dsrl.flow import FlowPolicy
from sb3_dsrl.networks import EnsembleChunkCritic, VelocityNet
from sb3_dsrl.progress import ProgressLoop


@dataclass
class FeatureTransitions:
    """
    SMDP transitions in the flow's features: what the critic is trained on.

    :param cond: (n, C)
    :param chunk: (n, H, A)
    :param reward: ``sum_{i<k} gamma^i r_i``, (n,)
    :param discount: ``gamma^k``, 0 after a termination, (n,)
    :param next_cond: (n, C)
    """

    cond: th.Tensor
    chunk: th.Tensor
    reward: th.Tensor
    discount: th.Tensor
    next_cond: th.Tensor

    def __len__(self) -> int:
        return len(self.cond)

    def __add__(self, other: FeatureTransitions) -> FeatureTransitions:
        return FeatureTransitions(*(th.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def to(self, device: th.device) -> FeatureTransitions:
        """The same transitions on another device."""
        return FeatureTransitions(*(value.to(device) for value in vars(self).values()))

    def __getitem__(self, index: th.Tensor) -> FeatureTransitions:
        return FeatureTransitions(*(value[index] for value in vars(self).values()))


@th.no_grad()
def encode_transitions(flow: FlowPolicy, transitions: ChunkTransitions) -> FeatureTransitions:
    """
    Turns raw transitions into features, once.

    :param flow: its encoder is used
    :param transitions: from :func:`~sb3_dsrl.demos.chunk_transitions`
    """
    chunk, reward, discount = (
        th.from_numpy(x).to(flow.device) for x in (transitions.chunk, transitions.reward, transitions.discount)
    )
    return FeatureTransitions(flow.encode(transitions.obs), chunk, reward, discount, flow.encode(transitions.next_obs))


def demo_transitions(flow: FlowPolicy, demos: Demos, ignore_terminations: bool = False) -> FeatureTransitions:
    """
    Chunk transitions of demos in the flow's features, with its horizons, gamma and reward scale.

    :param flow: the policy
    :param demos: the demos
    :param ignore_terminations: as in ManiSkill; the same as in stage 2
    """
    check_demos_fit(flow, demos)
    raw = chunk_transitions(demos, flow.obs_horizon, flow.act_horizon, flow.gamma, ignore_terminations, flow.reward_scale)
    return encode_transitions(flow, raw)


def check_demos_fit(flow: FlowPolicy, demos: Demos) -> None:
    """
    :raises ValueError: if demos and flow differ in observation size, action size, control mode or env id
    """
    for what, found, expected in (
        ("observation dimensions", demos.obs_dim, flow.encoder.obs_dim),
        ("action dimensions", demos.action_dim, flow.action_dim),
        ("control_mode", demos.control_mode, flow.control_mode),
        ("env_id", demos.env_id, flow.env_id),
    ):
        if expected is not None and found != expected:
            raise ValueError(f"{demos.path} does not fit the flow: {what} is {found!r} in the demos, {expected!r} in the flow")


def exp_weights(scores: th.Tensor, max_weight: float) -> th.Tensor:
    """
    Exponential weights of AWAC and AWR, clipped from above and then normalised to mean 1.

    :param scores: advantages divided by their temperature, any shape
    :param max_weight: clip
    :return: the weights, same shape
    """
    weights = scores.clamp_max(np.log(max_weight)).exp()
    return weights / weights.mean()


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


def critic_td_loss(
    critic: EnsembleChunkCritic, target_critic: nn.Module, batch: FeatureTransitions, next_chunk: th.Tensor
) -> th.Tensor:
    """
    SMDP TD loss; every head bootstraps from its own target, so that the heads' disagreement stays meaningful
    (https://arxiv.org/abs/2205.13703).

    :param critic: the critic that learns
    :param target_critic: its exponential moving average
    :param batch: transitions
    :param next_chunk: executed part of a chunk sampled by the flow at ``batch.next_cond``, (B, H, A)
    """
    with th.no_grad():
        target = batch.reward + batch.discount * target_critic(batch.next_cond, next_chunk)
    return (critic(batch.cond, batch.chunk) - target).pow(2).mean()


def train_flow(
    demos: Demos | str | Path,
    flow: FlowPolicy | None = None,
    *,
    n_iterations: int = 3_000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.995,
    beta: float = 0.0,
    max_weight: float = 10.0,
    consistency_fraction: float = 0.25,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    **create_kwargs: Any,
) -> FlowPolicy:
    """
    Stage 0: trains a shortcut flow on demos by (advantage-weighted) shortcut flow matching.

    :param demos: demos, or the path of an ``.h5`` file
    :param flow: policy to go on with; None creates one that fits the demos
    :param n_iterations: optimiser steps
    :param batch_size: windows in a batch
    :param learning_rate: start of a cosine schedule to 0 (AdamW)
    :param ema_decay: decay per iteration of the moving average, which is the teacher and the result
    :param beta: inverse temperature of the advantage weights ``exp(beta * A)``, A from ``flow.critic`` (train it first, with
        :func:`train_critic`); 0 is plain flow matching
    :param max_weight: clip of these weights
    :param consistency_fraction: part of each batch for the self-consistency loss
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param create_kwargs: arguments of :meth:`FlowPolicy.create` when ``flow`` is None, such as ``velocity_class``,
        ``obs_horizon``, ``pred_horizon``, ``act_horizon``, ``gamma``
    :return: the trained policy, frozen
    :raises ValueError: if demos and flow do not fit, ``beta > 0`` without a trained critic, or arguments
        contradict each other
    """
    if seed is not None:
        th.manual_seed(seed)
    if not 0 <= consistency_fraction < 1:
        raise ValueError(f"consistency_fraction must lie in [0, 1), found {consistency_fraction}")
    if flow is not None and create_kwargs:
        raise ValueError(f"{sorted(create_kwargs)} describe a new flow, but a flow was given")
    if not isinstance(demos, Demos):
        demos = load_demos(demos)
    if flow is None:
        create_kwargs = dict(env_id=demos.env_id, obs_mode=demos.obs_mode, control_mode=demos.control_mode) | create_kwargs
        flow = FlowPolicy.create(demos.obs_dim, demos.action_dim, **create_kwargs)
        flow.encoder.fit(th.from_numpy(demos.frames()))
    check_demos_fit(flow, demos)
    obs, actions = action_windows(demos, flow.obs_horizon, flow.pred_horizon)
    with th.no_grad():
        cond, chunk = flow.encode(obs), th.from_numpy(actions).to(flow.device)
    weights = None
    if beta > 0:
        weights = exp_weights(beta * _demo_advantages(flow, cond, chunk), max_weight)

    velocity: VelocityNet = flow.velocity.train().requires_grad_(True)
    teacher = AveragedModel(velocity, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    optimizer = th.optim.AdamW(velocity.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_iterations)
    loop = ProgressLoop("stage 0: flow", n_iterations, progress_bar, tensorboard_log)
    for _ in loop:
        index = th.randint(len(chunk), (batch_size,), device=chunk.device)
        matching, consistency = shortcut_loss(
            velocity, teacher, cond[index], chunk[index], None if weights is None else weights[index], consistency_fraction
        )
        loss = matching + consistency
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(velocity.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        teacher.update_parameters(velocity)
        loop.log({"flow/matching_loss": matching, "flow/consistency_loss": consistency})
    velocity.load_state_dict(teacher.module.state_dict())
    return flow.freeze()


def train_critic(
    flow: FlowPolicy,
    transitions: FeatureTransitions,
    *,
    n_iterations: int = 2_000,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    tau: float = 0.01,
    critic: EnsembleChunkCritic | None = None,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
) -> EnsembleChunkCritic:
    """
    Stage 0: trains the chunk critic by SMDP temporal differences under the frozen flow.

    :param flow: samples the next chunks
    :param transitions: of demos (:func:`demo_transitions`), of rollouts of the flow, or ``demos + rollouts``
    :param n_iterations: optimiser steps
    :param batch_size: transitions in a batch
    :param learning_rate: of Adam
    :param tau: soft update coefficient of the target critic
    :param critic: critic to train; None trains ``flow.critic`` in place
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :return: the critic, frozen
    :raises ValueError: if there is no critic to train
    """
    if seed is not None:
        th.manual_seed(seed)
    critic = critic or flow.critic
    if critic is None:
        raise ValueError("This flow was built without a critic: pass one as `critic`")
    critic.train().requires_grad_(True)
    target = AveragedModel(critic, multi_avg_fn=get_ema_multi_avg_fn(1 - tau))
    optimizer = th.optim.Adam(critic.parameters(), lr=learning_rate)
    loop = ProgressLoop("stage 0: critic", n_iterations, progress_bar, tensorboard_log)
    for _ in loop:
        batch = transitions[th.randint(len(transitions), (batch_size,), device=transitions.cond.device)]
        with th.no_grad():
            w = th.randn(batch_size, *flow.noise_shape, device=batch.cond.device)
            next_chunk = flow.executed(flow.decode(batch.next_cond, w, num_steps=min(2, flow.num_steps)))
        loss = critic_td_loss(critic, target, batch, next_chunk)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.update_parameters(critic)
        critic.updates += 1
        loop.log({"critic/td_loss": loss})
    return critic.eval().requires_grad_(False)


@th.no_grad()
def _demo_advantages(flow: FlowPolicy, cond: th.Tensor, chunk: th.Tensor, n_samples: int = 4) -> th.Tensor:
    """Z-scored advantages Q(s, a_demo) - mean over the flow's own chunks Q(s, a), (n,)."""
    if flow.critic is None or not flow.critic.updates:
        raise ValueError(
            "beta > 0 weights the demos by the critic's advantages: train one first, with train_critic(flow, ...)"
        )
    q = flow.critic.get_ucb_q(cond, flow.executed(chunk), kappa=0.0)
    own = [
        flow.critic.get_ucb_q(cond, flow.executed(flow.decode(cond, th.randn_like(chunk))), kappa=0.0)
        for _ in range(n_samples)
    ]
    advantage = q - th.stack(own).mean(dim=0)
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
