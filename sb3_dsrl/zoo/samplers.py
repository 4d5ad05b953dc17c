"""
What Optuna tries in rl-zoo3. None of it is gamma: the env says what a macro-step's discount is.

A sampler asks the trial for numbers, a converter makes keyword arguments of them; rl-zoo3 also calls the converter alone, to
read the numbers of a trial again (``--trial-id``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

#: Hidden layers
ARCHITECTURES = {"small": [64, 64], "medium": [256, 256], "large": [512, 512]}


def sample_ppo(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    PPO with "LatentPolicy".

    :param trial: of the study
    :param n_actions: not needed
    :param n_envs: not needed
    :param additional_args: not needed
    :return: keyword arguments of PPO
    """
    sampled = dict(
        n_steps_pow=trial.suggest_int("n_steps_pow", 4, 8),
        batch_size_pow=trial.suggest_int("batch_size_pow", 5, 7),  # at most what 8 envs make in 2**4 steps
        n_epochs=trial.suggest_categorical("n_epochs", [5, 10, 20]),
        learning_rate=trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
        one_minus_gae_lambda=trial.suggest_float("one_minus_gae_lambda", 0.005, 0.2, log=True),
        ent_coef=trial.suggest_float("ent_coef", 1e-6, 1e-2, log=True),
        clip_range=trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3]),
        net_arch=trial.suggest_categorical("net_arch", list(ARCHITECTURES)),
        std=trial.suggest_float("std", 0.1, 1.0, log=True),
        prior_mix=trial.suggest_float("prior_mix", 0.0, 0.3),
        value_lr=trial.suggest_float("value_lr", 1e-4, 1e-2, log=True),
    )
    kwargs = convert_ppo(sampled)
    for name in ("n_steps", "batch_size", "gae_lambda"):
        trial.set_user_attr(name, kwargs[name])
    return kwargs


def convert_ppo(sampled: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled: what :func:`sample_ppo` asked for; ``std`` is that of a new policy's noise, where 1 is the prior's
    :return: keyword arguments of PPO
    """
    policy_kwargs = dict(
        net_arch=ARCHITECTURES[sampled["net_arch"]],
        log_std_init=math.log(sampled["std"]),
        prior_mix=sampled["prior_mix"],
        value_lr=sampled["value_lr"],
    )
    return dict(
        n_steps=2 ** sampled["n_steps_pow"],
        batch_size=2 ** sampled["batch_size_pow"],
        gae_lambda=1 - sampled["one_minus_gae_lambda"],
        policy_kwargs=policy_kwargs,
        **{name: sampled[name] for name in ("n_epochs", "learning_rate", "ent_coef", "clip_range")},
    )


def sample_sac(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    SAC on noise.

    :param trial: of the study
    :param n_actions: not needed
    :param n_envs: not needed
    :param additional_args: not needed
    :return: keyword arguments of SAC
    """
    sampled = dict(
        batch_size_pow=trial.suggest_int("batch_size_pow", 6, 10),
        learning_rate=trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
        gradient_steps=trial.suggest_categorical("gradient_steps", [1, 2, 4, 8]),
        tau=trial.suggest_float("tau", 0.001, 0.05, log=True),
        initial_ent_coef=trial.suggest_float("initial_ent_coef", 0.01, 1.0, log=True),
        net_arch=trial.suggest_categorical("net_arch", list(ARCHITECTURES)),
    )
    kwargs = convert_sac(sampled)
    trial.set_user_attr("batch_size", kwargs["batch_size"])
    return kwargs


def convert_sac(sampled: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled: what :func:`sample_sac` asked for
    :return: keyword arguments of SAC
    """
    return dict(
        batch_size=2 ** sampled["batch_size_pow"],
        ent_coef=f"auto_{sampled['initial_ent_coef']}",
        policy_kwargs=dict(net_arch=ARCHITECTURES[sampled["net_arch"]]),
        **{name: sampled[name] for name in ("learning_rate", "gradient_steps", "tau")},
    )
