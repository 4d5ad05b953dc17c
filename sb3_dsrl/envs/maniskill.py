"""ManiSkill's envs from an env id, as chunk envs."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import torch as th
from mani_skill.utils.registration import REGISTERED_ENVS
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.envs.fast import wants_fast
from sb3_dsrl.envs.maniskill_wrappers import flat_images, unbatched
from sb3_dsrl.envs.worker_vec_env import spread_envs
from sb3_dsrl.envs.workers import WorkerSettings
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.chunk_env import ActionChunkWrapper
from sb3_dsrl.steering.starts import RecordedStarts

SimBackend = Literal["physx_cpu", "physx_cuda", "cpu", "gpu"]

#: ManiSkill's short names.
SIM_BACKENDS = {"physx_cpu": "physx_cpu", "physx_cuda": "physx_cuda", "cpu": "physx_cpu", "gpu": "physx_cuda"}


def make_chunk_env(
    env_id: str,
    n_envs: int = 1,
    *,
    act_horizon: int = 1,
    obs_horizon: int = 1,
    sim_backend: SimBackend = "physx_cpu",
    obs_mode: str = "state",
    control_mode: str | None = None,
    reward_mode: str = "normalized_dense",
    max_episode_steps: int | None = None,
    ignore_terminations: bool | None = None,
    gamma: float = 0.99,
    reward_scale: float = 1.0,
    workers: WorkerSettings | None = None,
    fast: bool = True,
    starts: RecordedStarts | None = None,
    **env_kwargs: Any,
) -> VecEnv:
    """
    Many ManiSkill envs whose actions are chunks: what :func:`sb3_dsrl.make_chunk_env` makes of an id of ManiSkill.

    On the CPU one env runs in this process; several run in worker processes, as many as there are cores, or on a Ray
    cluster. On a GPU one batched simulator runs them all in this process. The number of envs decides nothing about the
    physics: CPU and GPU simulate differently, and demos, evaluations and videos should see the same. Images are rendered on
    the GPU where there is one.

    :param env_id: ManiSkill environment
    :param n_envs: N
    :param act_horizon: H, env steps in a chunk
    :param obs_horizon: frames in an observation
    :param sim_backend: "physx_cpu" or "physx_cuda"; ManiSkill's short names "cpu" and "gpu" are the same
    :param obs_mode: ManiSkill observation mode
    :param control_mode: ManiSkill controller; None is the task's own
    :param reward_mode: ManiSkill reward mode
    :param max_episode_steps: time limit in env steps; None is the registered one
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit; None is
        :func:`~sb3_dsrl.steering.contract.ignores_terminations`: yes with a dense reward, no with a sparse one
    :param gamma: discount per env step
    :param reward_scale: factor on the macro reward
    :param workers: on the CPU: how the envs are spread over workers, and what happens when one fails; None is the default of
        :class:`~sb3_dsrl.WorkerSettings`, and no worker for one env
    :param fast: on the CPU: step ManiSkill by the shortcuts of :mod:`sb3_dsrl.envs.fast`, which change no bit of the results;
        the environment variable ``SB3_DSRL_FAST=0`` switches them off everywhere
    :param starts: on the CPU: recorded episodes to start from, see :class:`~sb3_dsrl.DemoStarts`
    :param env_kwargs: further arguments of ``gym.make``
    :return: the vectorised env; actions are (H, A), observations (obs_horizon, D), or dicts of such
    :raises ValueError: if an argument does not fit
    """
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, found {n_envs}")
    if SIM_BACKENDS.get(sim_backend) == "physx_cuda" and workers is not None:
        raise ValueError("workers are for sim_backend='physx_cpu'; on a GPU one simulator in this process runs all envs")
    if SIM_BACKENDS.get(sim_backend) == "physx_cuda" and starts is not None:
        raise ValueError(
            "starts are for sim_backend='physx_cpu': the envs of one batched simulator step together, so that none of them "
            "can replay a piece of a demo by itself"
        )
    given: dict[str, Any] = dict(control_mode=control_mode, max_episode_steps=max_episode_steps)
    given = {key: value for key, value in given.items() if value is not None}
    env_kwargs = maniskill_kwargs(env_id, obs_mode, reward_mode=reward_mode, sim_backend=sim_backend, **given, **env_kwargs)
    chunk_kwargs: dict[str, Any] = dict(
        act_horizon=act_horizon,
        obs_horizon=obs_horizon,
        gamma=gamma,
        ignore_terminations=ignore_terminations,
        reward_scale=reward_scale,
    )

    def make() -> gym.Env:
        return ActionChunkWrapper(unbatched(_made(env_id, **env_kwargs), fast), **chunk_kwargs, starts=starts)

    if env_kwargs["sim_backend"] == "physx_cuda":
        return BatchedChunkEnv(flat_images(_made(env_id, num_envs=n_envs, **env_kwargs)), **chunk_kwargs)
    fast = fast and wants_fast()  # this process's settings, not those of a worker elsewhere
    return spread_envs(make, n_envs, workers, hide_gpu=env_kwargs["render_backend"] in ("none", "cpu", "sapien_cpu"))


def _made(env_id: str, **env_kwargs: Any) -> gym.Env:
    try:
        return gym.make(env_id, **env_kwargs)
    except (AssertionError, NotImplementedError, TypeError, KeyError) as error:  # ManiSkill's, for modes that it does not know
        raise ValueError(f"{env_id} cannot be made as asked for: {error}") from error


def maniskill_kwargs(env_id: str, obs_mode: str, **env_kwargs: Any) -> dict[str, Any]:
    """
    Arguments of ``gym.make``, with a renderer only where something is seen: on the GPU if there is one.

    :param env_id: ManiSkill environment
    :param obs_mode: ManiSkill observation mode
    :param env_kwargs: further arguments
    :raises ValueError: if there is no such environment or simulator
    """
    if env_id not in REGISTERED_ENVS:
        raise ValueError(f"{env_id!r} is not a ManiSkill environment{_advice(env_id)}")
    kwargs = dict(obs_mode=obs_mode, sim_backend="physx_cpu") | env_kwargs
    if kwargs["sim_backend"] not in SIM_BACKENDS:
        raise ValueError(
            f"sim_backend must be 'physx_cpu' (or 'cpu') or 'physx_cuda' (or 'gpu'), found {kwargs['sim_backend']!r}"
        )
    kwargs["sim_backend"] = SIM_BACKENDS[kwargs["sim_backend"]]
    sees = obs_mode not in ("state", "state_dict", "none") or kwargs.get("render_mode") is not None
    on_gpu = kwargs["sim_backend"] == "physx_cuda" or (sees and th.cuda.is_available())
    return dict(render_backend="gpu" if on_gpu else "cpu" if sees else "none") | kwargs


def _advice(env_id: str) -> str:
    if env_id in gym.registry:
        return ", but gymnasium's"
    close = difflib.get_close_matches(env_id, gym.registry, n=3)  # ManiSkill's are among them
    meant = f"; did you mean {' or '.join(close)}? Ids" if close else "; ids"
    return f"{meant} of other packages are known once those are imported"
