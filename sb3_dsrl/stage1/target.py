"""What stage 1 trains: a new policy for a flow, or the policy of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.steering.steering import Steering
from sb3_dsrl.steering.vec_env import find_steering


def steering_and_policy(
    target: SteerablePolicy | BaseAlgorithm, policy_kwargs: dict[str, Any] | None
) -> tuple[Steering, LatentPolicy]:
    """
    :param target: a flow, or a model with "LatentPolicy" on a steered env
    :param policy_kwargs: of the new policy of a flow, or None
    :return: how noise is steered, and the policy to train
    :raises TypeError: if the target is neither
    :raises ValueError: if the model has another policy, no env, or an env that is not steered or normalises observations
    """
    if isinstance(target, SteerablePolicy):
        steering = Steering(target, target.gamma)
        spaces = steering.observation_space, steering.action_space
        return steering, LatentPolicy(*spaces, lr_schedule=lambda _: 3e-4, **(policy_kwargs or {}))
    if not isinstance(target, BaseAlgorithm):
        raise TypeError(f"Stage 1 expects a FlowPolicy or a model with 'LatentPolicy', found {type(target).__name__}")
    if policy_kwargs is not None:
        raise ValueError("policy_kwargs describe a new policy, but a model was given; pass them to the model")
    if not isinstance(target.policy, LatentPolicy):
        raise ValueError(f"Stage 1 expects a model with 'LatentPolicy', found {type(target.policy).__name__}")
    env = target.get_env()
    if env is None:
        raise ValueError("Stage 1 needs the model's env to find the flow: call model.set_env(env) first")
    _check_features_are_raw(env)
    return find_steering(env), target.policy


def _check_features_are_raw(env: VecEnv) -> None:
    layer = env
    while isinstance(layer, VecEnvWrapper):
        if isinstance(layer, VecNormalize) and layer.norm_obs:
            raise ValueError(
                "The model's env normalises the flow's features, which are normalised already, so that its policy would see "
                "others than stage 1 learns from: use VecNormalize(..., norm_obs=False)"
            )
        layer = layer.venv


def check_rollouts_fit(steering: Steering, rollouts: Rollouts) -> None:
    """
    :raises ValueError: if rollouts are of another flow or discount, or steer other entries of the noise
    """
    flow = steering.flow
    for what, found, expected in (
        ("flow", rollouts.flow_hash, steering.action_space.flow_hash),
        ("gamma", rollouts.gamma, flow.gamma),
    ):
        if found != expected:
            raise ValueError(f"The rollouts were collected with {what}={found}, but the flow to steer has {expected}")
    entries = steering.rows.stop - steering.rows.start
    usable = (entries,) if steering.steer_mode == "shared" else (entries, flow.pred_horizon)
    if rollouts.w.shape[1] not in usable:
        raise ValueError(f"The rollouts steer {rollouts.w.shape[1]} entries of the noise, expected {entries}: see steer_mode")


@contextmanager
def lent(policy: LatentPolicy, device: th.device) -> Iterator[None]:
    """
    A policy on another device for as long as it is trained there. It comes back in evaluation mode, or after an error in the
    mode that it was in.

    :param policy: the policy
    :param device: where it is needed
    """
    home, training = policy.device, policy.training
    try:
        policy.to(device)
        yield
        training = False
    finally:
        policy.to(home).train(training)
