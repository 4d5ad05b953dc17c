"""ManiSkill trajectory files -> windows for the flow and chunk transitions for the critic.

A demo file is what ``mani_skill.trajectory.replay_trajectory`` and ``RecordEpisode`` write: an ``.h5`` with one group per
episode and a ``.json`` of the same name beside it. Images stay in the file until they are needed. Nothing here imports
ManiSkill.

Letters in shapes: ``n`` samples, ``L`` env steps of an episode, ``D`` dimensions of the state part of one observation,
``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl.integrity import check_sums, one_line
from sb3_dsrl.observations import map_frames


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
    """

    path: Path
    episodes: list[Episode]
    env_id: str
    obs_mode: str
    control_mode: str
    reward_mode: str | None

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


def load_demos(path: str | Path, num_demos: int | None = None, control_mode: str | None = None) -> Demos:
    """
    Reads a ManiSkill trajectory file.

    :param path: the ``.h5`` file; its ``.json`` must lie beside it
    :param num_demos: read only the first so many episodes; None reads all
    :param control_mode: the controller that the actions must be for; None accepts any
    :return: the demos
    :raises FileNotFoundError: if one of the two files is missing
    :raises DemoError: if a file is damaged, empty, or not what was asked for; the sentence names file and key
    :raises ValueError: if ``num_demos`` is not positive
    """
    path = Path(path)
    meta_path = path.with_suffix(".json")
    for file, what in ((path, "the demo file"), (meta_path, "the JSON that ManiSkill writes beside the .h5 file")):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; expected {what}")
    if num_demos is not None and num_demos < 1:
        raise ValueError(f"num_demos must be at least 1, found {num_demos}")
    check_sums(path.with_suffix(".sha256"), (path, meta_path))
    env_id, env_kwargs, listed = _read_json(meta_path)
    # replay_trajectory rewrites the control mode of each episode; older files have it in env_kwargs only
    own_mode = _text(meta_path, env_kwargs, "control_mode")
    modes = {_text(meta_path, episode, "control_mode") or own_mode for episode in listed} or {own_mode}
    if None in modes:
        raise DemoError(f"{meta_path} names no control_mode, neither in env_info/env_kwargs nor in the episodes")
    if len(modes) > 1:
        raise DemoError(f"{meta_path} mixes control modes {sorted(map(str, modes))}; expected one")
    found_mode = str(modes.pop())
    if control_mode is not None and found_mode != control_mode:
        raise DemoError(
            f"{path} holds actions for control_mode={found_mode!r}, expected {control_mode!r}: "
            f"replay it with `python -m mani_skill.trajectory.replay_trajectory --target-control-mode {control_mode}`"
        )
    try:
        with h5py.File(path, "r") as file:
            names = sorted(filter(re.compile(r"traj_\d+").fullmatch, file), key=lambda name: int(name[len("traj_") :]))
            if not names:
                raise DemoError(f"{path} holds no episodes (no group named traj_0, traj_1, ...)")
            if num_demos is not None and num_demos > len(names):
                raise DemoError(f"{path} holds {len(names)} episodes, but num_demos={num_demos} were asked for")
            episodes = [_read_episode(path, name, file[name]) for name in names[:num_demos]]
    except DemoError:
        raise
    except Exception as error:  # of many kinds: HDF5 checks little before it reads
        raise DemoError(f"{path} cannot be read as HDF5; it is damaged or cut short ({one_line(error)})") from error
    for attribute, letter in (("obs", "D"), ("actions", "A")):
        sizes = {getattr(episode, attribute).shape[-1] for episode in episodes}
        if len(sizes) > 1:
            raise DemoError(
                f"{path}: {attribute} have {sorted(sizes)} dimensions in different episodes; expected one {letter}"
            )
    shapes = {repr(episode.images and episode.images.shapes) for episode in episodes}
    if len(shapes) > 1:
        raise DemoError(f"{path}: images differ in shape between episodes ({' and '.join(sorted(shapes))})")
    return Demos(
        path=path,
        episodes=episodes,
        env_id=env_id,
        obs_mode=_text(meta_path, env_kwargs, "obs_mode") or "state",
        control_mode=found_mode,
        reward_mode=_text(meta_path, env_kwargs, "reward_mode"),
    )


def _read_json(path: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The env id, the arguments of the env, and what is said about each episode."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DemoError(f"{path} is not valid JSON ({error})") from error
    for key in ("env_info", "episodes"):
        if not isinstance(meta, dict) or key not in meta:
            raise DemoError(f"{path} has no key {key!r}; expected the JSON that ManiSkill writes beside a trajectory file")
    env_info, listed = meta["env_info"], meta["episodes"]
    env_id = _text(path, env_info, "env_id") if isinstance(env_info, dict) else None
    if env_id is None:
        raise DemoError(f"{path} has no key 'env_info/env_id'")
    env_kwargs = env_info.get("env_kwargs", {})
    if not isinstance(env_kwargs, dict):
        raise DemoError(f"{path}: 'env_info/env_kwargs' is a {type(env_kwargs).__name__}, expected an object")
    if not isinstance(listed, list) or not all(isinstance(episode, dict) for episode in listed):
        raise DemoError(f"{path}: 'episodes' is no list of objects")
    return env_id, env_kwargs, listed


def _text(path: Path, entries: dict[str, Any], key: str) -> str | None:
    value = entries.get(key)
    if value is not None and not isinstance(value, str):
        raise DemoError(f"{path}: {key!r} is {value!r}, expected a string")
    return value


def _numbers(where: str, key: str, found: h5py.Group | h5py.Dataset, dims: int | None) -> np.ndarray:
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "biuf":
        kind = f"values of type {found.dtype}" if isinstance(found, h5py.Dataset) else "a group"
        raise DemoError(f"{where}/{key} holds {kind}, expected numbers")
    if dims is not None and len(found.shape) != dims:
        raise DemoError(f"{where}/{key} has shape {found.shape}, expected {dims} dimension{'s' * (dims > 1)}")
    return found[()]


def _read_episode(path: Path, name: str, group: h5py.Group) -> Episode:
    where = f"{path}:{name}"
    if not isinstance(group, h5py.Group):
        raise DemoError(f"{where} is a dataset, expected the group of an episode")
    for key in ("obs", "actions"):
        if key not in group:
            raise DemoError(f"{where} has no {key!r}: replay the file with `--obs-mode state` so that it holds observations")
    obs, images = _read_obs(path, where, group["obs"])
    actions = _numbers(where, "actions", group["actions"], 2).astype(np.float32)
    length = len(actions)
    if length == 0:
        raise DemoError(f"{where} has no steps")
    names = ("rewards", "terminated", "success")
    series = {key: _numbers(where, key, group[key], 1) if key in group else None for key in names}
    expected = {"obs": (obs, length + 1), **{key: (value, length) for key, value in series.items()}}
    for key, (value, n) in expected.items():
        if value is not None and len(value) != n:
            raise DemoError(f"{where}/{key} has {len(value)} entries, expected {n} for {length} actions")
    for key, value in {"obs": obs, "actions": actions, **series}.items():
        if value is not None and not np.isfinite(value).all():
            raise DemoError(f"{where}/{key} holds NaN or infinite values")
    if np.abs(actions).max() > 1.0 + 1e-4:
        raise DemoError(
            f"{where}/actions reach {np.abs(actions).max():.3g}, expected [-1, 1]: replay the file to a normalised controller "
            f"such as pd_joint_delta_pos or pd_ee_delta_pose"
        )
    terminated = series["terminated"]
    return Episode(
        obs=obs,
        actions=actions.clip(-1.0, 1.0),
        rewards=None if series["rewards"] is None else series["rewards"].astype(np.float32),
        terminated=np.zeros(length, bool) if terminated is None else terminated.astype(bool),
        success=None if series["success"] is None else series["success"].astype(bool),
        images=images,
    )


def _read_obs(path: Path, where: str, obs: h5py.Group | h5py.Dataset) -> tuple[np.ndarray, StoredImages | None]:
    """The state part, (L + 1, D), and where the images are. Nested groups are flattened as ManiSkill does it."""
    if isinstance(obs, h5py.Dataset):
        return _numbers(where, "obs", obs, 2).astype(np.float32), None
    cameras = obs["sensor_data"].values() if "sensor_data" in obs else [obs]
    datasets = {key: [camera[key] for camera in cameras if key in camera] for key in ("rgb", "depth")}
    datasets = {key: found for key, found in datasets.items() if found}
    if not datasets:
        raise DemoError(
            f"{where}/obs is a group with keys {sorted(obs)}; expected flat observations (obs_mode='state'), or images "
            f"(obs_mode='rgb' or 'rgbd')"
        )
    parts = [part for key, item in obs.items() if key not in _IMAGE_KEYS for part in _leaves(where, item)]
    for key, found in datasets.items():
        for dataset in found:
            if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "iuf" or len(dataset.shape) != 4:
                raise DemoError(f"{where}/obs: {dataset.name} is no stack of {key} images, (L + 1, height, width, channels)")
    rows = {len(part) for part in [*parts, *itertools.chain(*datasets.values())]}
    shapes = {key: {dataset.shape[1:-1] for dataset in found} for key, found in datasets.items()}
    if len(rows) != 1 or any(len(sizes) != 1 for sizes in shapes.values()):
        raise DemoError(f"{where}/obs mixes lengths {sorted(rows)} or image sizes {shapes}; expected one of each")
    if datasets.get("rgb") and any(dataset.dtype != np.uint8 for dataset in datasets["rgb"]):
        raise DemoError(f"{where}/obs holds rgb images of type {datasets['rgb'][0].dtype}, expected uint8")
    images = StoredImages(
        path,
        {key: [dataset.name for dataset in found] for key, found in datasets.items()},
        {key: (*found[0].shape[1:-1], sum(dataset.shape[-1] for dataset in found)) for key, found in datasets.items()},
    )
    values = [_numbers(str(path), part.name[1:], part, None) for part in parts]
    state = [value.reshape(len(value), -1).astype(np.float32) for value in values]
    return np.concatenate(state, axis=1) if state else np.zeros((rows.pop(), 0), np.float32), images


_IMAGE_KEYS = ("rgb", "depth", "sensor_data", "sensor_param")


def _leaves(where: str, item: h5py.Group | h5py.Dataset) -> list[h5py.Dataset]:
    """The datasets below, in the order in which they were written: that is the order in which an env flattens them."""
    if isinstance(item, h5py.Dataset):
        return [item]
    if len(item) > 1 and not item.id.get_create_plist().get_link_creation_order():
        raise DemoError(
            f"{where}: the group {item.name} does not keep the order in which {sorted(item)} were written, so that their "
            f"order in the env is unknown; record the demos with ManiSkill 3"
        )
    return [leaf for child in item.values() for leaf in _leaves(where, child)]


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


def chunks_from_now(episode: Episode, control_mode: str, pred_horizon: int) -> np.ndarray:
    """
    At every step of an episode the T actions from now on.

    Past the end of the episode the chunk is filled as ManiSkill's diffusion-policy baseline does: delta controllers stand
    still and keep their gripper (the last dimension), others repeat the last action.

    :param episode: the episode
    :param control_mode: ManiSkill controller of its actions
    :param pred_horizon: T
    :return: (L, T, A)
    """
    filler = episode.actions[-1].copy()
    if "delta" in control_mode:
        filler[:-1] = 0.0
    padded = np.concatenate([episode.actions, np.tile(filler, (pred_horizon - 1, 1))])
    return padded[np.arange(len(episode))[:, None] + np.arange(pred_horizon)]


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
    ignore_terminations: bool = False,
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
    :return: the transitions; a chunk that was cut is filled with its last action
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
                episode.actions[steps],
                reward_scale * (episode.rewards[steps] * inside * powers).sum(axis=1),
                np.where((stop == length) & terminal, 0.0, gamma ** (stop - start)),
                frames[stop],
            )
        )
    return ChunkTransitions(*(np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)))
