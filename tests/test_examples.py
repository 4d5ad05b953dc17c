"""Every example script, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_dsrl import load_demos
from tests.scripts import EXAMPLES, run_script


def run(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    # one thread: on a busy machine torch's threads would wait for each other
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(EXAMPLES / script), *map(str, flags)], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
def test_make_demos(tmp_path: Path, control_mode: str) -> None:
    path = tmp_path / "demos.h5"
    flags = ("--env-id", "PickCube-v1", "--num-demos", 2, "--control-mode", control_mode, "--speedup", 2, "--noise", 0.05)
    done = run("make_demos.py", *flags, "--trim-pauses", "--output", path)
    assert done.returncode == 0, done.stderr
    demos = load_demos(path, control_mode=control_mode)
    assert (demos.env_id, len(demos.episodes)) == ("PickCube-v1", 2)
    assert all(episode.success is not None and episode.success[-1] for episode in demos.episodes)
    assert all(episode.rewards is not None and episode.rewards.max() > 0.5 for episode in demos.episodes)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--env-id", "PushCub-v1"), "PushCube-v1"),
        (("--control-mode", "pd_nothing"), "pd_nothing"),
        (("--noise", -1), "noise"),
        (("--speedup", 0), "speedup"),
        (("--num-demos", 0), "num"),
    ],
)
def test_make_demos_refuses(tmp_path: Path, flags: tuple[object, ...], sentence: str) -> None:
    done = run_script("make_demos.py", "--output", tmp_path / "demos.h5", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    small = (
        "--total-iters",
        30,
        "--critic-iters",
        5,
        "--rollout-episodes",
        4,
        "--rollout-rounds",
        2,
        "--n-envs",
        2,
        "--num-eval-episodes",
        4,
    )
    done = run("quickstart.py", "--output", tmp_path, "--seed", 3, *small, "--total-timesteps", 2000, "--video-episodes", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == {"env_id", "seed", "env_steps", "wall_seconds", "rows"}
    assert (report["env_id"], report["seed"]) == ("PushCube-v1", 3)
    assert 1000 <= report["env_steps"] <= 2000 + 2048
    names = [row["name"] for row in report["rows"]]
    assert names == ["prior", "zero", "stage1", "stage1_stochastic", "stage2", "stage2_stochastic"]
    for row in report["rows"]:
        assert row.keys() >= {"name", "episodes", "success_once", "success_at_end", "ci_low", "ci_high", "return"}
        assert row["episodes"] == 4 and row["ci_low"] <= row["success_at_end"] <= row["ci_high"]
        assert row["name"] in done.stdout
    for name in (
        "report.png",
        "before.mp4",
        "after.mp4",
        "model.zip",
        "stage1.pt",
        "flow/config.json",
        "flow/model.safetensors",
    ):
        assert (tmp_path / name).stat().st_size > 1000 or name == "flow/config.json"


def test_benchmark(tmp_path: Path) -> None:
    """The parts without a simulator; the figures of so few repeats mean nothing, but both codes compute the same."""
    flags = ("--batches", 2, "--stage1-batch", 2, "--repeats", 1, "--no-simulate", "--output", tmp_path)
    done = run("benchmark/run.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    for key in ("decode_speedup", "decode_2step_speedup"):
        assert [list(report[key][c]) for c in ("64", "562")] == [["2"]] * 2
    assert all(row["max_error"] < 1e-5 for row in report["decode"]) and report["max_score_error"] < 1e-4
    assert all(report[key] > 0 for key in ("stage1_iteration_speedup", "stage1_iteration_2step_speedup", "stage1_30k_speedup"))
    assert "decode_speedup" in done.stdout
