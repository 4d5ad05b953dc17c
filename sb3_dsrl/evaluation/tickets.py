"""Golden tickets: the one fixed noise with which a frozen flow succeeds most, as a control and as a start for RL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_dsrl.evaluation.outcomes import play_outcomes
from sb3_dsrl.evaluation.play import as_vec_env
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.vec_env import find_steering


@dataclass
class Ticket:
    """
    What :func:`find_ticket` found.

    :param w: the noise, of the shape that the env steers, (T, A), (H, A) or (1, A)
    :param success_at_end: of the episodes that chose it; they flatter it, so evaluate it on others
    :param mean_return: of the same episodes
    :param episodes: episodes of this noise
    :param env_steps: env steps of the whole search
    :param first_round: success_at_end of every episode of the first round, (noises, episodes), best noise first; a column is
        one start
    """

    w: np.ndarray
    success_at_end: float
    mean_return: float
    episodes: int
    env_steps: int
    first_round: np.ndarray

    @property
    def tried(self) -> np.ndarray:
        """Mean success_at_end of every noise of the first round, (noises,), best first."""
        return self.first_round.mean(axis=1)


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

    All noises of a round play the same starts, as far as :func:`~sb3_dsrl.evaluation.play.play` says, so none of them wins by
    easier ones; the next round plays others. Each noise plays in all envs at once: episodes that are a multiple of the
    number of envs leave none of them idle.

    :param env: steered env, gym or vectorised
    :param rounds: (noises, episodes of each) of every round, no more noises from one to the next
    :param include_zero: the first noise is w = 0, the prior's mode, instead of a drawn one
    :param seed: of the noises and of the episodes
    :param progress_bar: show a progress bar
    :return: the noise that succeeds most, and how it was found
    :raises ValueError: if a round has more noises than the one before, or there is none, or the env reports no success
    """
    counts = [n for n, _ in rounds]
    if not counts or min(counts) < 1 or counts != sorted(counts, reverse=True) or min(e for _, e in rounds) < 1:
        raise ValueError(f"rounds must be (noises, episodes) with no more noises from one to the next, found {rounds}")
    venv = as_vec_env(env)
    noises = draw_noises(find_steering(venv).action_space, counts[0], include_zero, seed)
    tally = _Tally(len(noises))
    order = np.arange(len(noises))
    first_round = np.zeros((0, 0))
    with tqdm(total=sum(n * episodes for n, episodes in rounds), desc="golden ticket", disable=not progress_bar) as bar:
        for number, (n, episodes) in enumerate(rounds):
            starts = seed + number * max(1_000, venv.num_envs)  # every round plays others
            for j in order[:n]:
                tally.play(j, noises[j], venv, episodes, starts)
                bar.update(episodes)
            order = np.array(sorted(order[:n], key=tally.score, reverse=True))
            if number == 0:
                first_round = np.array([tally.success[j] for j in order])
    best = order[0]
    return Ticket(noises[best], *tally.score(best), len(tally.success[best]), tally.env_steps, first_round)


def draw_noises(space: NoiseSpace, n: int, include_zero: bool, seed: int) -> np.ndarray:
    """
    :param space: of the env
    :param n: noises
    :param include_zero: the first one is w = 0
    :param seed: of the others, which come from the prior
    :return: (n, T, A), (n, H, A) or (n, 1, A)
    """
    noises = np.random.default_rng(seed).standard_normal((n, *space.noise_shape)).astype(np.float32)
    noises = noises.clip(-space.contract.noise_bound, space.contract.noise_bound)
    if include_zero:
        noises[0] = 0.0
    return noises


class _Tally:
    """Success and return of every episode of every noise, and the env steps that they took."""

    def __init__(self, n_noises: int) -> None:
        self.success: list[list[float]] = [[] for _ in range(n_noises)]
        self.returns: list[list[float]] = [[] for _ in range(n_noises)]
        self.env_steps = 0

    def play(self, j: int, w: np.ndarray, venv: VecEnv, episodes: int, seed: int) -> None:
        """Plays noise j; a place in its outcomes stands for the same start in those of every noise."""
        played = play_outcomes(w, venv, episodes, seed, who="find_ticket")
        self.env_steps += played.env_steps
        self.success[j] += played.success_at_end.astype(float).tolist()
        self.returns[j] += played.returns.tolist()

    def score(self, j: int) -> tuple[float, float]:
        """Mean success_at_end and mean return of noise j so far."""
        return float(np.mean(self.success[j])), float(np.mean(self.returns[j]))
