"""Replay of macro-steps that keeps the chunk that was executed, and how long it lasted.

Letters in shapes: ``B`` batch, ``H`` = act_horizon, ``A`` action dim, ``C`` features, ``k`` env steps of a macro-step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import FeatureTransitions, demo_transitions
from sb3_dsrl.steering.contract import check_agreement
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.steering import Steering


class ChunkSamples(NamedTuple):
    """
    A batch of macro-steps.

    :param observations: (B, C), or a dict of such
    :param actions: noise, and residual if there is one, in the box scaled to [-1, 1], flattened; 0 in demos, where no noise
        is known
    :param next_observations: as the observations
    :param dones: 1 after a termination, 0 elsewhere, also at time limits, (B, 1)
    :param rewards: ``sum_{i<k} gamma^i r_i``, (B, 1)
    :param lengths: ``k / H``, macro-steps that it lasted, (B, 1)
    :param chunks: actions that the env got, (B, H * A). What lies past a termination was not executed any more; it is kept,
        since the critic is asked about whole chunks. Past the end of a demo it is what
        :func:`~sb3_dsrl.stage0.demos.chunks_from_now` fills it with.
    """

    observations: Any
    actions: th.Tensor
    next_observations: Any
    dones: th.Tensor
    rewards: th.Tensor
    lengths: th.Tensor
    chunks: th.Tensor

    def discounts(self, macro_gamma: float) -> th.Tensor:
        """
        :param macro_gamma: ``gamma ** H``
        :return: ``gamma ** k``, 0 after a termination, (B, 1)
        """
        return (1 - self.dones) * macro_gamma**self.lengths

    def joined(self, other: ChunkSamples) -> ChunkSamples:
        """
        :param other: samples of array observations, as these
        """
        return ChunkSamples(*(th.cat(parts) for parts in zip(self, other, strict=True)))


class _ChunkRecords:
    """
    Mixin of SB3's buffers. Chunk and length travel behind the noise, as part of what the buffer takes for an action.

    :param action_space: of the steered env
    """

    actions: np.ndarray

    def __init__(
        self, buffer_size: int, observation_space: spaces.Space, action_space: NoiseSpace, *args: Any, **kwargs: Any
    ) -> None:
        self._sizes = [math.prod(action_space.shape), action_space.contract.act_horizon * action_space.shape[1], 1]
        self._act_horizon = action_space.contract.act_horizon
        record = spaces.Box(-np.inf, np.inf, (sum(self._sizes),), np.float32)
        super().__init__(buffer_size, observation_space, record, *args, **kwargs)  # type: ignore[call-arg]

    def add(
        self, obs: Any, next_obs: Any, action: np.ndarray, reward: np.ndarray, done: np.ndarray, infos: list[dict[str, Any]]
    ) -> None:
        """
        As in SB3.

        :param infos: of a steered env: ``action_chunk`` and ``chunk_length`` are read
        """
        n = len(infos)
        chunks = np.stack([info["action_chunk"] for info in infos]).reshape(n, -1)
        lengths = np.array([[info["chunk_length"] / self._act_horizon] for info in infos])
        record = np.concatenate([action.reshape(n, -1), chunks, lengths], axis=1)
        super().add(obs, next_obs, record, reward, done, infos)  # type: ignore[misc]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ChunkSamples:
        samples = super()._get_samples(batch_inds, env)  # type: ignore[misc]
        actions, chunks, lengths = samples.actions.split(self._sizes, dim=1)
        return ChunkSamples(
            samples.observations, actions, samples.next_observations, samples.dones, samples.rewards, lengths, chunks
        )


class ChunkReplayBuffer(_ChunkRecords, ReplayBuffer):  # type: ignore[misc]
    """SB3's ``ReplayBuffer`` of a steered env, whose samples are :class:`ChunkSamples`."""


class DictChunkReplayBuffer(_ChunkRecords, DictReplayBuffer):  # type: ignore[misc]
    """SB3's ``DictReplayBuffer`` of a steered env, whose samples are :class:`ChunkSamples`."""


def demo_buffer(
    demos: Demos | FeatureTransitions, steering: Steering, action_space: NoiseSpace, device: th.device
) -> ChunkReplayBuffer:
    """
    A full buffer of what others did: all of it can be sampled.

    :param demos: episodes; or transitions of chunks in the flow's features, of rollouts of any policy, say
        (``rollouts.transitions()``)
    :param steering: of the env
    :param action_space: of the model
    :param device: of the samples
    :raises TypeError: if it is something else
    :raises ValueError: if they do not fit flow and env: features, chunks, discount, reward mode
    """
    contract, flow = steering.contract, steering.flow
    if isinstance(demos, Demos):
        check_agreement_of_rewards(demos, steering)
        settings = contract.ignore_terminations, contract.gamma, contract.reward_scale
        demos = demo_transitions(flow, demos, *settings)
    if not isinstance(demos, FeatureTransitions):
        raise TypeError(
            f"demos must be Demos (load_demos) or FeatureTransitions (rollouts.transitions()), found {type(demos).__name__}"
        )
    n, horizon = len(demos), contract.act_horizon
    for what, found, expected in (
        ("features", tuple(demos.cond.shape), (n, flow.cond_dim)),
        ("chunks", tuple(demos.chunk.shape), (n, horizon, flow.action_dim)),
    ):
        if found != expected:
            raise ValueError(f"demos have {what} of shape {found}, but the steered env needs {expected}")
    discount = demos.discount.cpu().double().numpy()
    steps = np.full(n, float(horizon))
    if contract.gamma < 1:  # with gamma = 1 nothing depends on it
        steps[discount > 0] = np.log(discount[discount > 0]) / np.log(contract.gamma)
    whole = steps.round()
    if ((np.abs(steps - whole) > 0.01) | (whole < 0) | (whole > horizon)).any():
        raise ValueError(
            f"demos have discounts that are no powers gamma^k with the env's gamma={contract.gamma} and k <= {horizon}: make "
            f"them with demo_transitions(..., gamma={contract.gamma}), or from rollouts of this env"
        )
    buffer = ChunkReplayBuffer(n, steering.observation_space, action_space, device=device)
    noise = np.zeros((n, math.prod(action_space.shape)), np.float32)
    chunks = demos.chunk.flatten(1).cpu().numpy()
    buffer.actions[:, 0] = np.concatenate([noise, chunks, whole[:, None] / horizon], axis=1)
    buffer.observations[:, 0] = demos.cond.cpu().numpy()
    buffer.next_observations[:, 0] = demos.next_cond.cpu().numpy()
    buffer.rewards[:, 0] = demos.reward.cpu().numpy()
    buffer.dones[:, 0] = discount == 0
    buffer.full = True
    return buffer


def check_agreement_of_rewards(demos: Demos, steering: Steering) -> None:
    """
    :raises ValueError: if the demos' rewards are of another reward mode than the env's
    """
    contract = steering.contract
    theirs = replace(contract, reward_mode=demos.reward_mode)
    check_agreement("demos", theirs, "env", contract, ("reward_mode",))
