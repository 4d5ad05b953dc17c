"""The right bootstrap after a macro-step that was cut short."""

from __future__ import annotations

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_dsrl.steering.vec_env import find_steering
from sb3_dsrl.utils.observations import stack_frames


class ExactBootstrap(BaseCallback):
    """
    Makes PPO, A2C and TRPO exact where truncated macro-steps last fewer than H env steps.

    SB3 adds ``gamma ** H * V`` of the terminal observation to the reward of a truncated macro-step. A time limit does not
    cut a chunk, so that is right. But a worker that was lost and started again ends an episode after k = 0 env steps of the
    macro-step, and a time limit with ``cut_at_time_limit`` after 0 < k < H. This callback adds
    ``(gamma ** k - gamma ** H) * V`` to those rewards, before SB3 adds its part. It does nothing where all chunks are whole.

    :raises ValueError: when training begins, if the algorithm is off-policy or the env is not steered
    """

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ValueError(
                f"ExactBootstrap is for PPO, A2C and TRPO, found {type(self.model).__name__}: its targets are computed from a "
                f"replay buffer, not from rewards"
            )
        self._contract = find_steering(self.training_env).contract

    def _on_step(self) -> bool:
        assert isinstance(self.model, OnPolicyAlgorithm)
        infos, dones = self.locals["infos"], self.locals["dones"]
        cut = [
            i
            for i, info in enumerate(infos)
            if dones[i] and info.get("TimeLimit.truncated", False) and info["chunk_length"] < self._contract.act_horizon
        ]
        if cut:
            policy = self.model.policy
            last, _ = policy.obs_to_tensor(stack_frames([infos[i]["terminal_observation"] for i in cut]))
            with th.no_grad():
                values = policy.predict_values(last).flatten().cpu().numpy()  # type: ignore[operator]
            k = np.array([infos[i]["chunk_length"] for i in cut])
            self.locals["rewards"][cut] += (self._contract.gamma**k - self.model.gamma) * values
        return True
