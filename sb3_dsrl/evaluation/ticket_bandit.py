"""A choice among tickets by how an episode begins: a contextual bandit.

Letters in shapes: ``K`` tickets, ``n`` episodes, ``N`` envs, ``C`` features.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_dsrl.evaluation.outcomes import play_outcomes
from sb3_dsrl.evaluation.play import as_vec_env
from sb3_dsrl.evaluation.tickets import draw_noises
from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.vec_env import find_steering

#: Strengths of the ridge that are tried, times n; with infinity all starts are alike, which is the plain choice of a ticket.
RIDGES = (np.inf, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass
class TicketBandit:
    """
    An actor for :func:`~sb3_dsrl.evaluate`, :func:`~sb3_dsrl.collect_rollouts` and the like: at the start of an episode it
    looks at the features, chooses the ticket that should succeed most from there, and plays it to the end. Stage 1 can learn
    from its rollouts, and stage 2 go on from that.

    :param noises: the tickets, (K, T, A), (K, H, A) or (K, 1, A)
    :param weights: of expected success, (C + 1, K), linear in the features, the constant last
    :param mean: of the features at the start, (C,)
    :param scale: their standard deviations, (C,)
    :param action_space: of the env
    :param ridge: that was chosen; infinity if the start says nothing about which ticket is best
    :param success_at_end: of the choices, where each start is judged by what the others say; the ridge was chosen by it, so it
        flatters a little
    :param best_single: success of the best single ticket, judged in the same way
    :param episodes: of each ticket
    :param env_steps: env steps of the search
    """

    noises: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    action_space: NoiseSpace
    ridge: float
    success_at_end: float
    best_single: float
    episodes: int
    env_steps: int
    _chosen: np.ndarray | None = None

    def choose(self, obs: np.ndarray) -> np.ndarray:
        """
        :param obs: features at the start of episodes, (N, C)
        :return: indices of tickets, (N,)
        """
        z = (obs - self.mean) / self.scale
        return (z @ self.weights[:-1] + self.weights[-1]).argmax(axis=1)

    def begin(self, obs: np.ndarray, starts: np.ndarray) -> None:
        """
        Told by whoever plays, before :meth:`predict`.

        :param obs: features, (N, C)
        :param starts: whether an episode begins, (N,)
        """
        choice = self.choose(obs)
        if self._chosen is None or len(self._chosen) != len(obs):
            self._chosen = choice
        self._chosen = np.where(starts, choice, self._chosen)

    def predict(self, observation: np.ndarray, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """
        :param observation: features, (N, C)
        :param deterministic: makes no difference
        :return: the noise of each env's ticket, with residual 0 if there is one, and None, as SB3's ``predict``
        :raises ValueError: if nobody said that an episode begins
        """
        if self._chosen is None or len(self._chosen) != len(observation):
            raise ValueError("A TicketBandit chooses where an episode begins: call begin(obs, starts) before predict")
        return self.action_space.join(self.noises[self._chosen]), None


def find_ticket_bandit(
    env: gym.Env | VecEnv,
    n_tickets: int = 8,
    episodes: int = 64,
    *,
    noises: np.ndarray | None = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> TicketBandit:
    """
    Plays every ticket from the same starts, and learns from which start which of them succeeds: ridge regression of success on
    the features at the start. How much the start counts is decided by leaving out each start in turn, so where it says nothing
    the best single ticket is what comes out.

    :param env: steered env, gym or vectorised
    :param n_tickets: K, w = 0 and noises from the prior
    :param episodes: of each ticket; a multiple of the number of envs leaves none of them idle
    :param noises: tickets to choose from, (K, T, A), say, in the place of those
    :param seed: of the noises and of the episodes
    :param progress_bar: show a progress bar
    :return: the choice, an actor
    :raises ValueError: if there are not two tickets or four episodes, the tickets have another shape than the env's noise, or
        the env reports no success or normalises features
    """
    if episodes < 4:
        raise ValueError(f"episodes must be at least 4, found {episodes}: they tell which ticket is good from where")
    require_raw_features(env, "find_ticket_bandit")
    venv = as_vec_env(env)
    space = find_steering(venv).action_space
    noises = draw_noises(space, n_tickets, True, seed) if noises is None else np.asarray(noises, np.float32)
    if len(noises) < 2:
        raise ValueError(f"A choice needs at least 2 tickets, found {len(noises)}")
    if noises.shape[1:] != space.noise_shape:
        raise ValueError(f"noises must be tickets of shape {space.noise_shape}, found {noises.shape[1:]}")
    played = [
        play_outcomes(w, venv, episodes, seed, who="find_ticket_bandit")
        for w in tqdm(noises, desc="tickets", disable=not progress_bar)
    ]
    features = played[0].first_obs
    assert features is not None
    success = np.stack([outcomes.success_at_end for outcomes in played], axis=1).astype(float)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-8, scale, 1.0)
    judged = [_judge((features - mean) / scale, success, ridge * episodes) for ridge in RIDGES]
    best = int(np.argmax([value for value, _ in judged]))  # the first of equals: the stronger ridge
    return TicketBandit(
        noises,
        judged[best][1],
        mean,
        scale,
        space,
        RIDGES[best],
        judged[best][0],
        judged[0][0],
        episodes,
        sum(outcomes.env_steps for outcomes in played),
    )


def _judge(z: np.ndarray, success: np.ndarray, ridge: float) -> tuple[float, np.ndarray]:
    """
    :param z: features, (n, C), each with mean 0
    :param success: (n, K)
    :param ridge: strength
    :return: mean success if each start's ticket is the one that the other starts recommend; weights (C + 1, K)
    """
    n = len(z)
    u, s, v = np.linalg.svd(z, full_matrices=False)
    shrunk = s**2 / (s**2 + ridge) if np.isfinite(ridge) else np.zeros_like(s)
    hat = 1 / n + (u * shrunk) @ u.T  # the constant is not shrunk
    own = np.diag(hat)[:, None]
    others = (hat @ success - own * success) / np.maximum(1 - own, 1e-9)  # leave-one-out, in closed form
    value = float(success[np.arange(n), others.argmax(axis=1)].mean())
    slopes = v.T @ ((np.divide(shrunk, s, out=np.zeros_like(s), where=s > 1e-12))[:, None] * (u.T @ success))
    return value, np.vstack([slopes, success.mean(axis=0)])
