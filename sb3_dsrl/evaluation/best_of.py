"""The best of M noises by the critic at every macro-step: what the critic alone can do, with nothing learned."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.steering.scores import score_noises
from sb3_dsrl.steering.vec_env import find_steering


class BestOfM:
    """
    An actor for :func:`~sb3_dsrl.evaluate`: it draws M noises from the prior at every macro-step and plays the one whose
    decoded chunk the critic scores highest.

    :param env: the steered env that it will play, gym or vectorised
    :param critic: ensemble chunk critic; None is the flow's own
    :param n_candidates: M
    :param kappa: the score is mean - kappa * std over the ensemble
    :raises ValueError: if there is no trained critic, it is for another H, M is not positive, or the env normalises features
    """

    def __init__(
        self, env: gym.Env | VecEnv, critic: EnsembleChunkCritic | None = None, n_candidates: int = 16, kappa: float = 1.0
    ) -> None:
        if n_candidates < 1:
            raise ValueError(f"n_candidates must be at least 1, found {n_candidates}")
        require_raw_features(env, "The critic")
        self.steering = find_steering(env)
        critic = self.steering.flow.critic if critic is None else critic
        if critic is None or not critic.updates:
            raise ValueError(
                f"The best of M needs a trained critic, found {'none' if critic is None else 'an untrained one'}: "
                f"call train_critic(flow, demo_transitions(flow, demos)) first"
            )
        self.steering.flow.check_critic(critic)
        self.critic, self.n_candidates, self.kappa = critic, n_candidates, kappa

    @th.no_grad()
    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """
        :param observation: features, (N, C)
        :param deterministic: makes no difference, since the candidates are always drawn
        :return: noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``, with residual 0 if there is one, and None, as
            SB3's ``predict``
        """
        flow = self.steering.flow
        cond = th.as_tensor(observation, device=flow.device)
        # drawn on the CPU, where evaluations seed the generator
        w = self.steering.choices(len(cond), self.n_candidates).to(flow.device)
        best = score_noises(self.steering, self.critic, cond, w, self.kappa).argmax(dim=1)
        w = w[th.arange(len(w), device=w.device), best][:, self.steering.rows]
        return self.steering.action_space.join(w).cpu().numpy(), None
