"""Every example script, run as a user runs it."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_dsrl import SteeredPolicy, collect_rollouts, create_flow, evaluate, load_demos, make_latent_env, train_flow
from tests.scripts import EXAMPLES, run_script


def run(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    # one thread: on a busy machine torch's threads would wait for each other
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(EXAMPLES / script), *map(str, flags)], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
def test_make_demos(tmp_path: Path, control_mode: str) -> None:
    path = tmp_path / "demos.h5"
    flags = ("--env-id", "PickCube-v1", "--num-demos", 2, "--control-mode", control_mode, "--speedup", 2, "--noise", 0.05)
    done = run("make_demos.py", *flags, "--expert", "planner", "--trim-pauses", "--workers", 1, "--output", path)
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


#: PushCube-v1's in small.
RECIPE = """
from dataclasses import replace
from recipes.push_cube import RECIPE

RECIPE = replace(
    RECIPE,
    flow=RECIPE.flow | dict(n_iterations=30),
    critic_iterations=5,
    n_envs=2,
    ticket_rounds=((2, 2),),
    rollout_episodes=4,
    total_timesteps=2000,
)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a small recipe wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = folder / "small.py"
    recipe.write_text(RECIPE)
    flags = ("--demo_path", EXAMPLES / "demos" / "PushCube-v1.h5", "--num_eval_episodes", 4, "--video_episodes", 1)
    done = run("run_recipe.py", recipe, "--output", folder, "--seed", 3, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "PushCube-v1",
        "PickCube-v1",
        "LiftPegUpright-v1",
        "StackCube-v1",
        "PegInsertionSide-v1",
        "PushCube-v1 rgb",
        "PickCube-v1 rgb",
    ],
)
def test_recipes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their flags make a demo, and their flow fits it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    make_demos = importlib.import_module("make_demos")
    recipe = importlib.import_module("recipes").RECIPES[name]
    path = tmp_path / "demos.h5"
    make_demos.main(make_demos.Args(env_id=recipe.env_id, output=path, **(recipe.demos | dict(num_demos=1, workers=1))))
    flow = create_flow(path, spatial_features=recipe.spatial_features, **_without_training(recipe.flow))
    assert flow.act_horizon <= flow.pred_horizon and recipe.name == name and recipe.env_id == flow.env_id
    if recipe.variant == "rgb":  # the env sees what the demos show
        env = make_latent_env(recipe.env_id, flow.freeze(), **recipe.env)
        assert env.reset().shape == (1, flow.cond_dim)
        env.close()


def _without_training(kwargs: dict[str, Any]) -> dict[str, Any]:
    own = inspect.signature(train_flow).parameters
    return {key: value for key, value in kwargs.items() if key not in own}


def test_a_recipe_that_is_none_is_refused(tmp_path: Path) -> None:
    done = run_script("run_recipe.py", "PushCub-v1", cwd=tmp_path)
    assert done.returncode == 2 and "no recipe PushCub-v1; there is one for PushCube-v1" in done.stderr
    path = tmp_path / "mine.py"
    path.write_text("RECIPE = 1")
    done = run_script("run_recipe.py", path, cwd=tmp_path)
    assert done.returncode == 2 and "must define RECIPE, a recipes.recipe.Recipe; found int" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.timeout(600)
def test_quickstart(quickstart: tuple[Path, str]) -> None:
    folder, text = quickstart
    report = json.loads((folder / "report.json").read_text())
    seconds = {"stage0_seconds", "stage2_seconds", "wall_seconds"}
    assert report.keys() == {"env_id", "seed", "env_steps", "stage1_env_steps", "rows"} | seconds
    assert 0 < report["stage1_env_steps"] < report["env_steps"]
    assert (report["env_id"], report["seed"]) == ("PushCube-v1", 3)
    assert 1000 <= report["env_steps"] <= 2000 + 2048
    names = [row["name"] for row in report["rows"]]
    assert names == ["prior", "zero", "ticket", "narrow", "stage1", "stage1_stochastic", "stage2", "stage2_stochastic"]
    for row in report["rows"]:
        assert row.keys() >= {"name", "episodes", "success_once", "success_at_end", "ci_low", "ci_high", "return"}
        assert row["episodes"] == 4 and row["ci_low"] <= row["success_at_end"] <= row["ci_high"]
        assert row["name"] in text
    for name in (
        "report.png",
        "before.mp4",
        "after.mp4",
        "model.zip",
        "stage1.pt",
        "flow/config.json",
        "flow/model.safetensors",
        "policy/latent.safetensors",
    ):
        assert (folder / name).stat().st_size > 1000 or name == "flow/config.json"


#: Raw env steps, and of this package the policy alone.
PLAY = """
import json, sys
import gymnasium as gym
import mani_skill.envs
from mani_skill.utils.wrappers import CPUGymWrapper
from sb3_dsrl import SteeredPolicy

policy = SteeredPolicy.from_pretrained(sys.argv[1])
kwargs = dict(obs_mode="state", control_mode=policy.flow.control_mode, reward_mode="normalized_dense")
env = CPUGymWrapper(gym.make("PushCube-v1", sim_backend="physx_cpu", render_backend="none", **kwargs))
episodes = []
for seed in map(int, sys.argv[2:]):
    obs, _ = env.reset(seed=seed)
    policy.reset()
    frames, chunks, rewards, success, truncated = [obs], [], [], [], False
    while not truncated:
        chunk = policy.predict(frames)
        frames = []
        for action in chunk:  # to its end, beyond a time limit
            obs, reward, _, ended, info = env.step(action)
            frames.append(obs)
            if not truncated:
                rewards.append(float(reward))
                success.append(bool(info["success"]))
            truncated = truncated or ended
        chunks.append(chunk.tolist())
    episodes.append(dict(chunks=chunks, returns=sum(rewards), once=any(success), end=success[-1], length=len(rewards)))
print(json.dumps(episodes))
"""


@pytest.mark.timeout(600)
def test_the_policy_of_the_quickstart_plays_a_raw_env_in_a_fresh_process(quickstart: tuple[Path, str]) -> None:
    """The same actions to the bit, and the same success, as in the steered env."""
    folder, seed = quickstart[0] / "policy", 1_000_000
    seeds = (seed, np.random.default_rng(seed).integers(2**31))  # of a steered env that plays two episodes
    command = [sys.executable, "-c", PLAY, str(folder), *map(str, seeds)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    episodes = json.loads(done.stdout.splitlines()[-1])

    policy = SteeredPolicy.from_pretrained(folder)
    env = make_latent_env("PushCube-v1", policy.flow)
    result = evaluate(policy, env, 2, seed=seed)
    env.close()
    for key, found in (
        ("returns", result.mean_return),
        ("once", result.success_once),
        ("end", result.success_at_end),
        ("length", result.mean_length),
    ):
        assert np.mean([episode[key] for episode in episodes]) == pytest.approx(found, rel=1e-6), key
    env = make_latent_env("PushCube-v1", policy.flow)
    rollouts = collect_rollouts(policy, env, 2, seed=seed, deterministic=True)
    env.close()
    chunks = np.concatenate([episode["chunks"] for episode in episodes]).astype(np.float32)
    np.testing.assert_array_equal(chunks, rollouts.chunk.numpy())


def test_benchmark(tmp_path: Path) -> None:
    """The parts without a simulator; the figures of so few repeats mean nothing, but both codes compute the same."""
    flags = ("--batches", 2, "--peer-batches", 2, "--stage1-batch", 2, "--repeats", 1, "--no-simulate", "--output", tmp_path)
    done = run("benchmark/run.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    for key in ("decode_speedup", "decode_2step_speedup", "decode_peer_ratio"):
        assert [list(report[key][c]) for c in ("64", "562")] == [["2"]] * 2
    assert (
        all(row["max_error"] < 1e-5 for row in report["decode"] + report["decode_peer"]) and report["max_score_error"] < 1e-4
    )
    assert all(report[key] > 0 for key in ("stage1_iteration_speedup", "stage1_iteration_2step_speedup", "stage1_30k_speedup"))
    assert "decode_speedup" in done.stdout
