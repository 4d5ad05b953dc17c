"""
Reads datasets in LeRobot's format, versions 2 and 3 (https://github.com/huggingface/lerobot): ``meta/info.json`` and Parquet
files below ``data``. By pyarrow, since LeRobot itself cannot be installed beside numpy < 2, as ManiSkill's planner needs it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.episodes import DemoError, asked_for
from sb3_dsrl.utils.integrity import one_line

#: What is seen unless it is said.
STATE = ("observation.state", "observation.environment_state")
#: Columns that a dataset of a simulator may have, and what they are here.
SERIES = {"next.reward": "rewards", "next.done": "terminated", "next.success": "success"}


def load_lerobot(
    folder: str | Path, num_demos: int | None = None, *, obs_keys: Sequence[str] | None = None, **about: Any
) -> Demos:
    """
    Reads the states and actions of a dataset in LeRobot's format. Images are left out, with a warning.

    Such a dataset does not hold the observation after the last action: the last one stands for it. ``next.done`` marks the
    last step of an episode, for whatever reason; it is taken for a termination if ``next.success`` is true or is not there.

    :param folder: of the dataset, with ``meta`` and ``data`` in it
    :param num_demos: read only the first so many episodes; None reads all
    :param obs_keys: features that are put side by side, in the order in which the env to steer has them; None is
        "observation.state" and "observation.environment_state", as far as they are there
    :param about: further arguments of :meth:`Demos.from_arrays <sb3_dsrl.Demos.from_arrays>`, such as ``action_bounds`` and
        ``env_id``, which the format does not know
    :return: the demos
    :raises ImportError: if pyarrow is not installed
    :raises FileNotFoundError: if there is no such folder
    :raises DemoError: if it is damaged or not what is said here; the sentence names file and key
    """
    folder = Path(folder)
    info_path = folder / "meta" / "info.json"
    features, total = _read_info(info_path)
    keys = [key for key in STATE if key in features] if obs_keys is None else list(obs_keys)
    readable = sorted(key for key, feature in features.items() if feature.get("dtype") in ("float32", "float64"))
    for key in [*(keys or ["observation.state"]), "action"]:
        if key not in readable:
            raise DemoError(f"{info_path}: there is no feature {key!r} that holds numbers; pass obs_keys, of {readable}")
    images = sorted(key for key, feature in features.items() if feature.get("dtype") in ("image", "video"))
    if images:
        warnings.warn(f"{folder}: the images {images} are left out; only states are read")
    series = {key: name for key, name in SERIES.items() if key in features}
    table = _read_table(folder, [*keys, "action", *series, "episode_index", "frame_index"])
    order = np.lexsort((table["frame_index"][:, 0], table["episode_index"][:, 0]))
    table = {key: column[order] for key, column in table.items()}
    numbers, starts, lengths = np.unique(table["episode_index"][:, 0], return_index=True, return_counts=True)
    if len(numbers) != total:
        raise DemoError(f"{info_path} lists {total} episodes, but the files in {folder / 'data'} hold {len(numbers)}")
    n = asked_for(str(folder), total, num_demos)
    columns: dict[str, Any] = {name: [] for name in ("obs", "actions", *series.values())}
    for number, start, length in zip(numbers[:n], starts, lengths, strict=False):
        rows = slice(start, start + length)
        if not np.array_equal(table["frame_index"][rows, 0], np.arange(length)):
            raise DemoError(f"{folder}: frames of episode {int(number)} are missing or there twice")
        obs = np.concatenate([table[key][rows] for key in keys], axis=1)
        columns["obs"].append(np.concatenate([obs, obs[-1:]]))
        columns["actions"].append(table["action"][rows])
        for key, name in series.items():
            columns[name].append(table[key][rows, 0])
    if {"terminated", "success"} <= columns.keys():
        pairs = zip(columns["terminated"], columns["success"], strict=True)
        columns["terminated"] = [done.astype(bool) & success.astype(bool) for done, success in pairs]
    return Demos.from_arrays(**columns, **about, path=folder)


def _read_info(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The features, and the number of episodes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a dataset in LeRobot's format")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version, features, total = str(info["codebase_version"]), dict(info["features"]), int(info["total_episodes"])
        all(feature["dtype"] for feature in features.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DemoError(f"{path} is no JSON with codebase_version, features and total_episodes ({error!r})") from error
    if not version.startswith(("v2.", "v3.")):
        raise DemoError(f"{path}: codebase_version is {version!r}, expected v2 or v3; LeRobot converts older datasets")
    return features, total


def _read_table(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns of all files, (rows, values)."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("load_lerobot needs the package pyarrow: pip install 'sb3-dsrl[lerobot]'") from error
    paths = sorted((folder / "data").rglob("*.parquet"))
    if not paths:
        raise DemoError(f"{folder / 'data'} holds no .parquet file")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                present = set(file.schema_arrow.names)
                table = file.read(columns=[name for name in names if name in present])
        except Exception as error:  # of many kinds, by what is damaged
            raise DemoError(f"{path} cannot be read as Parquet; it is damaged or cut short ({one_line(error)})") from error
        if missing := sorted(set(names) - present):
            raise DemoError(f"{path} has no column {missing[0]!r}, which meta/info.json lists")
        for name in names:
            parts[name].append(_rows(f"{path}: {name}", table.column(name).to_pylist()))
    for name, arrays in parts.items():
        if len({array.shape[1] for array in arrays}) > 1:
            raise DemoError(f"{folder / 'data'}: {name!r} differs in size between files")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _rows(where: str, values: list[Any]) -> np.ndarray:
    try:
        array = np.array(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DemoError(f"{where} holds rows of different sizes, or none ({one_line(error)})") from error
    return array.reshape(len(array), -1)
