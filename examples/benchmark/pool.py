"""EnvPool's robot arms: raw, in chunks, and steered."""

import time
from importlib.util import find_spec
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from benchmark.envs import small_flow
from benchmark.measuring import Args
from sb3_dsrl import VecLatentSteering
from sb3_dsrl.steering.batched import BatchedChunkEnv

TASKS = ("PandaPickCube-v1", "MetaWorld/Reach-v3")
N_ENVS = 16
ENV_STEPS = 600  # of each env and repeat: four episodes of the first task, one of the second


def bench_envpool(args: Args) -> dict[str, Any]:
    """
    Env steps per second of 16 envs on one core: EnvPool with random actions, the same in chunks, and steered by a small flow
    with prior noise. Resets included; medians of repeats in which they take turns.
    """
    if find_spec("envpool") is None:
        print('EnvPool is not installed, so it is not measured: pip install "sb3-dsrl[envpool]" (Python 3.11 or later)')
        return {"envpool_steps_per_second": None}
    return {"envpool_steps_per_second": {task: _rates(args, task) for task in TASKS}}


def raw_rate(pool: Any, actions: np.ndarray) -> float:
    """
    Env steps per second of EnvPool itself. The step after an episode's end is the reset and counts as none.

    :param pool: N envs
    :param actions: (steps, N, A)
    """
    start, steps = time.perf_counter(), 0
    pool.reset()
    ended = np.zeros(pool.num_envs, bool)
    for action in actions:
        steps += int((~ended).sum())
        ended = np.logical_or(*pool.step(action)[2:4])
    return steps / (time.perf_counter() - start)


def chunk_rate(env: VecEnv, actions: np.ndarray) -> float:
    """
    Env steps per second of envs whose step is a chunk, where an episode's end may cut it.

    :param env: N envs
    :param actions: (macro-steps, N, ...)
    """
    start = time.perf_counter()
    env.reset()
    steps = sum(info["chunk_length"] for action in actions for info in env.step(action)[3])
    return steps / (time.perf_counter() - start)


def _rates(args: Args, task: str) -> dict[str, float]:
    import envpool

    raw, *below = (envpool.make(task, env_type="gymnasium", num_envs=N_ENVS, num_threads=1, seed=0) for _ in range(3))
    space = raw.single_action_space
    flow = small_flow(raw.single_observation_space.shape[0], space.shape[0])
    chunks, under_flow = (BatchedChunkEnv(pool, flow.act_horizon, flow.obs_horizon) for pool in below)
    steered = VecLatentSteering(under_flow, flow)
    n, rng = ENV_STEPS // flow.act_horizon, np.random.default_rng(0)
    raw_actions = rng.uniform(space.low, space.high, (ENV_STEPS, N_ENVS, *space.shape)).astype(space.dtype)
    chunk_actions = rng.uniform(-1, 1, (n, N_ENVS, *chunks.action_space.shape)).astype(np.float32)  # type: ignore[misc]
    noise = rng.standard_normal((n, N_ENVS, *flow.noise_shape)).astype(np.float32)
    repeats = [
        {
            "raw": raw_rate(raw, raw_actions),
            "chunks": chunk_rate(chunks, chunk_actions),
            "steered": chunk_rate(steered, noise),
        }
        for _ in range(args.repeats + 1)
    ][1:]  # the first round warms up
    for env in (raw, chunks, steered):
        env.close()
    rates = {name: float(np.median([own[name] for own in repeats])) for name in repeats[0]}
    print(f"EnvPool's {task}:", {name: round(rate) for name, rate in rates.items()}, "env steps/s", flush=True)
    return rates
