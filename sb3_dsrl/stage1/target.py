"""What stage 1 trains: a new policy for a flow, or the policy of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dsrl.evaluation.vec_normalize import normalizers
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.stage2.settings import policy_defaults
from sb3_dsrl.steering.contract import REWARDS, Contract, check_agreement
from sb3_dsrl.steering.steering import Steering
from sb3_dsrl.steering.vec_env import find_steering

#: What rollouts and the env to steer must agree on. Not the steering mode: "full" noise serves "act_horizon", too.
ROLLOUTS = ("flow_hash", "act_horizon", "noise_bound", "residual_scale", "num_steps", *REWARDS)


class PlayedNoise(Protocol):
    """Noises of a steered env: rollouts, or what a search tried."""

    #: (n, T, A) or (S, M, T, A), with T, H or 1 entries
    w: th.Tensor
    contract: Contract


def steering_and_policy(
    target: FlowLike | BaseAlgorithm,
    rollouts: PlayedNoise | None,
    policy_kwargs: dict[str, Any] | None,
    who: str = "rollouts",
) -> tuple[Steering, LatentPolicy]:
    """
    What is steered, and how: as the model's env says, as the rollouts were collected, or else as the flow's own settings are.

    :param target: a flow or its folder, or a model with "LatentPolicy" on a steered env
    :param rollouts: that it will learn from, or None
    :param policy_kwargs: of the new policy of a flow, beside the recommended ones
    :param who: what they are called in errors
    :return: how noise is steered, and the policy to train
    :raises TypeError: if the target is neither
    :raises ValueError: if the model has another policy, no env, or an env that is not steered or normalises observations; if
        rollouts are of another flow, env or part of the noise
    """
    if isinstance(target, (SteerablePolicy, str, Path)):
        target = resolve_flow(target)
        contract = Contract.of(target)
        if rollouts is not None:
            check_agreement(who, rollouts.contract, "flow", contract, ("flow_hash", "act_horizon"))
            contract = rollouts.contract
        steering = Steering(target, contract)
        spaces = steering.observation_space, steering.action_space
        kwargs = policy_defaults(contract.steer_mode) | (policy_kwargs or {})
        return steering, LatentPolicy(*spaces, lr_schedule=lambda _: 3e-4, **kwargs)
    if not isinstance(target, BaseAlgorithm):
        raise TypeError(
            f"Stage 1 expects a FlowPolicy, its folder, or a model with 'LatentPolicy', found {type(target).__name__}"
        )
    if policy_kwargs is not None:
        raise ValueError("policy_kwargs describe a new policy, but a model was given; pass them to the model")
    if not isinstance(target.policy, LatentPolicy):
        raise ValueError(
            f"Stage 1 expects a model with 'LatentPolicy', found {type(target.policy).__name__}: use PPO, A2C or TRPO"
        )
    env = target.get_env()
    if env is None:
        raise ValueError("Stage 1 needs the model's env to find the flow: call model.set_env(env) first")
    if any(layer.norm_obs for layer in normalizers(env)):
        raise ValueError(
            "The model's env normalises the flow's features, which are normalised already, and stage 1 learns from them as "
            "they are: use VecNormalize(..., norm_obs=False)"
        )
    steering = find_steering(env)
    if env.observation_space != steering.observation_space:
        raise ValueError(
            f"The model's policy sees {env.observation_space}, but stage 1 learns from the flow's features, "
            f"{steering.observation_space}: train with obs='features', without wrappers that change observations"
        )
    if rollouts is not None:
        check_agreement(who, rollouts.contract, "model's env", steering.contract, ROLLOUTS)
        entries, mode = rollouts.w.shape[-2], steering.contract.steer_mode
        expected = steering.action_space.noise_shape[0]
        if entries != expected and not (mode == "act_horizon" and entries == steering.flow.pred_horizon):
            raise ValueError(f"The {who} steer {entries} entries of the noise, expected {expected}: see steer_mode")
    return steering, target.policy


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
