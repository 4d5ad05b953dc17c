"""Steered envs from an env id or a callable, wherever it comes from."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.envs import gym_envs
from sb3_dsrl.envs.gym_envs import EnvMaker
from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.steering.contract import SteerMode
from sb3_dsrl.steering.latent_env import LatentSteeringWrapper
from sb3_dsrl.steering.observing import ObsKind
from sb3_dsrl.steering.vec_env import VecLatentSteering


def make_latent_env(
    env_id: str | EnvMaker,
    flow: FlowLike,
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
    obs: ObsKind = "features",
    **chunk_env_kwargs: Any,
) -> VecLatentSteering:
    """
    Many steered envs, ready for SB3.

    :param env_id: an id of ManiSkill or of gymnasium, or a class or function that returns a gymnasium env
    :param flow: the policy that is steered, or its folder; it is frozen
    :param n_envs: N
    :param obs_mode: of ManiSkill envs only: observation mode; None is the flow's
    :param control_mode: of ManiSkill envs only: controller; None is the flow's
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
    :param obs: what is seen: "features" of the flow, the "env"'s frames, or "both" as a dict
    :param chunk_env_kwargs: further arguments of :func:`make_chunk_env`: for any env ``max_episode_steps``,
        ``ignore_terminations``, ``workers`` and ``starts`` (:class:`~sb3_dsrl.DemoStarts`); for ManiSkill ``sim_backend``,
        ``reward_mode`` and what ``gym.make`` takes; for others ``env_kwargs``, ``wrapper_class``, ``wrapper_kwargs``,
        ``success_key`` and ``cut_at_time_limit``. ``gamma`` and ``reward_scale`` are the flow's if not given.
    :return: the vectorised env; ``macro_gamma`` is the discount for PPO
    :raises ValueError: if an argument does not fit
    """
    flow = resolve_flow(flow)
    flow = flow if act_horizon is None else flow.with_act_horizon(act_horizon)
    kwargs: dict[str, Any] = dict(gamma=flow.gamma, reward_scale=flow.reward_scale) | chunk_env_kwargs
    modes = dict(obs_mode=obs_mode, control_mode=control_mode)
    kwargs |= {name: mode for name, mode in modes.items() if mode is not None}
    if is_maniskill(env_id):
        kwargs = dict(obs_mode=flow.obs_mode, control_mode=flow.control_mode) | kwargs
    venv = make_chunk_env(env_id, n_envs, act_horizon=flow.act_horizon, obs_horizon=flow.obs_horizon, **kwargs)
    try:
        latent = VecLatentSteering(venv, flow, noise_bound, steer_mode, num_steps, allow_other_task, residual_scale, obs)
    except BaseException:
        venv.close()
        raise
    if seed is not None:
        latent.seed(seed)
    return latent


def make_chunk_env(env_id: str | EnvMaker, n_envs: int = 1, **kwargs: Any) -> VecEnv:
    """
    Many envs whose actions are chunks of raw actions: what :func:`make_latent_env` steers, and with the default horizons what
    a baseline without a flow learns in.

    :param env_id: an id of ManiSkill or of gymnasium, or a class or function that returns a gymnasium env
    :param n_envs: N
    :param kwargs: arguments of :func:`sb3_dsrl.envs.maniskill.make_chunk_env` for an id of ManiSkill, of
        :func:`sb3_dsrl.envs.gym_envs.make_chunk_env` for everything else
    :return: the vectorised env; actions are (H, A), observations (obs_horizon, D), or dicts of such
    :raises ValueError: if an argument does not fit
    """
    if is_maniskill(env_id):
        from sb3_dsrl.envs import maniskill  # importing sb3_dsrl must not import ManiSkill

        _refuse(sorted(kwargs.keys() & (_parameters(gym_envs) - _parameters(maniskill))), env_id, "ManiSkill's", _MANISKILL)
        return maniskill.make_chunk_env(str(env_id), n_envs, **kwargs)
    _refuse(sorted(kwargs.keys() - _parameters(gym_envs)), env_id, "not ManiSkill's", _GYMNASIUM)
    return gym_envs.make_chunk_env(env_id, n_envs, **kwargs)


def make_steered_env(
    env_id: str | EnvMaker,
    flow: FlowLike,
    *,
    render_mode: str | None = None,
    success_key: str | None = None,
    wrapper_class: Callable[..., gym.Env] | None = None,
    wrapper_kwargs: Mapping[str, Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    **steering: Any,
) -> LatentSteeringWrapper:
    """
    One steered env: what ``gym.make("sb3_dsrl/Latent-v0", env_id=..., flow=...)`` makes.

    :param env_id: an id of ManiSkill or of gymnasium, or a class or function that returns a gymnasium env
    :param flow: the policy that is steered, or its folder
    :param render_mode: of the env
    :param success_key: see :class:`~sb3_dsrl.envs.gym_envs.SuccessKey`
    :param wrapper_class: wrapper, or function of one env, around the env and below the chunks
    :param wrapper_kwargs: its arguments
    :param env_kwargs: arguments of the env, such as ``max_episode_steps`` in env steps: that of ``gym.make`` itself would
        count macro-steps
    :param steering: further arguments of :class:`~sb3_dsrl.LatentSteeringWrapper`
    :return: the steered env
    :raises ValueError: if an argument does not fit
    """
    flow = resolve_flow(flow)
    kwargs = dict(env_kwargs or {}) | ({} if render_mode is None else dict(render_mode=render_mode))
    if is_maniskill(env_id):
        from sb3_dsrl.envs import maniskill  # importing sb3_dsrl must not import ManiSkill

        modes = dict(obs_mode=flow.obs_mode) | ({} if flow.control_mode is None else dict(control_mode=flow.control_mode))
        kwargs = maniskill.maniskill_kwargs(str(env_id), **(modes | kwargs))
    limit = kwargs.pop("max_episode_steps", None)
    make = gym_envs.env_maker(
        env_id,
        max_episode_steps=limit,
        success_key=success_key,
        wrapper_class=wrapper_class,
        wrapper_kwargs=wrapper_kwargs,
        env_kwargs=kwargs,
    )
    return LatentSteeringWrapper(make(), flow, **steering)


def is_maniskill(env_id: str | EnvMaker) -> bool:
    """
    Whether ManiSkill makes an env. An id that nobody has registered is left to ManiSkill, which is not yet imported, or knows
    what to say.

    :param env_id: an id, or a callable
    """
    if not isinstance(env_id, str) or ":" in env_id:
        return False
    if env_id not in gym.registry:
        return find_spec("mani_skill") is not None
    registration = sys.modules.get("mani_skill.utils.registration")
    return registration is not None and env_id in registration.REGISTERED_ENVS


_MANISKILL = "such an env takes the arguments of gym.make directly, says of success itself and runs on past time limits"
_GYMNASIUM = "arguments of its constructor go into env_kwargs=dict(...)"


def _refuse(names: list[str], env_id: Any, whose: str, advice: str) -> None:
    if names:
        name = env_id if isinstance(env_id, str) else getattr(env_id, "__name__", type(env_id).__name__)
        raise ValueError(f"{name!r} is {whose}, and does not know {', '.join(names)}; {advice}")


def _parameters(module: Any) -> set[str]:
    """Named arguments of the ``make_chunk_env`` of a module, and of what its further ones are passed on to."""
    functions = [module.make_chunk_env, *([module.env_maker] if hasattr(module, "env_maker") else [])]
    parameters = [parameter for function in functions for parameter in inspect.signature(function).parameters.values()]
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
