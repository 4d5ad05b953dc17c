"""The method's settings for stock PPO on a steered env."""

from __future__ import annotations

import math
from typing import Any, Literal

import gymnasium as gym
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.stage2.correlation import CorrelatedRolloutBuffer
from sb3_dsrl.steering.contract import SteerMode
from sb3_dsrl.steering.vec_env import find_steering

Preset = Literal["recommended", "paper"]

#: Macro-steps that one PPO update learns from, over all envs, as long as each env makes ``MIN_STEPS``.
ROLLOUT_SIZE = 512
#: Macro-steps of each env, at least: fewer would see one phase of an episode only.
MIN_STEPS = 16
N_MINIBATCHES = 4
MAX_BATCH_SIZE = 4096
#: Learning rate at the start: SB3's own, or so much over the number of entries of an action, if that is less. An update's KL
#: divergence is a sum over entries: with 64 of them, at 3e-4, it was 650 where PPO assumes well below 1, and 0.8 of all
#: ratios were clipped.
MAX_LR, LR_TIMES_ENTRIES = 3e-4, 3.2e-3


def policy_defaults(steer_mode: SteerMode, preset: Preset = "recommended") -> dict[str, Any]:
    """
    The method's ``policy_kwargs`` of :class:`~sb3_dsrl.LatentPolicy`.

    :param steer_mode: of the steered env
    :param preset: "recommended" starts narrow, around w = 0 or a centre, and hardly mixes the prior in; "paper" has the
        original's settings: it starts at N(0, I), and 30% of the noises of the first rollout come from there
    :return: ``log_std_init``, ``prior_mix``, ``prior_mix_decay`` and ``value_lr``
    :raises ValueError: if the preset is unknown
    """
    if preset not in ("recommended", "paper"):
        raise ValueError(f"preset must be 'recommended' or 'paper', found {preset!r}")
    if preset == "paper":
        log_std_init, prior_mix = 0.0, 0.3
    elif steer_mode == "shared":  # noise shared by all rows is not what the flow was trained on: narrower, and no prior
        log_std_init, prior_mix = math.log(0.3), 0.0
    else:
        log_std_init, prior_mix = math.log(0.45), 0.03
    return dict(log_std_init=log_std_init, prior_mix=prior_mix, prior_mix_decay=0.995, value_lr=1e-3)


def ppo_kwargs(
    env: gym.Env | VecEnv, preset: Preset = "recommended", *, noise_correlation: float = 0.0, **overrides: Any
) -> dict[str, Any]:
    """
    Keyword arguments of ``PPO("LatentPolicy", env, ...)``: the method's settings, with the env's own macro-step discount and
    with sizes of rollout and minibatch that fit its number of envs.

    :param env: steered env, gym or vectorised
    :param preset: "recommended", with a learning rate that fits the number of entries of an action and falls to 0, or
        "paper"; see :func:`policy_defaults`
    :param noise_correlation: of noises one macro-step apart, in [0, 1): above 0 exploration goes on in one direction, without
        noises from the prior, see :mod:`sb3_dsrl.stage2.correlation`
    :param overrides: explicit keywords; they win, and ``policy_kwargs`` are merged. Of ``n_steps`` and ``batch_size`` the one
        that is not given follows the other.
    :return: the keyword arguments
    :raises ValueError: if the env is not steered or the preset is unknown
    """
    steering = find_steering(env)
    contract = steering.contract
    policy_kwargs = policy_defaults(contract.steer_mode, preset)
    if noise_correlation:
        policy_kwargs |= dict(noise_correlation=noise_correlation, prior_mix=0.0)
        overrides = dict(rollout_buffer_class=CorrelatedRolloutBuffer) | overrides
    policy_kwargs |= overrides.pop("policy_kwargs", {})
    lr: float | LinearSchedule = MAX_LR
    if preset == "recommended":
        lr = LinearSchedule(min(MAX_LR, LR_TIMES_ENTRIES / math.prod(steering.action_space.shape)), 0.0, 1.0)
    kwargs: dict[str, Any] = dict(
        gamma=contract.macro_gamma,
        n_epochs=10,
        learning_rate=lr,
        clip_range=0.2,
        ent_coef=1e-3,
    )
    n_envs = env.num_envs if isinstance(env, VecEnv) else 1
    n_steps, batch_size = rollout_sizes(n_envs, overrides.pop("n_steps", None), overrides.pop("batch_size", None))
    return kwargs | dict(n_steps=n_steps, batch_size=batch_size, policy_kwargs=policy_kwargs) | overrides


def rollout_sizes(n_envs: int, n_steps: int | None = None, batch_size: int | None = None) -> tuple[int, int]:
    """
    Macro-steps of each env in a rollout and samples in a minibatch. Minibatches divide the rollout evenly, unless both
    are given.

    :param n_envs: N
    :param n_steps: None is as many as make a rollout of ``ROLLOUT_SIZE``, but at least ``MIN_STEPS``; more if a given
        ``batch_size`` does not divide that rollout
    :param batch_size: None is the divisor of the rollout that comes closest to a quarter of it, or to ``MAX_BATCH_SIZE``
    :return: n_steps, batch_size
    """
    if n_steps is None:
        n_steps = max(MIN_STEPS, ROLLOUT_SIZE // n_envs // N_MINIBATCHES * N_MINIBATCHES)
        if batch_size is not None:
            unit = batch_size // math.gcd(batch_size, n_envs)
            n_steps = math.ceil(n_steps / unit) * unit
    if batch_size is None:
        rollout = n_steps * n_envs
        wanted = min(rollout / N_MINIBATCHES, MAX_BATCH_SIZE)
        divisors = [d for d in range(2, rollout + 1) if rollout % d == 0]
        # closest in ratio; SB3 itself refuses a rollout of 1
        batch_size = min(divisors, key=lambda d: max(d / wanted, wanted / d), default=rollout)
    return n_steps, batch_size
