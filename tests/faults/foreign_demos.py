"""Demos from elsewhere that are damaged or something else."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl import Demos, load_lerobot, load_robomimic
from sb3_dsrl.stage0.episodes import DemoError
from tests.faults.case import Case
from tests.foreign_demos import BOUNDS, columns, from_arrays, from_lerobot, from_robomimic, write_lerobot, write_robomimic


def arrays(change: Callable[[dict[str, list[Any]]], Any], **kwargs: Any) -> Callable[[Path], Demos]:
    """The columns of good demos, after a change."""

    def play(folder: Path) -> Demos:
        names = ("obs", "actions", "rewards", "terminated", "success")
        known = dict(zip(names, columns(*names), strict=True))
        change(known)
        return Demos.from_arrays(**known, **kwargs)  # type: ignore[arg-type]

    return play


def put(name: str, value: Any, episode: int = 1) -> Callable[[dict[str, list[Any]]], Any]:
    """A change: another array in one episode; a function is applied to the old one."""

    def change(known: dict[str, list[Any]]) -> None:
        known[name][episode] = value(known[name][episode]) if callable(value) else value

    return change


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[1] = np.nan
    return array


def robomimic(change: Callable[[h5py.File], Any], **kwargs: Any) -> Callable[[Path], Demos]:
    """A good file, after a change."""

    def play(folder: Path) -> Demos:
        path = write_robomimic(folder / "low_dim.hdf5")
        with h5py.File(path, "a") as file:
            change(file)
        return load_robomimic(path, **(dict(obs_keys=("robot0_eef_pos", "object")) | kwargs))

    return play


def lerobot(change: Callable[[Path, dict[str, Any]], Any], **kwargs: Any) -> Callable[[Path], Demos]:
    """A good dataset, after a change of its files or of ``meta/info.json``."""

    def play(folder: Path) -> Demos:
        folder = write_lerobot(folder / "dataset", "v2.1")
        path = folder / "meta" / "info.json"
        info = json.loads(path.read_text())
        change(folder, info)
        path.write_text(json.dumps(info))
        return load_lerobot(folder, **(dict(action_bounds=BOUNDS) | kwargs))

    return play


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


FIRST = "data/chunk-000/episode_000000.parquet"

CASES = [
    Case(
        "arrays: no last observation",
        arrays(put("obs", lambda x: x[:-1])),
        "episode 1/obs has 4 entries, expected 5",
        DemoError,
    ),
    Case(
        "arrays: short rewards", arrays(put("rewards", np.zeros(3))), "episode 1/rewards has 3 entries, expected 4", DemoError
    ),
    Case("arrays: NaN", arrays(put("obs", with_nan)), "episode 1/obs holds NaN or infinite values", DemoError),
    Case(
        "arrays: text",
        arrays(put("actions", [["a", "b"]])),
        "episode 1/actions holds values of type <U1, expected n",
        DemoError,
    ),
    Case(
        "arrays: flat actions",
        arrays(put("actions", np.zeros(4))),
        r"actions has shape \(4,\), expected 2 dimensions",
        DemoError,
    ),
    Case("arrays: no steps", arrays(put("actions", np.zeros((0, 2)))), "arrays: episode 1 has no steps", DemoError),
    Case(
        "arrays: other sizes",
        arrays(put("obs", np.zeros((5, 4)))),
        r"arrays: obs have \[3, 4\] dimensions in different episodes; expected one D",
        DemoError,
    ),
    Case(
        "arrays: one column is short",
        arrays(lambda known: known["rewards"].pop()),
        r"one array of each kind an episode, .* found \{'obs': 3, 'actions': 3, 'rewards': 2",
        DemoError,
    ),
    Case("arrays: none", lambda folder: Demos.from_arrays([], []), "at least one episode, found {'obs': 0, 'acti", DemoError),
    Case(
        "arrays: actions in other units",
        lambda folder: from_arrays(folder, action_bounds=None),
        r"episode 0/actions reach .*, expected \[-1, 1\]: pass action_bounds=\(action_space.low, action_space.high\)",
        DemoError,
    ),
    Case(
        "arrays: bounds of another env",
        lambda folder: from_arrays(folder, action_bounds=(np.zeros(3), np.ones(3))),
        r"episode 0: action_bounds must be two finite numbers or arrays of shape \(A,\) = \(2,\)",
        DemoError,
    ),
    Case(
        "arrays: keys of another env",
        arrays(put("obs", dict(position=np.zeros((5, 3))))),
        r"episode 1/obs has the keys \['position'\], expected one array, or 'rgb' or 'depth'",
        DemoError,
    ),
    Case(
        "arrays: float images",
        arrays(put("obs", dict(rgb=np.zeros((5, 4, 4, 3))))),
        "episode 1/obs/rgb holds values of type float64, expected uint8",
        DemoError,
    ),
    Case("robomimic: no file", lambda folder: load_robomimic(folder / "no.hdf5"), "no.hdf5 does not exist", FileNotFoundError),
    Case(
        "robomimic: states alone",
        robomimic(lambda file: file["data/demo_1"].pop("obs")),
        "low_dim.hdf5:data/demo_1 has no 'obs': robomimic's dataset_states_to_obs.py adds",
        DemoError,
    ),
    Case(
        "robomimic: other observations",
        lambda folder: from_robomimic(folder, obs_keys=("object", "eye")),
        r"data/demo_0/obs has no \['eye'\]; pass obs_keys, of \['agentview_image', 'object', 'robot0_eef_pos'\]",
        DemoError,
    ),
    Case(
        "robomimic: images",
        lambda folder: from_robomimic(folder, obs_keys=("agentview_image",)),
        r"obs/agentview_image has shape \(6, 4, 4, 3\): images are not read",
        DemoError,
    ),
    Case(
        "robomimic: unknown filter_key",
        lambda folder: from_robomimic(folder, filter_key="valid"),
        r"low_dim.hdf5 has no 'mask/valid'; its masks are \['train'\]",
        DemoError,
    ),
    Case(
        "robomimic: another file", robomimic(lambda file: file.pop("data")), "low_dim.hdf5 has no group 'data', but", DemoError
    ),
    Case(
        "robomimic: a damaged attribute",
        robomimic(lambda file: file["data"].attrs.__setitem__("env_args", "{")),
        "attribute 'env_args' of 'data' is no JSON",
        DemoError,
    ),
    Case(
        "robomimic: too few",
        lambda folder: from_robomimic(folder, num_demos=9),
        "holds 3 episodes, but num_demos=9",
        DemoError,
    ),
    Case(
        "LeRobot: no folder",
        lambda folder: load_lerobot(folder / "no"),
        "info.json does not exist; expected a data",
        FileNotFoundError,
    ),
]
if find_spec("pyarrow"):
    CASES += [
        Case(
            "LeRobot: cut short",
            lerobot(lambda at, info: cut_short(at / FIRST)),
            "episode_000000.parquet cannot be read as P",
            DemoError,
        ),
        Case(
            "LeRobot: a file is missing",
            lerobot(lambda at, info: (at / FIRST).unlink()),
            "info.json lists 3 episodes, but the files in .*data hold 2",
            DemoError,
        ),
        Case(
            "LeRobot: a file is there twice",
            lerobot(lambda at, info: (at / FIRST).with_stem("copy").write_bytes((at / FIRST).read_bytes())),
            "dataset: frames of episode 0 are missing or there twice",
            DemoError,
        ),
        Case(
            "LeRobot: an older version",
            lerobot(lambda at, info: info.update(codebase_version="v1.6")),
            "codebase_version is 'v1.6', expected v2 or v3",
            DemoError,
        ),
        Case(
            "LeRobot: no features",
            lerobot(lambda at, info: info.pop("features")),
            "is no JSON with codebase_version, feat",
            DemoError,
        ),
        Case(
            "LeRobot: images alone",
            lerobot(lambda at, info: [info["features"].pop(k) for k in list(info["features"]) if k.startswith("obs")]),
            r"there is no feature 'observation.state' that holds numbers; pass obs_keys, of \['action', 'next.reward'\]",
            DemoError,
        ),
        Case(
            "LeRobot: a column that is not there",
            lerobot(lambda at, info: info["features"].update({"effort": dict(dtype="float32")}), obs_keys=["effort"]),
            "episode_000000.parquet has no column 'effort', which meta/info.json lists",
            DemoError,
        ),
        Case(
            "LeRobot: actions in other units",
            lambda folder: from_lerobot(folder, action_bounds=None),
            r"dataset: episode 0/actions reach .*, expected \[-1, 1\]: pass action_bounds",
            DemoError,
        ),
    ]
