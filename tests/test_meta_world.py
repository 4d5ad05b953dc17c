"""MetaWorld in EnvPool, and its example: runs where both are installed."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch as th

from sb3_dsrl import SteeredPolicy
from tests.scripts import EXAMPLES, run_script

pytest.importorskip("metaworld", reason='MetaWorld is not installed: pip install "sb3-dsrl[metaworld]"')
pytest.importorskip("envpool", reason='EnvPool is not installed: pip install "sb3-dsrl[metaworld]"')

TASK = "pick-place-v3"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("meta_world")


def test_a_pool_is_repeated_by_its_seed(example: ModuleType) -> None:
    """Also the episodes that follow the first; other seeds are other starts, and no two envs have the same."""
    pool = example.SeededPool(TASK, 3, 1)

    def starts(seed: int) -> th.Tensor:
        first, _ = pool.reset(seed=[seed, seed + 1, seed + 2])
        for _ in range(example.TASKS[TASK].max_episode_steps):
            *_, truncated, _ = pool.step(th.zeros(3, 4))
        assert truncated.all()
        second, _ = pool.reset(options={"env_idx": th.arange(3)})
        return th.cat([first, second])

    found = starts(5)
    assert th.equal(found, starts(5)) and len(found.unique(dim=0)) == 6
    assert not (found[:, None] == starts(50)).all(dim=2).any()
    pool.close()


def test_envpool_simulates_metaworld(example: ModuleType) -> None:
    """From one start the same actions lead to the same success and reward, and to observations that differ by millimetres."""
    metaworld = importlib.import_module("metaworld")
    pool = example.make_pool(TASK, 1, 1, seed=3)
    obs = pool.reset()[0][0]
    env = metaworld.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{TASK}-goal-observable"](seed=0)
    env._last_rand_vec = np.concatenate([obs[4:7], obs[-3:]])  # where object and goal are
    expected, _ = env.reset()
    expert = example.ENV_POLICY_MAP[TASK]()
    np.testing.assert_allclose(obs, expected, atol=1e-3)
    for _ in range(80):
        action = expert.get_action(expected).clip(-1, 1).astype(np.float32)
        obs, reward, _, _, info = pool.step(action[None])
        expected, expected_reward, _, _, expected_info = env.step(action)
    np.testing.assert_allclose(obs[0], expected, atol=5e-3)
    assert reward[0] == pytest.approx(expected_reward, rel=0.02) and info["success"][0] == expected_info["success"] == 1


@pytest.mark.timeout(600)
def test_the_example(tmp_path: Path) -> None:
    flags = ("--n_demos", 2, "--n_iterations", 20, "--n_envs", 4, "--rollout_episodes", 4, "--total_timesteps", 2_400)
    rounds = ("--ticket_rounds", 2, 4)
    done = run_script("meta_world.py", TASK, "--seed", 1, *flags, *rounds, "--num_eval_episodes", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / TASK
    report = json.loads((folder / "report.json").read_text())
    assert (report["env_id"], report["seed"]) == (TASK, 1)
    assert 0 < report["stage1_env_steps"] < report["env_steps"] <= 2_400 + 4 * 512
    names = [row["name"] for row in report["rows"]]
    assert names == ["prior", "zero", "ticket", "narrow", "stage1", "stage2", "stage2_stochastic"]
    assert all(row["episodes"] == 4 and row["length"] == 100 for row in report["rows"])
    assert SteeredPolicy.from_pretrained(folder / "policy").flow.act_horizon == 4


def test_unknown_task(tmp_path: Path) -> None:
    done = run_script("meta_world.py", "pick-plaice-v3", cwd=tmp_path)
    assert done.returncode == 2 and "found pick-plaice-v3" in done.stderr and not list(tmp_path.iterdir())
