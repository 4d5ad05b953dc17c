"""Rollouts of whole episodes for stage 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.evaluation.play import Actor, count_env_steps, play
from sb3_dsrl.evaluation.results import OUTCOME, EvalResult
from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.steering.vec_env import find_steering


@dataclass
class Rollouts:
    """
    Macro-steps of whole episodes, grouped by episode and in order.

    :param cond: features, (n, C)
    :param w: noise that was executed, (n, T, A), (n, H, A) or (n, 1, A), see ``steer_mode``
    :param chunk: actions that it became, with the residual if there was one, (n, H, A)
    :param reward: macro rewards, (n,)
    :param discount: ``gamma^k``, 0 after a termination, (n,)
    :param next_cond: features afterwards, (n, C)
    :param episode: index of the episode, (n,)
    :param success_at_end: of each episode, (episodes,)
    :param env_steps: env steps that the simulator executed
    :param contract: of the env that was steered
    :param success_once: of each episode, (episodes,); None if the env does not report success
    :param returns: undiscounted, of each episode, (episodes,)
    :param lengths: of each episode in env steps, (episodes,)
    """

    cond: th.Tensor
    w: th.Tensor
    chunk: th.Tensor
    reward: th.Tensor
    discount: th.Tensor
    next_cond: th.Tensor
    episode: np.ndarray
    success_at_end: np.ndarray
    env_steps: int
    contract: Contract
    success_once: np.ndarray | None = None
    returns: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cond)

    @property
    def result(self) -> EvalResult | None:
        """Outcome of the same episodes; None if the env does not report success."""
        if self.success_once is None or self.returns is None or self.lengths is None:
            return None
        return EvalResult.of("rollouts", self.success_once, self.success_at_end, self.returns, self.lengths)

    def transitions(self) -> FeatureTransitions:
        """The same macro-steps as training data for the critic."""
        return FeatureTransitions(self.cond, self.chunk, self.reward, self.discount, self.next_cond)


def collect_rollouts(
    actor: Actor,
    env: gym.Env | VecEnv,
    episodes: int,
    *,
    seed: int = 0,
    deterministic: bool = False,
    progress_bar: bool = False,
) -> Rollouts:
    """
    Plays episodes and keeps every macro-step, with the noise that was executed.

    :param actor: see :func:`evaluate`
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param seed: of the envs and of the noise
    :param deterministic: passed on to ``predict``
    :param progress_bar: show a progress bar
    :return: the macro-steps of all episodes, in order
    :raises ValueError: if the env is not steered, or normalises features or rewards
    """
    require_raw_features(env, "collect_rollouts", rewards=True)
    steering = find_steering(env)
    gamma = steering.contract.gamma
    open_episodes: dict[int, list[tuple[Any, ...]]] = {}
    finished: list[list[tuple[Any, ...]]] = []
    final_infos: list[dict[str, Any]] = []
    env_steps = 0
    for step in play(actor, env, episodes, seed, deterministic, progress_bar, "rollouts"):
        env_steps += count_env_steps(step.infos)
        for i, info in enumerate(step.infos):
            if info.get("worker_failed"):
                open_episodes.pop(i, None)
        for i in np.flatnonzero(step.counts):
            info = step.infos[i]
            ended = step.dones[i] and not info["TimeLimit.truncated"]
            discount = 0.0 if ended else gamma ** info["chunk_length"]
            after = info["terminal_observation"] if step.dones[i] else step.next_obs[i]
            w, _ = steering.action_space.split(step.w[i])
            row = (step.obs[i], w, info["action_chunk"], step.rewards[i], discount, after)
            open_episodes.setdefault(int(i), []).append(row)
            if step.dones[i]:
                finished.append(open_episodes.pop(int(i)))
                final_infos.append(info)
    cond, w, chunk, reward, discount, next_cond = (
        th.from_numpy(np.stack([np.asarray(row[c], np.float32) for rows in finished for row in rows])) for c in range(6)
    )
    index = np.repeat(np.arange(len(finished)), [len(rows) for rows in finished])
    return Rollouts(
        cond,
        w,
        chunk,
        reward,
        discount,
        next_cond,
        index,
        np.array([bool(info.get("success_at_end", False)) for info in final_infos]),
        env_steps,
        steering.contract,
        *(
            np.array([info[key] for info in final_infos]) if key in final_infos[0] else None
            for key in OUTCOME
            if key != "success_at_end"
        ),
    )
