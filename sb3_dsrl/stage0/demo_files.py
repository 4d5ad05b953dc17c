"""Reads ManiSkill trajectory files.

A demo file is what ``mani_skill.trajectory.replay_trajectory`` and ``RecordEpisode`` write: an ``.h5`` with one group per
episode and a ``.json`` of the same name beside it. Images stay in the file until they are needed. Nothing here imports
ManiSkill.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl.policies.spatial_features import StateLayout, describe
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.episodes import DemoError, Episode, StoredImages, asked_for, check_alike, checked_episode
from sb3_dsrl.stage0.hdf5 import open_demo_file
from sb3_dsrl.utils.integrity import check_sums


def load_demos(path: str | Path, num_demos: int | None = None, control_mode: str | None = None) -> Demos:
    """
    Reads a ManiSkill trajectory file. Warns about files that ``replay_trajectory`` converted to ``pd_ee_delta_pose``: their
    rotations are not quite those that the controller understands.

    Beside what ManiSkill writes, the JSON may hold ``"state_layout"``, a list of [name, size] of the parts of a flat
    observation, as ``sb3_dsrl.state_layout(env_id)`` finds them: what :func:`~sb3_dsrl.create_flow` makes spatial features of.

    :param path: the ``.h5`` file; its ``.json`` must lie beside it
    :param num_demos: read only the first so many episodes; None reads all
    :param control_mode: the controller that the actions must be for; None accepts any
    :return: the demos
    :raises FileNotFoundError: if one of the two files is missing
    :raises DemoError: if a file is damaged, empty, or not what was asked for; the sentence names file and key
    :raises ValueError: if ``num_demos`` is not positive
    """
    path, meta_path = Path(path), Path(path).with_suffix(".json")
    env_id, found_mode, env_kwargs, meta = read_demo_json(path, num_demos)
    if control_mode is not None and found_mode != control_mode:
        way = f"replay it with `python -m mani_skill.trajectory.replay_trajectory --target-control-mode {control_mode}`"
        if control_mode == "pd_ee_delta_pose":  # see the warning below
            way = f"record it with `python examples/make_demos.py --control-mode {control_mode}`"
        raise DemoError(f"{path} holds actions for control_mode={found_mode!r}, expected {control_mode!r}: {way}")
    if found_mode == "pd_ee_delta_pose" and "source_type" not in meta and env_kwargs.keys() >= _REPLAY_KEYS:
        warnings.warn(
            f"{path} looks as if replay_trajectory had converted it to pd_ee_delta_pose: ManiSkill 3.0.1 writes rotations as "
            f"axis-angle there, where the controller reads Euler angles, so that they are up to 3% off; record with that "
            f"controller instead, as examples/make_demos.py does"
        )
    with open_demo_file(path) as file:
        episodes = [_read_episode(path, name, file[name]) for name in episode_names(path, file, num_demos)]
    check_alike(path, episodes)
    flat = episodes[0].images is None
    return Demos(
        path=path,
        episodes=episodes,
        env_id=env_id,
        obs_mode=_text(meta_path, env_kwargs, "obs_mode") or "state",
        control_mode=found_mode,
        reward_mode=_text(meta_path, env_kwargs, "reward_mode"),
        state_layout=_state_layout(meta_path, meta, episodes[0].obs.shape[1]) if flat else None,
    )


def read_demo_json(path: Path, num_demos: int | None) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """
    What lies beside a trajectory file.

    :param path: the ``.h5`` file
    :param num_demos: so many episodes will be asked for; None is all
    :return: env id, control mode of all episodes, arguments of the env, and the whole JSON
    :raises FileNotFoundError: if one of the two files is missing
    :raises DemoError: if a file was changed, or the JSON is not what ManiSkill writes
    :raises ValueError: if ``num_demos`` is not positive
    """
    meta_path = path.with_suffix(".json")
    for file, what in ((path, "the demo file"), (meta_path, "the JSON that ManiSkill writes beside the .h5 file")):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; expected {what}")
    if num_demos is not None and num_demos < 1:
        raise ValueError(f"num_demos must be at least 1, found {num_demos}")
    check_sums(path.with_suffix(".sha256"), (path, meta_path))
    env_id, env_kwargs, listed, meta = _read_json(meta_path)
    # replay_trajectory rewrites the control mode of each episode; older files have it in env_kwargs only
    own_mode = _text(meta_path, env_kwargs, "control_mode")
    modes = {_text(meta_path, episode, "control_mode") or own_mode for episode in listed} or {own_mode}
    if None in modes:
        raise DemoError(f"{meta_path} names no control_mode, neither in env_info/env_kwargs nor in the episodes")
    if len(modes) > 1:
        raise DemoError(f"{meta_path} mixes control modes {sorted(map(str, modes))}; expected one")
    return env_id, str(modes.pop()), env_kwargs, meta


def episode_names(path: Path, file: h5py.File, num_demos: int | None) -> list[str]:
    """
    :param path: of the file
    :param file: the open file
    :param num_demos: only the first so many; None is all
    :return: the groups of its episodes, in order
    :raises DemoError: if there are none, or fewer than asked for
    """
    names = sorted(filter(re.compile(r"traj_\d+").fullmatch, file), key=lambda name: int(name[len("traj_") :]))
    if not names:
        raise DemoError(f"{path} holds no episodes (no group named traj_0, traj_1, ...)")
    return names[: asked_for(str(path), len(names), num_demos)]


#: ``replay_trajectory`` sets all of these arguments of its env, and never writes a ``source_type``, as recorders of demos do.
_REPLAY_KEYS = {"reward_mode", "render_mode", "sim_backend", "num_envs"}


def _state_layout(path: Path, meta: dict[str, Any], obs_dim: int) -> StateLayout | None:
    found = meta.get("state_layout")
    if found is None:
        return None
    try:
        layout = [(str(name), int(size)) for name, size in found]
    except (TypeError, ValueError) as error:
        raise DemoError(f"{path}: 'state_layout' is {found!r}, expected a list of [name, size]") from error
    if sum(size for _, size in layout) != obs_dim or any(size < 1 for _, size in layout):
        raise DemoError(f"{path}: 'state_layout' does not fit observations of {obs_dim} dimensions: {describe(layout)}")
    return layout


def _read_json(path: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The env id, the arguments of the env, what is said about each episode, and all of it."""
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
    return env_id, env_kwargs, listed, meta


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
    series = {key: _numbers(where, key, group[key], 1) for key in ("rewards", "terminated", "success") if key in group}
    return checked_episode(where, obs, actions, images=images, advice=_CONTROLLER, **series)


_CONTROLLER = "replay the file to a normalised controller such as pd_joint_delta_pos"


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
