"""The same three episodes in every format that is read: arrays, robomimic's HDF5, LeRobot's Parquet, Minari's."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest

from sb3_dsrl import Demos, load_lerobot, load_minari, load_robomimic
from tests.demo_files import scripted_episode

BOUNDS = (np.array([-2.0, 0.0]), np.array([2.0, 8.0]))
LENGTHS = (6, 4, 5)


def episodes() -> list[dict[str, Any]]:
    """Actions between BOUNDS; the first episode ends in success, the others at a time limit."""
    made = [scripted_episode(length, seed=i, ends=[length - 1] if i == 0 else []) for i, length in enumerate(LENGTHS)]
    low, high = BOUNDS
    return [episode | {"raw": low + (episode["actions"] + 1) / 2 * (high - low)} for episode in made]


def columns(*names: str) -> list[list[np.ndarray]]:
    return [[episode[name] for episode in episodes()] for name in names]


def from_arrays(folder: Path, **kwargs: Any) -> Demos:
    obs, actions, rewards, terminated, success = columns("obs", "raw", "rewards", "terminated", "success")
    return Demos.from_arrays(obs, actions, rewards, terminated, success, **(dict(action_bounds=BOUNDS) | kwargs))


def write_robomimic(path: Path, next_obs: bool = True) -> Path:
    """As robomimic's ``dataset_states_to_obs.py`` writes it. Its episodes have no order in the file."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(dict(env_name="Lift", type=1, env_kwargs={}))
        for i, episode in reversed(list(enumerate(episodes()))):
            group = data.create_group(f"demo_{i}")
            group.attrs["num_samples"] = len(episode["actions"])
            for key, rows in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
                if key == "obs" or next_obs:
                    group[f"{key}/robot0_eef_pos"] = episode["obs"][rows, :2]
                    group[f"{key}/object"] = episode["obs"][rows, 2:]
                    group[f"{key}/agentview_image"] = np.zeros((len(episode["actions"]), 4, 4, 3), np.uint8)
            group["actions"], group["rewards"] = episode["actions"], episode["rewards"]
            group["dones"] = episode["terminated"].astype(np.int64)
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
    return path


def from_robomimic(folder: Path, **kwargs: Any) -> Demos:
    path = write_robomimic(folder / "low_dim.hdf5")
    return load_robomimic(path, **(dict(obs_keys=("robot0_eef_pos", "object"), env_id=None) | kwargs))


def write_lerobot(folder: Path, version: str = "v3.0", **features: Any) -> Path:
    """
    As LeRobot 0.4 (v3: many episodes a file) or 0.3 (v2.1: a file an episode) writes it, without its statistics.

    :param features: further entries of ``features`` in ``meta/info.json``
    """
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kinds = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    shapes = {"observation.state": (2, "float32"), "observation.environment_state": (1, "float32"), "action": (2, "float32")}
    shapes |= {"next.reward": (1, "float32"), "next.done": (1, "bool"), "next.success": (1, "bool")}
    shapes |= {"frame_index": (1, "int64"), "episode_index": (1, "int64")}
    tables = []
    for i, episode in enumerate(episodes()):
        n = len(episode["actions"])
        done = np.arange(n) == n - 1
        values = [episode["obs"][:-1, :2], episode["obs"][:-1, 2:], episode["raw"], episode["rewards"], done]
        values += [episode["success"], np.arange(n), np.full(n, i)]
        arrays = {}
        for (name, (size, kind)), value in zip(shapes.items(), values, strict=True):
            lists = np.asarray(value).reshape(n, -1)
            own = pa.list_(kinds[kind], size) if lists.shape[1] > 1 or name.startswith("obs") else kinds[kind]
            arrays[name] = pa.array(lists.tolist() if pa.types.is_fixed_size_list(own) else lists[:, 0].tolist(), own)
        tables.append(pa.table(arrays))
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    if version == "v3.0":
        parquet.write_table(pa.concat_tables(tables), folder / "data" / "chunk-000" / "file-000.parquet")
    else:
        for i, table in enumerate(tables):
            parquet.write_table(table, folder / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
    described = {name: dict(dtype=kind, shape=[size], names=None) for name, (size, kind) in shapes.items()}
    info = dict(codebase_version=version, total_episodes=len(tables), fps=10, features=described | features)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def from_lerobot(folder: Path, **kwargs: Any) -> Demos:
    return load_lerobot(write_lerobot(folder / "dataset"), **(dict(action_bounds=BOUNDS) | kwargs))


def write_minari() -> Any:
    """As Minari's ``DataCollector(env, record_infos=True)`` keeps it, for an env with dict observations."""
    minari = pytest.importorskip("minari")
    buffers = []
    for i, episode in enumerate(episodes()):
        n = len(episode["actions"])
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                id=i,
                observations=dict(a=episode["obs"][:, :2], b=episode["obs"][:, 2:]),
                actions=episode["raw"].astype(np.float32),
                rewards=list(episode["rewards"]),
                terminations=list(episode["terminated"]),
                truncations=list((np.arange(n) == n - 1) & ~episode["terminated"]),
                infos=dict(success=np.append(False, episode["success"])),  # that of the reset comes first
            )
        )
    spaces = dict(a=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), b=gym.spaces.Box(-np.inf, np.inf, (1,), np.float32))
    return minari.create_dataset_from_buffers(
        "made/here-v0",
        buffers,
        data_format="hdf5",
        algorithm_name="scripted",
        observation_space=gym.spaces.Dict(spaces),
        action_space=gym.spaces.Box(*(bound.astype(np.float32) for bound in BOUNDS)),
        env="Pendulum-v1",
    )


def from_minari(folder: Path, **kwargs: Any) -> Demos:
    write_minari()
    return load_minari("made/here-v0", **kwargs)
