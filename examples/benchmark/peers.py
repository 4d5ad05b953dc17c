"""What the package is measured against: the same things in plain code, raw envs, and stock worker processes."""

import multiprocessing
import os
import time

import gymnasium as gym
import torch as th
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from torch.nn import functional as F

from sb3_dsrl.policies.networks import EnsembleChunkCritic, VelocityNet


def plain_decode(net: VelocityNet, cond: th.Tensor, w: th.Tensor, n: int) -> th.Tensor:
    """A loop of full forward passes, the conditioning repeated for each."""
    d = th.full((len(w),), 1.0 / n, device=w.device)
    x = w
    for i in range(n):
        x = x + net(x, d * i, d, cond) / n
    return x.clamp(-1.0, 1.0)


def head_weights(critic: EnsembleChunkCritic) -> list[list[th.Tensor]]:
    """The parameters of each head."""
    return [[p[i] for p in critic.net.parameters()] for i in range(critic.n_heads)]


def plain_ucb(heads: list[list[th.Tensor]], cond: th.Tensor, chunk: th.Tensor, kappa: float) -> th.Tensor:
    """One critic head after the other."""
    q = []
    for head in heads:
        h = th.cat([cond, chunk.flatten(1)], dim=1)
        for weight, bias, scale, shift in zip(head[0:12:4], head[1:12:4], head[2:12:4], head[3:12:4], strict=True):
            h = F.mish(F.layer_norm(h @ weight + bias, bias.shape[-1:]) * scale + shift)
        q.append((h @ head[12] + head[13])[:, 0])
    scores = th.stack(q)
    return scores.mean(dim=0) - kappa * scores.std(dim=0, unbiased=False)


def raw_env(env_id: str, control_mode: str, obs_mode: str = "state") -> gym.Env:
    """A ManiSkill env as a user would make it for SB3."""
    import mani_skill.envs  # noqa: F401  registers the envs
    from mani_skill.utils.wrappers import CPUGymWrapper, FlattenRGBDObservationWrapper

    th.set_num_threads(1)
    env = gym.make(
        env_id,
        obs_mode=obs_mode,
        control_mode=control_mode,
        reward_mode="normalized_dense",
        sim_backend="physx_cpu",
        render_backend="none" if obs_mode == "state" else "cpu",
    )
    return CPUGymWrapper(env if obs_mode == "state" else FlattenRGBDObservationWrapper(env))


def raw_rate(env_id: str, control_mode: str, start: float, seconds: float = 5.0) -> float:
    """Env steps per second of a process that never waits for another one."""
    env = raw_env(env_id, control_mode)
    env.reset(seed=0)
    action = env.action_space.sample()
    while time.time() < start:
        env.step(action)
    steps = 0
    while time.time() < start + seconds:
        env.step(action)
        steps += 1
    return steps / seconds


def raw_ceiling(env_id: str, control_mode: str) -> float:
    """What all cores together simulate when nothing connects them."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("forkserver").Pool(cores) as pool:
        return sum(pool.starmap(raw_rate, [(env_id, control_mode, time.time() + 15.0)] * cores))


def stock_workers(env_id: str, control_mode: str, n_envs: int) -> VecEnv:
    """One stock worker process an env, one message an env step."""
    multiprocessing.set_forkserver_preload(["sb3_dsrl.envs.maniskill"])
    return SubprocVecEnv([lambda: raw_env(env_id, control_mode)] * n_envs, start_method="forkserver")
