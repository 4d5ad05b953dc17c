"""The method's settings for LatentSAC on a steered env."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.stage2.latent_critics import CriticKind, CriticName
from sb3_dsrl.stage2.settings import policy_defaults
from sb3_dsrl.steering.vec_env import find_steering

#: Critic updates for each macro-step of one env.
UPDATES_PER_STEP = 4


def sac_kwargs(env: gym.Env | VecEnv, critic: CriticName | CriticKind = "action", **overrides: Any) -> dict[str, Any]:
    """
    Keyword arguments of ``LatentSAC("LatentPolicy", env, ...)``: the method's settings, with the env's own macro-step discount
    and updates in proportion to its number of envs.

    The start is narrow, as with :func:`~sb3_dsrl.ppo_kwargs`; alpha is fixed and the entropy is no part of the value, since an
    automatic alpha can run away under a discount near 1.

    :param env: steered env, gym or vectorised
    :param critic: of :class:`~sb3_dsrl.LatentSAC`
    :param overrides: explicit keywords; they win, and ``policy_kwargs`` are merged
    :return: the keyword arguments
    :raises ValueError: if the env is not steered
    """
    contract = find_steering(env).contract
    n_envs = env.num_envs if isinstance(env, VecEnv) else 1
    log_std_init = policy_defaults(contract.steer_mode)["log_std_init"]
    policy_kwargs = dict(net_arch=dict(pi=[256, 256], qf=[256, 256]), log_std_init=log_std_init)
    kwargs: dict[str, Any] = dict(
        critic=critic,
        gamma=contract.macro_gamma,
        learning_rate=3e-4,
        buffer_size=300_000,
        learning_starts=256,
        batch_size=256,
        gradient_steps=UPDATES_PER_STEP * n_envs,
        policy_delay=2,
        ent_coef=0.01,
        backup_entropy=False,
    )
    return kwargs | dict(policy_kwargs=policy_kwargs | overrides.pop("policy_kwargs", {})) | overrides
