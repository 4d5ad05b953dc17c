"""Steered envs against stock worker processes with raw envs, task by task."""

import time
from typing import Any

import numpy as np
import psutil
from stable_baselines3.common.vec_env import VecEnv

from benchmark.fast import CONTROL_MODES
from benchmark.measuring import Args, H
from benchmark.peers import stock_workers
from sb3_dsrl import FlowPolicy, VelocityMLP, make_chunk_env, make_latent_env

CONTROL_MODE = CONTROL_MODES[0]
SIZES = (4, 8)
ENV_STEPS = 112  # of each env and repeat: two episodes of most tasks, and as many resets with chunks as without


def small_flow(obs_dim: int, action_dim: int) -> FlowPolicy:
    """
    An untrained MLP flow with the default H: how fast it decodes does not depend on what it has learned.

    :param obs_dim: D
    :param action_dim: A
    """
    sizes: dict[str, Any] = dict(obs_horizon=2, pred_horizon=H, act_horizon=H, num_steps=4, net_class=VelocityMLP)
    return FlowPolicy.create(obs_dim, action_dim, control_mode=CONTROL_MODE, **sizes).freeze()


def flow_for(env_id: str) -> FlowPolicy:
    """A small flow whose observations and actions are a task's."""
    env = make_chunk_env(env_id, control_mode=CONTROL_MODE)
    assert env.observation_space.shape and env.action_space.shape
    flow = small_flow(env.observation_space.shape[-1], env.action_space.shape[-1])
    env.close()
    return flow


def bench_envs(args: Args) -> dict[str, Any]:
    """
    Part c: env steps per second of ``make_latent_env`` with prior noise, in one worker a core, and of ``SubprocVecEnv`` on raw
    ManiSkill envs with random actions, in one process an env. Same task, controller and reward, as many env steps, resets
    included. Each ratio is the median over repeats in which they take turns. ``work_ratio`` is that of the seconds of all
    cores: other jobs on the machine take more from few processes than from many, but change nothing in this one.
    """
    rows = [_compare(args, env_id, n_envs) for env_id in args.fast_tasks for n_envs in SIZES]
    ratios: dict[str, dict[str, float]] = {env_id: {} for env_id in args.fast_tasks}
    for row in rows:
        ratios[row["env"]][str(row["envs"])] = row["env_ratio"]
    return {"env_ratio": ratios, "envs": rows}


def played(env: VecEnv, actions: np.ndarray) -> tuple[float, float, int]:
    """
    A reset, and some actions.

    :param env: N envs
    :param actions: (steps, N, ...)
    :return: seconds, seconds of work of all cores, number of resets
    """
    start, work = time.perf_counter(), cpu_seconds()
    env.reset()
    resets = env.num_envs + sum(int(env.step(action)[2].sum()) for action in actions)
    return time.perf_counter() - start, cpu_seconds() - work, resets


def cpu_seconds() -> float:
    """What this process and its children have worked so far; those that wait for others add nothing."""
    main = psutil.Process()
    spent = [process.cpu_times() for process in (main, *main.children(recursive=True))]
    return sum(own.user + own.system for own in spent)


def _compare(args: Args, env_id: str, n_envs: int) -> dict[str, Any]:
    flow = flow_for(env_id)
    rng = np.random.default_rng(0)
    raw = rng.uniform(-1, 1, (ENV_STEPS, n_envs, flow.action_dim)).astype(np.float32)
    noise = rng.standard_normal((ENV_STEPS // flow.act_horizon, n_envs, *flow.noise_shape)).astype(np.float32)
    stock = stock_workers(env_id, CONTROL_MODE, n_envs)
    steered = make_latent_env(env_id, flow, n_envs)
    played(stock, raw[: flow.act_horizon])  # warms up
    played(steered, noise[:1])
    repeats = np.array([(played(stock, raw), played(steered, noise)) for _ in range(args.repeats)])
    stock.close()
    steered.close()
    ratios, work_ratios = (repeats[:, 0, i] / repeats[:, 1, i] for i in (0, 1))
    row: dict[str, Any] = {"env": env_id, "envs": n_envs}
    for i, name in enumerate(("stock", "steered")):
        row[name] = float(ENV_STEPS * n_envs / np.median(repeats[:, i, 0]))
        row[f"{name}_resets"] = float(repeats[:, i, 2].mean())
    row |= {"env_ratio": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
    row["work_ratio"] = float(np.median(work_ratios))
    print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row
