"""Steered envs against raw ones: worker processes, images, batched simulators."""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch as th

from benchmark.measuring import A, Args, side_by_side
from benchmark.peers import raw_env
from sb3_dsrl import ActionChunkWrapper, FlowPolicy, VecLatentSteering, WorkerSettings, make_latent_env
from sb3_dsrl.steering.batched import BatchedChunkEnv


def bench_workers(args: Args, flow: FlowPolicy, env_steps: int = 800) -> dict[str, Any]:
    """
    Part c: what workers gain and cost. Seconds until the first observations of 8 envs, from the first workers of this process,
    whose server imports torch and ManiSkill, and from later ones; MB of a worker, the whole of it and without what it shares.
    """
    start_s: dict[str, float] = {}
    envs = {}
    for when, name, workers in (("first", "one", WorkerSettings(1)), ("later", "all", None)):
        start = time.perf_counter()
        envs[name] = make_latent_env(args.env_id, flow, 8, workers=workers)
        envs[name].reset()
        start_s[when] = time.perf_counter() - start
    noises = np.zeros((env_steps // 8 // flow.act_horizon, 8, *flow.noise_shape), np.float32)
    parts: dict[str, Callable[[], Any]] = {name: partial(_steps, env, noises) for name, env in envs.items()}
    timed = side_by_side(parts, args.repeats)
    envs["one"].close()
    memory = [psutil.Process(child.pid).memory_full_info() for child in multiprocessing.active_children()]
    envs["all"].close()
    return {
        "cores_gain": timed["one"] / timed["all"],
        "start_s": start_s,
        "worker_mb": {kind: max(getattr(own, kind) for own in memory) / 2**20 for kind in ("rss", "pss", "uss")},
    }


def _steps(env: VecLatentSteering, noises: np.ndarray) -> None:
    for w in noises:
        env.step(w)


def bench_images(args: Args, flow: FlowPolicy, act_horizon: int = 8) -> dict[str, Any]:
    """A chunk env with images, which renders what is seen, against the same env with every frame rendered."""
    assert flow.control_mode is not None
    every = raw_env(args.env_id, flow.control_mode, "rgb")
    bare = gym.make(args.env_id, obs_mode="rgb", control_mode=flow.control_mode, sim_backend="physx_cpu", render_backend="cpu")
    seen = ActionChunkWrapper(bare, act_horizon, ignore_terminations=True)
    chunk = np.zeros((act_horizon, flow.action_dim), np.float32)
    every.reset(seed=0)
    seen.reset(seed=0)
    parts: dict[str, Callable[[], Any]] = {
        "every": lambda: [every.step(action) for _ in range(5) for action in chunk],
        "seen": lambda: [seen.step(chunk) for _ in range(5)],
    }
    timed = side_by_side(parts, args.repeats)
    every.close()
    seen.close()
    return {"image_speedup": timed["every"] / timed["seen"]}


class BatchedToy(gym.Env):
    """A batched simulator in a few tensor operations, whose cost per env step is nearly nothing: what remains is ours."""

    def __init__(self, n_envs: int, device: str) -> None:
        self.num_envs, self.device = n_envs, th.device(device)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (35,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (A,), np.float32)
        self._state = th.zeros(n_envs, 35, device=device)
        self._t = th.zeros(n_envs, device=device)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[th.Tensor, dict[str, Any]]:
        """All envs, or a part."""
        index = (options or {}).get("env_idx", slice(None))
        self._state[index], self._t[index] = 0.0, 0.0
        return self._state, {}

    def step(self, action: th.Tensor) -> tuple[Any, ...]:
        """Moves the state by the action."""
        self._state[:, :A] += 0.1 * action
        self._t += 1
        success = self._state[:, 0] > 1
        return self._state, -self._state[:, 0].abs(), success, self._t >= 50, {"success": success}


def bench_growth(args: Args, flow: FlowPolicy) -> dict[str, Any]:
    """Part e: cost per env step as the number of batched envs grows."""
    parts: dict[str, Callable[[], Any]] = {}
    cost = {}
    sizes = (1, 2, 4, 8, 16, 32, 64)
    for n in sizes:
        chunks = BatchedChunkEnv(BatchedToy(n, args.device), flow.act_horizon, flow.obs_horizon)
        env = VecLatentSteering(chunks, flow)
        env.reset()
        w = np.zeros((n, *flow.noise_shape), np.float32)
        parts[str(n)] = lambda env=env, w=w: [env.step(w) for _ in range(20)]  # type: ignore[misc]
    for name, seconds in side_by_side(parts, args.repeats, args.device).items():
        cost[name] = 1e6 * seconds / (20 * int(name) * flow.act_horizon)
    return {"us_per_env_step": cost, "growth_64_over_8": cost["64"] / cost["8"]}


def bench_cuda(args: Args, flow: FlowPolicy) -> dict[str, Any]:
    """Part e on a GPU simulator: latent env steps per second over raw ManiSkill env steps per second."""
    import mani_skill.envs  # noqa: F401  registers the envs

    result = {}
    for n in args.cuda_envs:
        raw = gym.make(
            args.env_id,
            num_envs=n,
            obs_mode="state",
            control_mode=flow.control_mode,
            reward_mode="normalized_dense",
            sim_backend="physx_cuda",
        )
        raw.reset(seed=0)
        action = th.zeros(n, flow.action_dim, device="cuda")
        latent = make_latent_env(args.env_id, flow, n, sim_backend="physx_cuda")
        latent.reset()
        w = np.zeros((n, *flow.noise_shape), np.float32)
        timed = side_by_side(
            {
                "raw": lambda env=raw, a=action: [env.step(a) for _ in range(10 * flow.act_horizon)],  # type: ignore[misc]
                "latent": lambda env=latent, w=w: [env.step(w) for _ in range(10)],  # type: ignore[misc]
            },
            args.repeats,
            "cuda",
        )
        result[str(n)] = timed["raw"] / timed["latent"]
        raw.close()
        latent.close()
    return {"cuda_env_ratio": result}
