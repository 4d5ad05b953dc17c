"""Stage 0: learn the chunk critic from demos and rollouts, by SMDP temporal differences under the flow."""

from __future__ import annotations

from pathlib import Path

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.utils.checkpoint import Stateful, TrainingCheckpoint
from sb3_dsrl.utils.progress import ProgressLoop


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


def train_critic(
    flow: FlowLike,
    transitions: FeatureTransitions,
    *,
    n_iterations: int = 2_000,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    tau: float = 0.01,
    critic: EnsembleChunkCritic | None = None,
    num_steps: int | None = None,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
) -> EnsembleChunkCritic:
    """
    Stage 0: trains the chunk critic by SMDP temporal differences under the frozen flow.

    :param flow: samples the next chunks; a policy or its folder
    :param transitions: of demos (:func:`demo_transitions`), of rollouts of the flow, or ``demos + rollouts``
    :param n_iterations: optimiser steps
    :param batch_size: transitions in a batch
    :param learning_rate: of Adam
    :param tau: soft update coefficient of the target critic
    :param critic: critic to train; None trains ``flow.critic`` in place (of a folder: a copy, which is returned)
    :param num_steps: decoding steps of the next chunks: those that will be played; None is the flow's own
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :return: the critic, frozen
    :raises ValueError: if there is no critic to train, or it scores another part of a chunk, or a longer or shorter one, than
        what is executed
    """
    flow = resolve_flow(flow, shared=False)
    if seed is not None:
        th.manual_seed(seed)
    critic = critic or flow.critic
    if critic is None:
        raise ValueError("This flow was built without a critic: pass one as `critic`")
    if critic.first_action not in (None, flow.action_offset):
        raise ValueError(
            f"The critic scores chunks from entry {critic.first_action} on, but transitions hold what is executed, from entry "
            f"{flow.action_offset} on: build it with first_action=None"
        )
    flow.check_critic(critic)
    critic.to(flow.device).train().requires_grad_(True)
    target = AveragedModel(critic, multi_avg_fn=get_ema_multi_avg_fn(1 - tau))
    optimizer = th.optim.Adam(critic.parameters(), lr=learning_rate)
    parts: dict[str, Stateful] = dict(critic=critic, target=target, optimizer=optimizer)
    loop = ProgressLoop("stage 0: critic", n_iterations, progress_bar, tensorboard_log, checkpoint=checkpoint, parts=parts)
    for _ in loop:
        index = th.randint(len(transitions), (batch_size,), device=transitions.cond.device)
        batch = transitions[index].to(flow.device)
        with th.no_grad():
            w = th.randn(batch_size, *flow.noise_shape, device=batch.cond.device)
            next_chunk = flow.executed(flow.decode(batch.next_cond, w, num_steps))
        loss = critic_td_loss(critic, target, batch, next_chunk)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.update_parameters(critic)
        critic.updates += 1
        loop.log({"critic/td_loss": loss})
    return critic.eval().requires_grad_(False)
