"""Golden tickets: the one fixed noise with which a frozen flow succeeds most, as a control and as a start for RL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm import tqdm

from sb3_dsrl.evaluation.play import play


@dataclass
class Ticket:
    """
    What :func:`find_ticket` found.

    :param w: the noise, of the shape of the env's actions
    :param success_at_end: of the episodes that chose it; they flatter it, so evaluate it on others
    :param mean_return: of the same episodes
    :param episodes: episodes of this noise
    :param env_steps: env steps of the whole search
    :param tried: mean success_at_end of every noise of the first round, (n,), best first
    """

    w: np.ndarray
    success_at_end: float
    mean_return: float
    episodes: int
    env_steps: int
    tried: np.ndarray


def find_ticket(
    env: gym.Env | VecEnv,
    *,
    rounds: Sequence[tuple[int, int]] = ((32, 8), (5, 32)),
    include_zero: bool = True,
    seed: int = 0,
    progress_bar: bool = False,
) -> Ticket:
    """
    Successive halving over noises from the prior (https://arxiv.org/abs/1603.04638 has the general scheme): all of them
    play a few episodes, the best of them more. Success counts, the mean return decides between equals. (One round of
    8 episodes chooses by luck.)

    :param env: steered env, gym or vectorised
    :param rounds: (noises, episodes of each) of every round, no more noises from one to the next
    :param include_zero: the first noise is w = 0, the prior's mode, instead of a drawn one
    :param seed: of the noises and of the episodes
    :param progress_bar: show a progress bar
    :raises ValueError: if a round has more noises than the one before, or there is none, or the env reports no success
    """
    counts = [n for n, _ in rounds]
    if not counts or min(counts) < 1 or counts != sorted(counts, reverse=True) or min(e for _, e in rounds) < 1:
        raise ValueError(f"rounds must be (noises, episodes) with no more noises from one to the next, found {rounds}")
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    space = venv.action_space
    shape: tuple[int, ...] = space.shape  # type: ignore[assignment]
    noises = np.random.default_rng(seed).standard_normal((counts[0], *shape)).astype(np.float32)
    noises = noises.clip(space.low, space.high)  # type: ignore[attr-defined]
    if include_zero:
        noises[0] = 0.0
    success: list[list[float]] = [[] for _ in noises]
    returns: list[list[float]] = [[] for _ in noises]
    env_steps, first_seed, first_round = 0, seed, np.zeros(len(noises))
    order = np.arange(len(noises))
    with tqdm(total=sum(n * episodes for n, episodes in rounds), desc="golden ticket", disable=not progress_bar) as bar:
        for number, (n, episodes) in enumerate(rounds):
            queue = np.repeat(order[:n], episodes)
            for start in range(0, len(queue), venv.num_envs):
                # one episode in each env, each with its own noise
                actors = queue[start : start + venv.num_envs]
                padded = np.resize(actors, venv.num_envs)
                for step in play(noises[padded], venv, len(actors), seed=first_seed + start):
                    env_steps += sum(info["chunk_length"] for info in step.infos)
                    for i in np.flatnonzero(step.counts & step.dones):
                        if "success_at_end" not in step.infos[i]:
                            raise ValueError("The env's info holds no 'success_at_end' at the end of an episode")
                        success[padded[i]].append(float(step.infos[i]["success_at_end"]))
                        returns[padded[i]].append(step.infos[i]["episode_return"])
                bar.update(len(actors))
            scores = [(np.mean(s), np.mean(r)) for s, r in zip(success, returns, strict=True)]
            order = np.array(sorted(order[:n], key=lambda j: scores[j], reverse=True))
            first_seed += max(1_000, len(queue))  # every round plays other episodes
            if number == 0:
                first_round = np.sort([score[0] for score in scores])[::-1]
    best = order[0]
    return Ticket(
        noises[best], float(np.mean(success[best])), float(np.mean(returns[best])), len(success[best]), env_steps, first_round
    )
