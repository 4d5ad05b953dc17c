"""The benchmark's own arithmetic: what it counts, and the keys of its report. Its figures are not tested."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dsrl import ActionChunkWrapper, FlowPolicy
from sb3_dsrl.policies import activations
from sb3_dsrl.steering.batched import BatchedChunkEnv
from tests.envs import scripted
from tests.models import steered
from tests.scripts import EXAMPLES
from tests.vector_sims import ScriptedEnvPool


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmark."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: importlib.import_module(f"benchmark.{name}")


def test_resets_and_steps_are_counted(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of 10 env steps that do not end early; and such as end in the middle of a chunk of 4."""
    envs = DummyVecEnv([lambda: ActionChunkWrapper(scripted(10, episode_lengths=(100,)), 5) for _ in range(3)])
    assert module("envs").played(envs, np.zeros((5, 3, 5, 2), np.float32))[2] == 3 + 3 * 2
    pool = module("pool")
    clock = iter(range(100))
    monkeypatch.setattr(
        pool, "time", SimpleNamespace(perf_counter=lambda: next(clock))
    )  # one second passes between its two readings
    raw = ScriptedEnvPool([scripted(10, episode_lengths=(3,)) for _ in range(2)])
    assert pool.raw_rate(raw, np.zeros((11, 2, 2), np.float32)) == 2 * (3 + 3 + 3)  # two resets between
    below = ScriptedEnvPool([scripted(10, episode_lengths=own) for own in ((3,), (1000,))])
    # the first env's chunks are all cut after 3 steps, of the other's the third by the time limit
    assert pool.chunk_rate(BatchedChunkEnv(below, 4), np.zeros((3, 2, 4, 2), np.float32)) == 3 * 3 + 4 + 4 + 2


def test_steered_envs_against_stock_ones(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = module("envs")
    monkeypatch.setattr(envs, "SIZES", (2,))
    monkeypatch.setattr(envs, "ENV_STEPS", 56)  # PushCube's episodes have 50; chunks of 8 make 56 of them
    found = envs.bench_envs(module("measuring").Args(fast_tasks=("PushCube-v1",), repeats=1))
    [row] = found["envs"]
    assert found["env_ratio"] == {"PushCube-v1": {"2": row["env_ratio"]}}
    assert row["low"] == row["env_ratio"] == row["high"] == pytest.approx(row["steered"] / row["stock"])
    assert row["steered_resets"] == 4 <= row["stock_resets"] and row["work_ratio"] > 0


def test_without_envpool_there_is_a_sentence(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = module("pool")
    monkeypatch.setattr(pool, "find_spec", lambda name: None)
    assert pool.bench_envpool(module("measuring").Args()) == {"envpool_steps_per_second": None}
    assert 'pip install "sb3-dsrl[envpool]"' in capsys.readouterr().out


def test_envpool(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a scripted pool."""
    pool, made = module("pool"), []

    def make(task: str, num_envs: int, **kwargs: Any) -> gym.vector.VectorEnv:
        assert kwargs == dict(env_type="gymnasium", num_threads=1, seed=0)
        made.append(ScriptedEnvPool([scripted(10) for _ in range(num_envs)]))
        return made[-1]

    fake = ModuleType("envpool")
    fake.make = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "envpool", fake)
    monkeypatch.setattr(pool, "find_spec", lambda name: True)
    monkeypatch.setattr(pool, "N_ENVS", 3)
    monkeypatch.setattr(pool, "ENV_STEPS", 40)
    found = pool.bench_envpool(module("measuring").Args(repeats=1))["envpool_steps_per_second"]
    assert list(found) == ["PandaPickCube-v1", "MetaWorld/Reach-v3"] and len(made) == 6
    for rates in found.values():
        assert list(rates) == ["raw", "chunks", "steered"] and min(rates.values()) > 0


def test_shares_of_stage_2(module: Any, monkeypatch: pytest.MonkeyPatch, flow: FlowPolicy) -> None:
    learning = module("learning")
    monkeypatch.setattr(learning, "make_latent_env", lambda *args, **kwargs: steered(flow))
    found = learning.bench_learning(module("measuring").Args(repeats=1), flow)
    assert list(found["stage2_share"]) == ["simulation", "decode", "update", "rest"]
    assert sum(found["stage2_share"].values()) == pytest.approx(1) and min(found["stage2_share"].values()) > 0


@pytest.mark.parametrize("rates", [None, {"PandaPickCube-v1": {"raw": 21001.0, "chunks": 16002.0, "steered": 11003.0}}])
def test_the_report_is_printed(module: Any, capsys: pytest.CaptureFixture[str], rates: Any) -> None:
    report: dict[str, Any] = {
        "matmul_gflops": 1.0,
        "decode": [{"B": 1}],
        "decode_peer": [{"B": 8, "median": 2.71}],
        "stage1_iteration_speedup": 2.0,
        "stage0_speedup": 1.59,
        "fast": [{"env": "PushCube-v1"}],
        "envs": [{"env": "PushCube-v1", "envs": 4, "env_ratio": 1.23}],
        "stacked_ratio": {"PushCube-v1": 1.97},
        "raw_ceiling": 3.0,
        "image_speedup": 4.0,
        "cores_gain": 5.0,
        "start_s": {"first": 6.5, "later": 0.7},
        "worker_mb": {"rss": 400.0, "pss": 170.0, "uss": 61.0},
        "stage2_share": {"simulation": 0.88},
        "envpool_steps_per_second": rates,
        "us_per_env_step": {"1": 9.0},
        "growth_64_over_8": 0.5,
        "stage1_success": {"prior": 0.4},
        "seconds": 8.0,
    }
    module("report").print_report(module("measuring").Args(), report)
    out = capsys.readouterr().out
    for text in ("1.23", "2.71", "1.97", "1.59 times", "6.5 s", "0.7 s", "rss 400, pss 170, uss 61", "0.88"):
        assert text in out
    assert ("11003" in out or "1.1e+04" in out) == (rates is not None)


def test_stage_0_with_and_without_what_makes_it_quick(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both end with nearly the same held-out loss, and everything is as it was afterwards."""
    stage0 = module("stage0")
    monkeypatch.setattr(stage0, "ITERATIONS", 30)
    size, adamw = activations.MIN_SIZE, th.optim.AdamW
    found = stage0.bench_stage0(module("measuring").Args(repeats=1))
    losses = found["stage0_validation_loss"]
    assert losses["plain"] == pytest.approx(losses["ours"], rel=2e-2) and losses["plain"] != losses["ours"]
    assert found["stage0_speedup"] > 0
    assert (activations.MIN_SIZE, th.optim.AdamW) == (size, adamw)
