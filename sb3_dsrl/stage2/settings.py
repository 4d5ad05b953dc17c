"""The method's settings for stock PPO on a steered env."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.steering.vec_env import find_steering

#: Macro-steps that one PPO update learns from, over all envs.
ROLLOUT_SIZE = 512
N_MINIBATCHES = 4


def ppo_kwargs(env: gym.Env | VecEnv, **overrides: Any) -> dict[str, Any]:
    """
    Keyword arguments of ``PPO("LatentPolicy", env, ...)``: the method's defaults, with the env's own macro-step discount.

    :param env: steered env, gym or vectorised
    :param overrides: explicit keywords; they win, and ``policy_kwargs`` are merged
    :raises ValueError: if the env is not steered
    """
    n_envs = env.num_envs if isinstance(env, VecEnv) else 1
    n_steps = N_MINIBATCHES * max(1, ROLLOUT_SIZE // (N_MINIBATCHES * n_envs))
    kwargs: dict[str, Any] = dict(
        gamma=find_steering(env).contract.macro_gamma,
        n_steps=n_steps,
        batch_size=n_steps * n_envs // N_MINIBATCHES,
        n_epochs=10,
        learning_rate=3e-4,
        clip_range=0.2,
        ent_coef=1e-3,
    )
    policy_kwargs = dict(prior_mix=0.3, prior_mix_decay=0.995, value_lr=1e-3) | overrides.pop("policy_kwargs", {})
    return kwargs | overrides | dict(policy_kwargs=policy_kwargs)
