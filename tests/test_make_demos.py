"""Demos of the scripted experts, and how attempts become a file."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from mani_skill.utils.wrappers.record import RecordEpisode

from sb3_dsrl import load_demos
from sb3_dsrl.experts import EXPERTS
from tests.demo_files import scripted_episode, write_demos
from tests.scripts import EXAMPLES, run_script

#: Share of attempts with the experts' own noise.
SUCCESS = {
    "LiftPegUpright-v1": 0.9,
    "PegInsertionSide-v1": 0.7,
    "PickCube-v1": 0.9,
    "PushCube-v1": 0.9,
    "StackCube-v1": 0.9,
}


def module(name: str) -> Any:
    return importlib.import_module(f"sb3_dsrl.experts.{name}")


def attempts(n: int, **flags: Any) -> list[Any]:
    demonstrator = module("scripted").Scripted(module("recipe").DemoRecipe(**flags))
    found = []
    for seed in range(n):
        if seed % module("attempts").BLOCK == 0:
            demonstrator.rebuild()
        found.append(demonstrator.attempt(seed))
    return found


@pytest.mark.parametrize("env_id", SUCCESS)
def test_experts_succeed(env_id: str) -> None:
    """Without noise, in the registered time, and each attempt that does so says so."""
    found = attempts(6, env_id=env_id, noise=0.0)
    assert sum(attempt.success for attempt in found) >= 5
    for attempt in found:
        assert attempt.success == attempt.arrays["success"][-1] == attempt.episode["success"]
        assert attempt.file["env_info"]["max_episode_steps"] == gym.spec(env_id).max_episode_steps
        assert attempt.episode["elapsed_steps"] == len(attempt.arrays["actions"]) <= gym.spec(env_id).max_episode_steps
        assert np.abs(attempt.arrays["actions"]).max() <= 1.0


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
@pytest.mark.parametrize("env_id", SUCCESS)
def test_experts_succeed_with_their_noise(env_id: str, control_mode: str) -> None:
    found = attempts(100, env_id=env_id, control_mode=control_mode)
    assert np.mean([attempt.success for attempt in found]) >= SUCCESS[env_id]


def test_every_style_succeeds() -> None:
    expert = EXPERTS["PickCube-v1"]
    found = attempts(2 * len(expert.styles), env_id="PickCube-v1", noise=0.0, styles=len(expert.styles))
    assert [attempt.episode["style"] for attempt in found] == 2 * list(range(len(expert.styles)))
    assert all(attempt.success for attempt in found)


def test_noise_is_what_was_asked_for() -> None:
    noise = module("recipe").smooth_noise(np.random.default_rng(0), 0.3, 0.8)
    series = np.array([next(noise) for _ in range(20_000)])
    assert series.std() == pytest.approx(0.3, rel=0.03)
    assert (series[1:] * series[:-1]).mean() / 0.3**2 == pytest.approx(0.8, abs=0.03)


def test_joints_that_reach_their_bounds_are_helped_by_the_others() -> None:
    solve = module("servo").bounded_least_squares
    matrix, wanted = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.array([1.0, 0.5])
    free = solve(matrix, wanted, np.full(3, -9.0), np.full(3, 9.0))
    np.testing.assert_allclose(free, [0.5, 0.5, 0.5], atol=1e-3)
    held = solve(matrix, wanted, np.full(3, -9.0), np.array([0.1, 9.0, 0.2]))
    np.testing.assert_allclose(held, [0.1, 0.9, 0.2], atol=1e-3)


@pytest.mark.parametrize("obs_mode", ["state", "state_dict"])
def test_records_what_maniskill_records(tmp_path: Path, obs_mode: str) -> None:
    recipe = module("recipe").DemoRecipe(env_id="PickCube-v1", obs_mode=obs_mode)
    ours = module("recording").make_recorded_env(recipe)
    kwargs: dict[str, Any] = dict(obs_mode=obs_mode, reward_mode="normalized_dense", control_mode="pd_joint_delta_pos")
    kwargs |= dict(render_backend="none", sim_backend="physx_cpu", num_envs=1)
    theirs = RecordEpisode(gym.make("PickCube-v1", **kwargs), str(tmp_path), trajectory_name="theirs", save_video=False)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 8)).astype(np.float32)
    for env in (ours, theirs):
        env.reset(seed=3)
        for action in actions:
            env.step(action)
    theirs.flush_trajectory()
    theirs.close()
    attempts = module("attempts")
    with h5py.File(tmp_path / "block.h5", "w") as file:
        attempts.write_attempt(file.create_group("0", track_order=True), ours.attempt(False), keep_failures=True)
    attempts.join_parts(attempts.read_parts(tmp_path / "block.h5", 1), tmp_path / "ours.h5", {})

    found: dict[str, dict[str, np.ndarray]] = {}
    for name in ("ours", "theirs"):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            names: list[str] = []
            file.visit(names.append)
            found[name] = {key: file[key][()] for key in names if isinstance(file[key], h5py.Dataset)}
    assert found["ours"].keys() == found["theirs"].keys()
    for key, value in found["theirs"].items():
        assert found["ours"][key].dtype == value.dtype, key
        np.testing.assert_array_equal(found["ours"][key], value, err_msg=key)
    about = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ours", "theirs")]
    for part in about:
        part["env_info"]["env_kwargs"] = dict(sorted(part["env_info"]["env_kwargs"].items()))
    assert (about[0].pop("state_layout", None) is not None) == (obs_mode == "state")
    assert about[0] == about[1]


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen demos in three styles: two blocks of attempts, made in this process."""
    path = tmp_path_factory.mktemp("demos") / "demos.h5"
    done = run_script("make_demos.py", *FLAGS, "--workers", 1, "--output", path, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in path.parent.iterdir()) == ["demos.h5", "demos.json", "demos.sha256"]
    return path


FLAGS = ("--env-id", "PushCube-v1", "--num-demos", 15, "--styles", 3, "--seed", 7)


def test_demos_load_and_say_what_they_are(demos: Path) -> None:
    loaded = load_demos(demos, control_mode="pd_joint_delta_pos")
    assert (loaded.env_id, loaded.obs_mode, loaded.reward_mode) == ("PushCube-v1", "state", "normalized_dense")
    assert len(loaded.episodes) == 15
    assert all(episode.success is not None and episode.success[-6:].all() for episode in loaded.episodes)
    about = json.loads(demos.with_suffix(".json").read_text())
    assert about["styles"] == ["direct", "slow", "high"]
    with h5py.File(demos) as file:
        styles = [int(file[f"traj_{i}"].attrs["style"]) for i in range(15)]
    assert styles == [episode["style"] for episode in about["episodes"]]
    assert styles == [episode["episode_seed"] % 3 for episode in about["episodes"]]
    lengths = np.array([len(episode.actions) for episode in loaded.episodes])
    assert lengths[np.equal(styles, 1)].mean() > lengths[np.equal(styles, 0)].mean()  # "slow"


def test_layout_of_the_state(demos: Path) -> None:
    with h5py.File(demos) as file:
        obs, state = file["traj_0/obs"][()], file["traj_0/env_states/actors/cube"][()]
    layout = load_demos(demos).state_layout
    assert layout == [
        ("agent/qpos", 9),
        ("agent/qvel", 9),
        ("extra/tcp_pose", 7),
        ("extra/goal_pos", 3),
        ("extra/obj_pose", 7),
    ]
    assert sum(size for _, size in layout) == obs.shape[1]
    np.testing.assert_array_equal(obs[:, -7:], state[:, :7])


def test_episodes_can_start_at_any_step(demos: Path) -> None:
    about = json.loads(demos.with_suffix(".json").read_text())
    env = gym.make("PushCube-v1", **about["env_info"]["env_kwargs"])
    base: Any = env.unwrapped
    with h5py.File(demos) as file:
        for k in (0, 9, 15):
            env.reset(**about["episodes"][0]["reset_kwargs"])
            states = file["traj_0/env_states"]
            base.set_state_dict({kind: {name: states[kind][name][k : k + 1] for name in states[kind]} for kind in states})
            np.testing.assert_allclose(base.get_obs(base.get_info())[0], file["traj_0/obs"][k], atol=1e-5)
    env.close()


@pytest.mark.timeout(300)
def test_workers_and_an_interruption_change_no_byte(demos: Path, tmp_path: Path) -> None:
    path = tmp_path / "demos.h5"
    command = [sys.executable, str(EXAMPLES / "make_demos.py"), *map(str, FLAGS), "--workers", "2", "--output", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    folder = path.with_suffix(".parts")
    deadline = time.time() + 120
    while process.poll() is None and not list(folder.glob("0*.h5")) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "goes on" in stderr, stderr
    assert not path.exists() and list(folder.glob("0*.h5"))

    wrong = run_script("make_demos.py", *FLAGS, "--noise", 0.2, "--output", path, cwd=tmp_path)
    assert wrong.returncode == 2 and "--noise None" in wrong.stderr and not path.exists()
    done = run_script("make_demos.py", *FLAGS, "--workers", 1, "--output", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == demos.read_bytes()
    assert path.with_suffix(".json").read_bytes() == demos.with_suffix(".json").read_bytes()
    assert not folder.exists()


def test_more_attempts_go_on_where_there_were_too_few(demos: Path, tmp_path: Path) -> None:
    path = tmp_path / "demos.h5"
    flags = (*FLAGS, "--workers", 1, "--output", path)
    few = run_script("make_demos.py", *flags, "--max-attempts", 5, cwd=tmp_path)
    assert few.returncode == 1 and "--max-attempts" in few.stderr
    assert len(load_demos(path).episodes) <= 5
    assert [file.name for file in path.with_suffix(".parts").glob("0*.h5")] == ["000000.h5"]
    done = run_script("make_demos.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == demos.read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--expert", "scripted", "--env-id", "PullCube-v1"),
            "LiftPegUpright-v1, PegInsertionSide-v1, PickCube-v1, PushCube-v1, StackCube-v1",
        ),
        (("--styles", 9), "1 to 5: direct"),
        (("--styles", 0), "1 to 5: direct"),
        (("--speedup", 2), "--expert planner"),
        (("--trim-pauses",), "--expert planner"),
        (("--expert", "planner", "--styles", 2), "scripted"),
        (("--control-mode", "pd_joint_pos"), "pd_joint_delta_pos, pd_ee_delta_pose"),
        (("--noise-rho", 1), "noise-rho is 1"),
        (("--workers", 0), "workers is 0"),
    ],
)
def test_wrong_flags(tmp_path: Path, flags: tuple[object, ...], sentence: str) -> None:
    done = run_script("make_demos.py", "--output", tmp_path / "demos.h5", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_load_demos_reads_the_layout_of_maniskills_rl_demos(tmp_path: Path) -> None:
    """Recorded in many envs on a GPU: no ``reset_kwargs``, states of the env in nested groups, episodes without an end."""
    path = tmp_path / "trajectory.state.pd_joint_delta_pos.physx_cuda.h5"
    episodes = [scripted_episode(50, seed=i, ends=[20 + i, 49]) for i in range(3)]
    for episode in episodes:
        episode["fail"] = np.zeros(50, bool)
        sizes = {"actors/cube": 13, "articulations/panda": 31}
        episode["env_states"] = {key: np.zeros((51, size), np.float32) for key, size in sizes.items()}
    write_demos(path, episodes)
    about = json.loads(path.with_suffix(".json").read_text())
    about["env_info"]["env_kwargs"] |= dict(sim_backend="physx_cuda", num_envs=1024, render_mode="all", robot_uids="panda")
    about |= dict(commit_info=None, source_type="rl", source_desc="RL policy trained with PPO")
    for i, episode in enumerate(about["episodes"]):
        episode |= dict(episode_id=i, episode_seed=i, elapsed_steps=50, reset_kwargs={}, success=True)
    path.with_suffix(".json").write_text(json.dumps(about))
    loaded = load_demos(path, control_mode="pd_joint_delta_pos")
    for episode, written in zip(loaded.episodes, episodes, strict=True):
        for key in ("obs", "actions", "rewards", "terminated", "success"):
            np.testing.assert_array_equal(getattr(episode, key), written[key])
