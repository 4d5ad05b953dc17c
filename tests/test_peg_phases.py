"""The phases of PegInsertionSide-v1: an expert goes through all of them, in their order."""

import importlib
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from mani_skill.utils.wrappers import CPUGymWrapper

from sb3_dsrl import VelocityMLP, load_demos, train_flow
from sb3_dsrl.envs.maniskill import maniskill_kwargs
from tests.scripts import EXAMPLES, run_script

ENV_ID = "PegInsertionSide-v1"


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "peg.h5"
    done = run_script("make_demos.py", "--env_id", ENV_ID, "--output", path, "--num_demos", 2, "--workers", 1, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return path


def test_an_expert_reaches_all_phases_in_order(demos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    script: Any = importlib.import_module("peg_phases")
    loaded = load_demos(demos)
    seed = json.loads(demos.with_suffix(".json").read_text())["episodes"][0]["episode_seed"]
    kwargs = maniskill_kwargs(ENV_ID, "state", control_mode=loaded.control_mode, reward_mode="sparse")
    env = script.Phases(CPUGymWrapper(gym.make(ENV_ID, **kwargs)))
    env.reset(seed=seed)
    with h5py.File(demos) as file:
        actions = np.array(file["traj_0/actions"])
    seen = [env.step(action)[4]["phases"] for action in actions]
    env.close()
    assert not any(seen[0].values()) and all(seen[-1].values())
    first = [next(k for k, phases in enumerate(seen) if phases[name]) for name in script.PHASES]
    assert first == sorted(first) and first[0] < first[-1]


def test_the_script_writes_its_table(demos: Path, tmp_path: Path) -> None:
    flow = train_flow(
        load_demos(demos), net_class=VelocityMLP, net_kwargs=dict(width=16), pred_horizon=8, act_horizon=8, n_iterations=1
    )
    flow.save_pretrained(tmp_path / "flow")
    flags = ("--awsc_checkpoint", tmp_path / "flow", "--episodes", 1, "--output", tmp_path / "phases.json")
    done = run_script("peg_phases.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "phases.json").read_text())
    assert list(report["rows"]) == ["prior", "zero"]
    assert list(report["rows"]["zero"]) == ["lifted", "aligned", "entered", "inserted", "success_at_end"]
    assert "lifted" in done.stdout


def test_what_is_played_must_be_said(tmp_path: Path) -> None:
    done = run_script("peg_phases.py", cwd=tmp_path)
    assert done.returncode != 0 and "Pass --awsc_checkpoint or --policy, one of the two" in done.stderr
