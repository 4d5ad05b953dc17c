"""ManiSkill's envs from an env id: chunk envs and steered envs."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import torch as th
from mani_skill.utils.registration import REGISTERED_ENVS
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl.envs.fast import wants_fast
from sb3_dsrl.envs.maniskill_wrappers import flat_images, unbatched
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import WorkerError, WorkerSettings
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.chunk_env import ActionChunkWrapper
from sb3_dsrl.steering.contract import SteerMode
from sb3_dsrl.steering.steering import check_flow
from sb3_dsrl.steering.vec_env import VecLatentSteering

SimBackend = Literal["physx_cpu", "physx_cuda", "cpu", "gpu"]

#: ManiSkill's short names.
SIM_BACKENDS = {"physx_cpu": "physx_cpu", "physx_cuda": "physx_cuda", "cpu": "physx_cpu", "gpu": "physx_cuda"}


def make_latent_env(
    env_id: str,
    flow: SteerablePolicy,
    n_envs: int = 1,
    *,
    obs_mode: str | None = None,
    control_mode: str | None = None,
    act_horizon: int | None = None,
    noise_bound: float = 4.0,
    steer_mode: SteerMode = "full",
    num_steps: int | None = None,
    allow_other_task: bool = False,
    residual_scale: float | None = None,
    seed: int | None = None,
    **chunk_env_kwargs: Any,
) -> VecLatentSteering:
    """
    Many steered ManiSkill envs, ready for SB3.

    :param env_id: ManiSkill environment
    :param flow: the policy that is steered; it is frozen
    :param n_envs: N
    :param obs_mode: ManiSkill observation mode; None is the flow's
    :param control_mode: ManiSkill controller; None is the flow's
    :param act_horizon: H; None is the flow's own. With another H, ``env.steering.flow`` is what rollouts and stage 1 need, see
        :meth:`SteerablePolicy.with_act_horizon <sb3_dsrl.policies.base.SteerablePolicy.with_act_horizon>`.
    :param noise_bound: the action space is ``Box(-noise_bound, noise_bound, (T, A))``
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry, which is repeated T times
    :param num_steps: decoding steps; None is the flow's own
    :param allow_other_task: accept another task than the one that the flow was trained on
    :param residual_scale: RL also decides a residual chunk, which is added with this factor, see
        :class:`~sb3_dsrl.VecLatentSteering`; None or 0 steers the noise alone
    :param seed: env i is seeded with ``seed + i`` at its first reset
    :param chunk_env_kwargs: further arguments of :func:`make_chunk_env`, such as ``sim_backend``, ``reward_mode``,
        ``max_episode_steps``, ``ignore_terminations`` and ``workers``; ``gamma`` and ``reward_scale`` are the flow's if not
        given
    :return: the vectorised env; ``macro_gamma`` is the discount for PPO
    :raises ValueError: if an argument does not fit
    """
    check_flow(flow)
    flow = flow if act_horizon is None else flow.with_act_horizon(act_horizon)
    venv = make_chunk_env(
        env_id,
        n_envs,
        act_horizon=flow.act_horizon,
        obs_horizon=flow.obs_horizon,
        obs_mode=obs_mode or flow.obs_mode,
        control_mode=control_mode or flow.control_mode,
        **(dict(gamma=flow.gamma, reward_scale=flow.reward_scale) | chunk_env_kwargs),
    )
    try:
        latent = VecLatentSteering(venv, flow, noise_bound, steer_mode, num_steps, allow_other_task, residual_scale)
    except BaseException:
        venv.close()
        raise
    if seed is not None:
        latent.seed(seed)
    return latent


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
    **env_kwargs: Any,
) -> VecEnv:
    """
    Many ManiSkill envs whose actions are chunks of raw actions: what :func:`make_latent_env` steers, and with the default
    horizons what a baseline without a flow learns in.

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
    :param env_kwargs: further arguments of ``gym.make``
    :return: the vectorised env; actions are (H, A), observations (obs_horizon, D), or dicts of such
    :raises ValueError: if an argument does not fit
    """
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, found {n_envs}")
    if SIM_BACKENDS.get(sim_backend) == "physx_cuda" and workers is not None:
        raise ValueError("workers are for sim_backend='physx_cpu'; on a GPU one simulator in this process runs all envs")
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
        return ActionChunkWrapper(unbatched(_made(env_id, **env_kwargs), fast), **chunk_kwargs)

    if env_kwargs["sim_backend"] == "physx_cuda":
        return BatchedChunkEnv(flat_images(_made(env_id, num_envs=n_envs, **env_kwargs)), **chunk_kwargs)
    fast = fast and wants_fast()  # this process's settings, not those of a worker elsewhere
    if n_envs == 1 and workers is None:
        return DummyVecEnv([make])
    try:
        return WorkerVecEnv([make] * n_envs, workers, hide_gpu=env_kwargs["render_backend"] in ("none", "cpu", "sapien_cpu"))
    except WorkerError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # as it is with one env in this process
        raise


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
        made = f"LatentSteeringWrapper(gym.make({env_id!r}), flow)"
        return f", but gymnasium's; for those use stable_baselines3's make_vec_env(lambda: {made}, n_envs=...)"
    close = difflib.get_close_matches(env_id, REGISTERED_ENVS, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
