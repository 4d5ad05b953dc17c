"""Reads robomimic's HDF5 files (https://robomimic.github.io/docs/datasets/overview.html)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.episodes import DemoError, asked_for
from sb3_dsrl.stage0.hdf5 import open_demo_file

#: What robomimic's own low-dimensional configurations see.
LOW_DIM = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


def load_robomimic(
    path: str | Path,
    num_demos: int | None = None,
    *,
    obs_keys: Sequence[str] = LOW_DIM,
    filter_key: str | None = None,
    **about: Any,
) -> Demos:
    """
    Reads the low-dimensional observations of a robomimic file. ``dones`` are taken for terminations. Where the file has no
    ``next_obs``, the last observation of an episode stands for the one after it.

    :param path: the ``.hdf5`` file, with observations (robomimic's ``dataset_states_to_obs.py`` adds them)
    :param num_demos: read only the first so many episodes; None reads all
    :param obs_keys: observations that are put side by side, in the order in which the env to steer has them
    :param filter_key: read only the episodes that this entry of ``mask`` lists, such as "train"
    :param about: further arguments of :meth:`Demos.from_arrays <sb3_dsrl.Demos.from_arrays>`, in place of the file's own
        ``env_id``
    :return: the demos
    :raises FileNotFoundError: if there is no such file
    :raises DemoError: if it is damaged or not what is said here; the sentence names file and key
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a robomimic file")
    with open_demo_file(path) as file:
        if "data" not in file:
            raise DemoError(f"{path} has no group 'data', but {sorted(file)}; expected a robomimic file")
        names = _names(path, file, filter_key)
        names = names[: asked_for(str(path), len(names), num_demos)]
        episodes = [_read(f"{path}:data/{name}", file["data"][name], obs_keys) for name in names]
        env_id = _env_name(path, file["data"])
    common = set.intersection(*(set(episode) for episode in episodes))
    columns: dict[str, Any] = {key: [episode[key] for episode in episodes] for key in sorted(common)}
    return Demos.from_arrays(**columns, **({"env_id": env_id} | about), path=path)


def _names(path: Path, file: h5py.File, filter_key: str | None) -> list[str]:
    names = list(filter(re.compile(r"demo_\d+").fullmatch, file["data"]))
    if filter_key is not None:
        masks = sorted(file["mask"]) if "mask" in file else []
        if filter_key not in masks:
            raise DemoError(f"{path} has no 'mask/{filter_key}'; its masks are {masks}")
        listed = {name.decode() for name in file["mask"][filter_key][()]}
        if missing := sorted(listed - set(names)):
            raise DemoError(f"{path}: 'mask/{filter_key}' lists {missing}, which are not in 'data'")
        names = [name for name in names if name in listed]
    return sorted(names, key=lambda name: int(name[len("demo_") :]))


def _read(where: str, group: h5py.Group, obs_keys: Sequence[str]) -> dict[str, np.ndarray]:
    for key in ("obs", "actions"):
        if key not in group:
            raise DemoError(f"{where} has no {key!r}: robomimic's dataset_states_to_obs.py adds observations to a file")
    if missing := [key for key in obs_keys if key not in group["obs"]]:
        raise DemoError(f"{where}/obs has no {missing}; pass obs_keys, of {sorted(group['obs'])}")
    obs = _side_by_side(where, group["obs"], obs_keys)
    last = _side_by_side(where, group["next_obs"], obs_keys)[-1:] if "next_obs" in group else obs[-1:]
    names = {"actions": "actions", "rewards": "rewards", "dones": "terminated"}
    return {"obs": np.concatenate([obs, last]), **{ours: group[name][()] for name, ours in names.items() if name in group}}


def _side_by_side(where: str, group: h5py.Group, keys: Sequence[str]) -> np.ndarray:
    parts = [group[key][()] for key in keys]
    for key, part in zip(keys, parts, strict=True):
        if part.ndim > 2:
            raise DemoError(f"{where}/obs/{key} has shape {part.shape}: images are not read, expected numbers")
    lengths = {len(part) for part in parts}
    if len(lengths) > 1:
        raise DemoError(f"{where}/obs mixes lengths {sorted(lengths)}; expected one")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _env_name(path: Path, data: h5py.Group) -> str | None:
    if "env_args" not in data.attrs:
        return None
    try:
        return str(json.loads(data.attrs["env_args"])["env_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path}: the attribute 'env_args' of 'data' is no JSON with an 'env_name' ({error!r})") from error
