"""ManiSkill on the CPU at its own speed, with the shortcuts of envs/fast, several envs together, and the physics alone."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from benchmark.measuring import Args, H, side_by_side
from sb3_dsrl import WorkerSettings, make_chunk_env

CONTROL_MODES = ("pd_joint_delta_pos", "pd_ee_delta_pose")
REWARD_MODES = ("normalized_dense", "sparse")
CHUNKS = 13  # two episodes of most tasks, and their resets
STACK = 4  # envs in one process


def bench_fast(args: Args) -> dict[str, Any]:
    """
    One env in this process, chunks of H random actions, resets included: env steps per second of ManiSkill's own stepping,
    of the fast one, and of one that would cost nothing but physics. Each ratio is the median over repeats in which they take
    turns. ``stacked_ratio`` is of ``STACK`` envs in one worker process, which are evaluated together.
    """
    rows = [
        _compare(args, env_id, control_mode, reward_mode)
        for env_id in args.fast_tasks
        for control_mode in CONTROL_MODES
        for reward_mode in REWARD_MODES
    ]

    def ratios(key: str, reward_mode: str) -> dict[str, float]:
        chosen = [row for row in rows if (row["control"], row["reward"]) == (CONTROL_MODES[0], reward_mode)]
        return {row["env"]: row[key] for row in chosen}

    return {
        "fast_ratio": ratios("fast_ratio", "normalized_dense"),
        "fast_ratio_sparse": ratios("fast_ratio", "sparse"),
        "physics_ratio": ratios("physics_ratio", "normalized_dense"),
        "stacked_ratio": {env_id: _stacked_ratio(args, env_id) for env_id in args.fast_tasks},
        "fast": rows,
    }


def _stacked_ratio(args: Args, env_id: str) -> float:
    def stepper(fast: bool) -> tuple[VecEnv, Callable[[], None]]:
        kwargs: dict[str, Any] = dict(control_mode=CONTROL_MODES[0], workers=WorkerSettings(1))
        env = make_chunk_env(env_id, STACK, act_horizon=H, fast=fast, **kwargs)
        chunks = random_chunks(env)

        def play() -> None:
            env.seed(0)
            env.reset()
            for chunk in chunks:
                env.step(chunk)

        return env, play

    (plain, play_plain), (stacked, play_stacked) = stepper(False), stepper(True)
    timed = side_by_side({"plain": play_plain, "stacked": play_stacked}, args.repeats)
    plain.close()
    stacked.close()
    print({"env": env_id, "envs": STACK, "stacked_ratio": round(timed["plain"] / timed["stacked"], 2)}, flush=True)
    return timed["plain"] / timed["stacked"]


def random_chunks(env: VecEnv) -> np.ndarray:
    """Actions for ``CHUNKS`` macro-steps, (CHUNKS, N, H, A)."""
    shape = (CHUNKS, env.num_envs, *(env.action_space.shape or ()))
    return np.random.default_rng(0).normal(0, 0.3, shape).clip(-1, 1).astype(np.float32)


class _Stepper:
    """Steps one chunk env through the same actions again and again."""

    def __init__(self, env_id: str, fast: bool, **kwargs: Any) -> None:
        env = make_chunk_env(env_id, act_horizon=H, fast=fast, **kwargs)
        assert isinstance(env, DummyVecEnv)
        self.env = env
        self._chunks = random_chunks(env)
        self._scene: Any = None
        self._physics = 0.0

    def seconds(self) -> tuple[float, float]:
        """Of all chunks, and of these the seconds in which physics ran."""
        self.env.seed(0)
        self.env.reset()
        base: Any = self.env.envs[0].unwrapped
        self._physics = 0.0
        start = time.perf_counter()
        for chunk in self._chunks:
            if base.scene is not self._scene:  # built anew by a reset
                self._scene = base.scene
                base.scene.step = self._physics_step
            self.env.step(chunk)
        return time.perf_counter() - start, self._physics

    def _physics_step(self) -> None:
        start = time.perf_counter()
        self._scene.px.step()
        self._physics += time.perf_counter() - start


def _compare(args: Args, env_id: str, control_mode: str, reward_mode: str) -> dict[str, Any]:
    plain, fast = (_Stepper(env_id, own, control_mode=control_mode, reward_mode=reward_mode) for own in (False, True))
    plain.seconds()  # warms up
    fast.seconds()
    times = np.array([(plain.seconds()[0], *fast.seconds()) for _ in range(args.repeats)])
    plain.env.close()
    fast.env.close()
    ratio, physics = times[:, 0] / times[:, 1], times[:, 0] / times[:, 2]
    per_second = CHUNKS * H / np.median(times, axis=0)
    row = {
        "env": env_id,
        "control": control_mode,
        "reward": reward_mode,
        "plain": per_second[0],
        "fast": per_second[1],
        "physics": per_second[2],
        "fast_ratio": float(np.median(ratio)),
        "low": float(ratio.min()),
        "high": float(ratio.max()),
        "physics_ratio": float(np.median(physics)),
    }
    print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row
