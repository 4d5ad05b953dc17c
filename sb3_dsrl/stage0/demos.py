"""Demos in memory, and what is cut from them: windows for the flow, chunk transitions for the critic.

Letters in shapes: ``n`` samples, ``L`` env steps of an episode, ``D`` dimensions of the state part of one observation,
``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl.policies.spatial_features import StateLayout
from sb3_dsrl.utils.observations import map_frames


class DemoError(ValueError):
    """A demo file that is damaged or not what was asked for; the sentence names file and key."""


@dataclass
class StoredImages:
    """
    The images of one episode, in the file. They are laid out as ManiSkill's ``FlattenRGBDObservationWrapper`` does it.

    :param path: the ``.h5`` file
    :param cameras: for ``rgb`` and ``depth`` the names of their datasets, one a camera, in the order of the env
    :param shapes: (height, width, channels), all cameras together
    """

    path: Path
    cameras: dict[str, list[str]]
    shapes: dict[str, tuple[int, int, int]]

    def read(self) -> dict[str, np.ndarray]:
        """
        :return: for each key (L + 1, height, width, channels)
        :raises DemoError: if the file is damaged
        """
        try:
            with h5py.File(self.path, "r") as file:
                images = {
                    key: np.concatenate([np.asarray(file[name]) for name in names], axis=-1)
                    for key, names in self.cameras.items()
                }
        except Exception as error:  # of many kinds: HDF5 checks little before it reads
            raise DemoError(f"{self.path} cannot be read any more; it is damaged or was replaced ({error})") from error
        for key, image in images.items():
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                raise DemoError(f"{self.path}:{self.cameras[key][0]} holds NaN or infinite values")
        return images


@dataclass
class Episode:
    """
    One episode, in env steps.

    :param obs: the state part of the observations, (L + 1, D)
    :param actions: (L, A), in [-1, 1]
    :param rewards: (L,), or None if the file holds none
    :param terminated: (L,)
    :param success: (L,), or None if the file holds none
    :param images: None if the observations hold none
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None
    terminated: np.ndarray
    success: np.ndarray | None
    images: StoredImages | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def read_obs(self) -> Any:
        """
        All observations, with images read from the file.

        :return: (L + 1, D), or a dict of ``state`` and images, each with L + 1 rows
        """
        if self.images is None:
            return self.obs
        return ({"state": self.obs} if self.obs.shape[1] else {}) | self.images.read()


@dataclass
class Demos:
    """
    The episodes of one file and what its JSON says about them.

    :param path: the ``.h5`` file
    :param episodes: in the order of the file
    :param env_id: environment they were recorded in
    :param obs_mode: ManiSkill observation mode
    :param control_mode: ManiSkill controller of the actions
    :param reward_mode: ManiSkill reward mode of the rewards
    :param state_layout: name and size of each part of a flat observation, or None if the file does not say
    """

    path: Path
    episodes: list[Episode]
    env_id: str
    obs_mode: str
    control_mode: str
    reward_mode: str | None
    state_layout: StateLayout | None = None

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


def chunks_from_now(episode: Episode, control_mode: str, horizon: int) -> np.ndarray:
    """
    At every step of an episode the actions from now on: the first entries of a longer chunk are the shorter one.

    Past the end of the episode the chunk is filled as ManiSkill's diffusion-policy baseline does: delta controllers stand
    still and keep their gripper (the last dimension), others repeat the last action.

    :param episode: the episode
    :param control_mode: ManiSkill controller of its actions
    :param horizon: actions in a chunk, T for the flow and H for the critic
    :return: (L, horizon, A)
    """
    filler = episode.actions[-1].copy()
    if "delta" in control_mode:
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
                f"{demos.path}: episode {i} has no 'rewards': record them (replay_trajectory --record-rewards) with the "
                f"reward_mode that stage 2 will use"
            )
        ends = np.flatnonzero(episode.terminated)
        length = len(episode) if ignore_terminations or len(ends) == 0 else int(ends[0]) + 1
        terminal = not ignore_terminations and len(ends) > 0
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
