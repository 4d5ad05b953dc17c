"""The value function learns first: before it knows what the start is worth, advantages are noise."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.stage2.optimizers import LrScale


class ValueWarmup(BaseCallback):
    """
    Holds the policy still during the first rollouts, in which the value function alone learns, from the policy as it started.
    For PPO and A2C with "LatentPolicy", whose optimiser has a group for either; the held group's learning rate is 0. Its
    rollouts are part of ``total_timesteps``.

    :param n_rollouts: rollouts, each with its update
    :raises ValueError: if there is none; when training begins, if the policy is another one or has no scaled optimiser
    """

    def __init__(self, n_rollouts: int = 2) -> None:
        super().__init__()
        if n_rollouts < 1:
            raise ValueError(f"n_rollouts must be at least 1, found {n_rollouts}")
        self.n_rollouts = n_rollouts
        #: rollouts that are done
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        """For :class:`~sb3_dsrl.ResumeCallback`."""
        return dict(done=self.done)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on."""
        self.done = state_dict["done"]

    def _on_training_start(self) -> None:
        policy = self.model.policy
        if not isinstance(policy, LatentPolicy) or not isinstance(policy.optimizer, LrScale):
            raise ValueError(
                f"ValueWarmup needs 'LatentPolicy' with an optimiser of sb3_dsrl.stage2.optimizers, found "
                f"{type(policy).__name__} with {type(policy.optimizer).__name__}"
            )

    def _on_rollout_start(self) -> None:
        self._hold(self.done < self.n_rollouts)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.done += 1

    def _on_training_end(self) -> None:
        self._hold(False)

    def _hold(self, hold: bool) -> None:
        optimizer: th.optim.Optimizer = self.model.policy.optimizer
        group = optimizer.param_groups[0]  # the value's is the second
        if group["lr_scale"] and hold:
            group["lr_scale"] = 0.0
        elif not group["lr_scale"] and not hold:
            group["lr_scale"] = 1.0
            for parameter in group["params"]:  # moments of advantages that were noise
                optimizer.state.pop(parameter, None)
