"""``examples/pusht.py``, from demos to table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch as th

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402
from pusht_base import OBS_KEYS, REPO_ID, _windows, diffusion_config, record_demos  # noqa: E402

from sb3_dsrl import load_lerobot  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three demos."""
    path = tmp_path_factory.mktemp("pusht")
    record_demos(path / "demos", 3)
    return path


def test_demos_are_successful_episodes(folder: Path) -> None:
    demos = load_lerobot(folder / "demos", action_bounds=(np.zeros(2), np.full(2, 512)))
    assert len(demos.episodes) == 3 and demos.obs_shapes == (18,)
    for episode in demos.episodes:
        assert episode.success is not None and episode.success[-1] and not episode.success[:-1].any()
        assert 20 < len(episode) <= 300


def test_windows_are_those_of_lerobot(folder: Path) -> None:
    config = diffusion_config(LeRobotDataset(REPO_ID, root=folder / "demos"))
    deltas = {key: [i / 10 for i in config.observation_delta_indices] for key in OBS_KEYS}
    deltas["action"] = [i / 10 for i in config.action_delta_indices]
    dataset = LeRobotDataset(REPO_ID, root=folder / "demos", delta_timestamps=deltas)
    windows = _windows(dataset, config)
    ends = dataset.meta.episodes["dataset_to_index"]
    kept = [i for i in range(len(dataset)) if min(end for end in ends if end > i) - i > config.drop_n_last_frames]
    assert len(windows["action"]) == len(kept)
    first = kept.index(ends[0])  # of the second episode, so that both ends of an episode are seen
    for row in [*range(4), *range(first - 4, first + 3)]:
        item: Any = dataset[kept[row]]
        for key, values in windows.items():
            th.testing.assert_close(values[row], item[key])


def test_the_script(folder: Path) -> None:
    command = (
        f"examples/pusht.py --folder {folder} --results {folder}/results --n-demos 3 --base-iterations 20 --env-steps 300"
    )
    sizes = "--num-envs 2 --num-workers 1 --ticket-rounds 2 2 1 2 --num-eval-episodes 2"
    for seed in (0, 1):
        done = subprocess.run(
            [sys.executable, *command.split(), *sizes.split(), "--seed", str(seed)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    names = ["prior", "zero", "ticket", "steered", "steered, sampled", "SAC from scratch"]
    report = json.loads((folder / "results" / "seed1.json").read_text())
    assert list(report["rows"]) == names and report["env_steps"] == 300
    frame = pd.read_csv(folder / "results" / "pusht.csv")
    assert list(frame["name"]) == names * 2 and list(frame["seed"]) == [0] * 6 + [1] * 6
    assert (frame["env_steps"][3:6] >= 300).all() and frame["coverage"].between(0, 1).all()
