"""Demos in memory, and what is cut from them: windows for the flow, chunk transitions for the critic.

Letters in shapes: ``n`` samples, ``L`` env steps of an episode, ``D`` dimensions of the state part of one observation,
``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sb3_dsrl.policies.spatial_features import StateLayout
from sb3_dsrl.stage0.episodes import DemoError, Episode, as_unit, check_alike, checked_episode, split_obs
from sb3_dsrl.utils.observations import map_frames


@dataclass
class Demos:
    """
    Episodes, and what is known about them. :func:`~sb3_dsrl.load_demos` reads ManiSkill's files; ``load_minari``,
    ``load_lerobot`` and ``load_robomimic`` read those of others, and :meth:`from_arrays` takes what is in memory.

    :param path: where they come from, for error messages
    :param episodes: in the order of the file
    :param env_id: environment they were recorded in; None if nobody says, as below
    :param obs_mode: ManiSkill observation mode; "state" of everything without images
    :param control_mode: ManiSkill controller of the actions
    :param reward_mode: ManiSkill reward mode of the rewards
    :param state_layout: name and size of each part of a flat observation
    """

    path: str | Path
    episodes: list[Episode]
    env_id: str | None
    obs_mode: str
    control_mode: str | None
    reward_mode: str | None
    state_layout: StateLayout | None = None

    @classmethod
    def from_arrays(
        cls,
        obs: Sequence[Any],
        actions: Sequence[ArrayLike],
        rewards: Sequence[ArrayLike] | None = None,
        terminated: Sequence[ArrayLike] | None = None,
        success: Sequence[ArrayLike] | None = None,
        *,
        action_bounds: tuple[ArrayLike, ArrayLike] | None = None,
        env_id: str | None = None,
        control_mode: str | None = None,
        reward_mode: str | None = None,
        state_layout: StateLayout | None = None,
        path: str | Path = "arrays",
    ) -> Demos:
        """
        Demos from arrays, one of each a episode.

        :param obs: (L + 1, D), the last one seen after the last action; or dicts of ``state`` (L + 1, D) and of ``rgb``
            (uint8) or ``depth`` or both, (L + 1, height, width, channels)
        :param actions: (L, A)
        :param rewards: (L,); None if there are none, which only the critic needs
        :param terminated: (L,), where the episode really ended, time limits apart; None is nowhere
        :param success: (L,); None if it is unknown
        :param action_bounds: ``action_space.low`` and ``action_space.high`` of the env, between which the actions lie; None if
            they lie in [-1, 1]
        :param env_id: environment they were recorded in; a flow that learns from them is refused elsewhere
        :param control_mode: what the actions are; in a name with "delta" in it they are differences, so that a chunk past the
            end of an episode stands still where others repeat the last action
        :param reward_mode: of ManiSkill envs: which rewards these are
        :param state_layout: name and size of each part of a flat observation
        :param path: where they come from, for error messages
        :raises DemoError: if lengths, shapes or values are not what is said here; the sentence names episode and array
        """
        columns: dict[str, Any] = dict(obs=obs, actions=actions, rewards=rewards, terminated=terminated, success=success)
        known = {name: column for name, column in columns.items() if column is not None}
        counts = {name: len(column) for name, column in known.items()}
        if len(set(counts.values())) != 1 or not counts["obs"]:
            raise DemoError(f"{path}: expected one array of each kind an episode, and at least one episode, found {counts}")
        episodes = []
        for i in range(len(obs)):
            where, series = f"{path}: episode {i}", {name: column[i] for name, column in known.items()}
            state, images = split_obs(where, series.pop("obs"))
            scaled = as_unit(where, series.pop("actions"), action_bounds)
            episodes.append(checked_episode(where, state, scaled, images=images, advice=_BOUNDS, **series))
        check_alike(path, episodes)
        seen = episodes[0].images
        obs_mode = "state" if seen is None else "rgbd" if len(seen.shapes) == 2 else next(iter(seen.shapes))
        return cls(path, episodes, env_id, obs_mode, control_mode, reward_mode, state_layout)

    @property
    def obs_dim(self) -> int:
        """D."""
        return self.episodes[0].obs.shape[-1]

    @property
    def image_shapes(self) -> dict[str, tuple[int, int, int]] | None:
        """(height, width, channels) of ``rgb`` and ``depth``, or None if there are no images."""
        images = self.episodes[0].images
        return None if images is None else images.shapes

    @property
    def obs_shapes(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """Shape of one frame, or of each entry of a dict observation."""
        if self.image_shapes is None:
            return (self.obs_dim,)
        return {**({"state": (self.obs_dim,)} if self.obs_dim else {}), **self.image_shapes}

    @property
    def action_dim(self) -> int:
        """A."""
        return self.episodes[0].actions.shape[-1]

    @property
    def n_steps(self) -> int:
        """Env steps in all."""
        return sum(len(episode) for episode in self.episodes)

    def frames(self) -> np.ndarray:
        """The state part of all observations, (n, D)."""
        return np.concatenate([episode.obs for episode in self.episodes])

    def actions(self) -> np.ndarray:
        """All actions, (n, A)."""
        return np.concatenate([episode.actions for episode in self.episodes])


_BOUNDS = "pass action_bounds=(action_space.low, action_space.high) of the env"


@dataclass
class ChunkTransitions:
    """
    SMDP transitions of executed chunks, raw observations.

    :param obs: (n, obs_horizon, D), oldest frame first
    :param chunk: (n, H, A)
    :param reward: ``sum_{i<k} gamma^i r_i``, (n,)
    :param discount: ``gamma^k``, 0 after a termination, (n,)
    :param next_obs: (n, obs_horizon, D)
    """

    obs: np.ndarray
    chunk: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    next_obs: np.ndarray


def frame_history(obs: Any, obs_horizon: int) -> Any:
    """
    Stacks each observation of an episode with those before it; the first one stands in for what came before the reset.

    :param obs: (L + 1, ...), or a dict of such
    :param obs_horizon: frames
    :return: (L + 1, obs_horizon, ...), oldest first, or a dict of such
    """

    return map_frames(lambda x: x[seen_steps(np.arange(len(x)), obs_horizon)], obs)


def seen_steps(steps: np.ndarray, obs_horizon: int) -> np.ndarray:
    """
    The steps whose observations are seen at a step: itself and those before it, or the first one in place of what came
    before the reset.

    :param steps: (n,)
    :param obs_horizon: frames
    :return: (n, obs_horizon), oldest first
    """
    return (steps[:, None] + np.arange(1 - obs_horizon, 1)).clip(min=0)


def chunks_from_now(episode: Episode, control_mode: str | None, horizon: int) -> np.ndarray:
    """
    At every step of an episode the actions from now on: the first entries of a longer chunk are the shorter one.

    Past the end of the episode the chunk is filled as ManiSkill's diffusion-policy baseline does: delta controllers stand
    still and keep their gripper (the last dimension), others repeat the last action.

    :param episode: the episode
    :param control_mode: ManiSkill controller of its actions; None if there is none
    :param horizon: actions in a chunk, T for the flow and H for the critic
    :return: (L, horizon, A)
    """
    filler = episode.actions[-1].copy()
    if "delta" in (control_mode or ""):
        filler[:-1] = 0.0
    padded = np.concatenate([episode.actions, np.tile(filler, (horizon - 1, 1))])
    return padded[np.arange(len(episode))[:, None] + np.arange(horizon)]


def action_windows(demos: Demos, obs_horizon: int, pred_horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Training pairs of the flow: at every step of every episode, the frames seen (state part) and :func:`chunks_from_now`.

    :param demos: the demos
    :param obs_horizon: frames
    :param pred_horizon: T
    :return: observations (n, obs_horizon, D) and actions (n, T, A)
    """
    obs = [frame_history(episode.obs, obs_horizon)[:-1] for episode in demos.episodes]
    chunks = [chunks_from_now(episode, demos.control_mode, pred_horizon) for episode in demos.episodes]
    return np.concatenate(obs), np.concatenate(chunks)


def played_steps(episode: Episode, ignore_terminations: bool) -> int:
    """
    :param episode: the episode
    :param ignore_terminations: as in ManiSkill: go on after success or failure
    :return: its env steps up to its first termination, if that counts
    """
    ends = np.flatnonzero(episode.terminated)
    return len(episode) if ignore_terminations or len(ends) == 0 else int(ends[0]) + 1


def chunk_transitions(
    demos: Demos,
    obs_horizon: int,
    act_horizon: int,
    gamma: float,
    ignore_terminations: bool,
    reward_scale: float = 1.0,
) -> ChunkTransitions:
    """
    SMDP transitions that start at every step of every episode and last ``k <= H`` steps.

    A termination ends the chunk and the episode (discount 0). The end of the recording only cuts the chunk: the value of the
    last observation is bootstrapped with ``gamma^k``.

    :param demos: the demos
    :param obs_horizon: frames
    :param act_horizon: H
    :param gamma: discount per env step
    :param ignore_terminations: as in ManiSkill: go on after success or failure
    :param reward_scale: factor on the rewards
    :return: the transitions; their chunks are those of :func:`chunks_from_now`, also past what was executed
    :raises ValueError: if the file holds no rewards
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for i, episode in enumerate(demos.episodes):
        if episode.rewards is None:
            raise ValueError(
                f"{demos.path}: episode {i} has no 'rewards': record them (of ManiSkill: replay_trajectory --record-rewards) "
                f"with the reward_mode that stage 2 will use"
            )
        length = played_steps(episode, ignore_terminations)
        terminal = not ignore_terminations and bool(episode.terminated.any())
        start = np.arange(length)
        stop = np.minimum(start + act_horizon, length)
        steps = start[:, None] + np.arange(act_horizon)
        inside = steps < length
        steps = np.minimum(steps, length - 1)
        powers = gamma ** np.arange(act_horizon)
        frames = frame_history(episode.obs, obs_horizon)
        parts.append(
            (
                frames[start],
                chunks_from_now(episode, demos.control_mode, act_horizon)[:length],
                reward_scale * (episode.rewards[steps] * inside * powers).sum(axis=1),
                np.where((stop == length) & terminal, 0.0, gamma ** (stop - start)),
                frames[stop],
            )
        )
    return ChunkTransitions(*(np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)))
