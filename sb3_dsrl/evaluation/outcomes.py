"""How episodes went, start by start, so that policies can be compared on the same ones.

Letters in shapes: ``n`` episodes, ``C`` features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.evaluation.play import Actor, as_vec_env, count_env_steps, play, require_success
from sb3_dsrl.evaluation.results import OUTCOME, EvalResult


@dataclass
class Outcomes:
    """
    What came of each episode, env by env: the same place stands for the same start, whatever played.

    :param success_once: (n,)
    :param success_at_end: (n,)
    :param returns: undiscounted, (n,)
    :param lengths: in env steps, (n,)
    :param first_obs: what is seen at the start of each episode, (n, C); None if that is a dict
    :param env_steps: that the simulator executed, those of envs that idled along, too
    """

    success_once: np.ndarray
    success_at_end: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    first_obs: np.ndarray | None
    env_steps: int

    def __add__(self, other: Outcomes) -> Outcomes:
        arrays = ("success_once", "success_at_end", "returns", "lengths")
        joined = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in arrays}
        seen = None if self.first_obs is None or other.first_obs is None else [self.first_obs, other.first_obs]
        first_obs = None if seen is None else np.concatenate(seen)
        return Outcomes(**joined, first_obs=first_obs, env_steps=self.env_steps + other.env_steps)

    def result(self, name: str) -> EvalResult:
        """
        :param name: of the row
        :return: means of all episodes
        """
        return EvalResult.of(name, self.success_once, self.success_at_end, self.returns, self.lengths)


def play_outcomes(
    actor: Actor, env: gym.Env | VecEnv, episodes: int, seed: int = 0, deterministic: bool = True, who: str = "play_outcomes"
) -> Outcomes:
    """
    Plays episodes as :func:`~sb3_dsrl.evaluation.play.play` does, and keeps how each of them went.

    :param actor: see :data:`~sb3_dsrl.evaluation.play.Actor`
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param seed: of the envs and of the noise
    :param deterministic: passed on to ``predict``
    :param who: plays, the subject of errors
    :return: the outcomes, env by env
    :raises ValueError: if the env reports no success, or as ``play`` says
    """
    venv = as_vec_env(env)
    of_envs: list[list[tuple[Any, ...]]] = [[] for _ in range(venv.num_envs)]
    flat = isinstance(venv.observation_space, spaces.Box)
    first: Any = None
    env_steps = 0
    for step in play(actor, venv, episodes, seed, deterministic):
        require_success(step.infos, who)
        env_steps += count_env_steps(step.infos)
        if flat:
            first = np.array(step.obs) if first is None else first
        for i in np.flatnonzero(step.counts & step.dones):
            of_envs[i].append((*(step.infos[i][key] for key in OUTCOME), first[i].copy() if flat else None))
        if flat:
            first[step.dones] = step.next_obs[step.dones]
    once, at_end, returns, lengths, seen = zip(*(row for rows in of_envs for row in rows), strict=True)
    return Outcomes(
        np.array(once, bool),
        np.array(at_end, bool),
        np.array(returns),
        np.array(lengths),
        np.array(seen) if flat else None,
        env_steps,
    )
