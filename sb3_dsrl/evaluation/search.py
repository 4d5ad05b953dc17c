"""Search: noises are tried in the simulator itself, which goes back afterwards, and the best one is played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from sb3_dsrl.evaluation.play import Actor, MacroStep, actor_function, as_vec_env, count_env_steps, play
from sb3_dsrl.evaluation.search_result import SearchResult
from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.steering.sim_state import cannot_restore, get_sim_states, set_sim_states
from sb3_dsrl.steering.vec_env import VecLatentSteering, find_steering

#: A model or policy whose value network says what follows after the horizon.
Value = BaseAlgorithm | ActorCriticPolicy


class NoiseSearch:
    """
    An actor for :func:`~sb3_dsrl.evaluate`: at every macro-step it tries M noises in the simulator, from the state that it is
    in, and plays the one with the highest score. What it reaches is what noise could reach if one knew which; a policy that
    needs no simulator learns from it, see :func:`search_noise` and :func:`~sb3_dsrl.fit_searched`.

    A score is the discounted reward of ``horizon`` macro-steps, the first of them with the noise that is tried, the rest with
    the proposal's mean. It stops at the end of an episode. All envs search at once.

    :param env: steered env, gym or vectorised, that can go back to a state: ManiSkill's can, see
        :mod:`sb3_dsrl.steering.sim_state`
    :param proposal: the policy so far, or a flow, which stands for w = 0; or another :data:`~sb3_dsrl.evaluation.play.Actor`
    :param n_candidates: M: w = 0, the proposal's mean, and in turn a noise from N(0, I) and one sampled from the proposal. A
        flow has no mean but w = 0 and no samples but N(0, I); one fixed noise has no samples either.
    :param horizon: macro-steps of a score
    :param share: of the macro-steps that are searched, drawn for all envs at once; at the others the proposal's mean is played
    :param value: its value network is added to the score where the horizon ends; None adds nothing
    :param prior_std: scale of the noises from N(0, I); below 1 they stay closer to w = 0
    :param seed: of the candidates from N(0, I) and of the macro-steps that are searched
    :raises ValueError: if an argument is out of range, or the env is not steered, has a residual, normalises features or
        rewards, or cannot go back to a state
    """

    def __init__(
        self,
        env: gym.Env | VecEnv,
        proposal: Actor,
        n_candidates: int = 8,
        horizon: int = 3,
        share: float = 1.0,
        value: Value | None = None,
        prior_std: float = 1.0,
        seed: int = 0,
    ) -> None:
        if n_candidates < 2:
            raise ValueError(f"n_candidates must be at least 2, found {n_candidates}: one noise is no choice")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 macro-step, found {horizon}")
        if not 0 < share <= 1:
            raise ValueError(f"share is the part of the macro-steps that are searched and must lie in (0, 1], found {share}")
        if not prior_std > 0:
            raise ValueError(f"prior_std is a standard deviation and must be positive, found {prior_std}")
        require_raw_features(env, "The search", rewards=True)
        self.steering = find_steering(env)
        if self.steering.contract.residual_scale:
            scale = self.steering.contract.residual_scale
            raise ValueError(f"The search tries noise alone, but the env has residual_scale={scale}: make one without")
        self._sim = _Simulators(as_vec_env(env))
        self.n_candidates, self.horizon, self.share, self.prior_std = n_candidates, horizon, share, prior_std
        self._value = _value_function(value)
        self._rng = np.random.default_rng(seed)
        free = isinstance(proposal, SteerablePolicy | str)  # its mean is w = 0, its samples are N(0, I)
        own = actor_function(proposal, self._sim.venv, seed, True)
        self._mean = actor_function("zero", self._sim.venv, seed, True) if free else own
        self._has_mean = not free
        self._own = None if free or isinstance(proposal, np.ndarray) else actor_function(proposal, self._sim.venv, seed, False)
        #: env steps that were tried ahead, beside those that were played
        self.env_steps = 0
        #: noises (N, M, T, A) and scores (N, M) of the last macro-step; None if it was not searched
        self.last: tuple[np.ndarray, np.ndarray] | None = None

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """
        :param observation: features of the state that the env is in, (N, C)
        :param deterministic: makes no difference, since candidates are always drawn
        :return: noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``, and None, as SB3's ``predict``
        """
        if self.share < 1 and self._rng.random() >= self.share:
            self.last = None
            return self._mean(observation), None
        candidates = self._candidates(observation)
        scores = np.zeros((len(observation), self.n_candidates))
        state = self._sim.get()
        self._sim.hold_ends(True)
        try:
            for m in range(self.n_candidates):
                # the first one, too: what is played then starts as all that were tried
                self._sim.set(state)
                scores[:, m] = self._look_ahead(candidates[:, m])
            self._sim.set(state)
        finally:
            self._sim.hold_ends(False)
        self.last = candidates, scores
        return candidates[np.arange(len(candidates)), scores.argmax(axis=1)], None

    def _candidates(self, obs: np.ndarray) -> np.ndarray:
        """(N, M, T, A)"""
        space = self.steering.action_space
        shape = (len(obs), self.n_candidates, *space.shape)
        w = (self.prior_std * self._rng.standard_normal(shape)).clip(space.low, space.high).astype(np.float32)
        w[:, 0] = 0.0
        if self._has_mean:
            w[:, 1] = self._mean(obs)
        if self._own is not None:
            for m in range(3, self.n_candidates, 2):
                w[:, m] = self._own(obs)
        return w

    def _look_ahead(self, w: np.ndarray) -> np.ndarray:
        """Scores of one noise for each env, (N,)."""
        scores, discount, over = np.zeros(len(w)), np.ones(len(w)), np.zeros(len(w), bool)
        obs: Any = None
        for step in range(self.horizon):
            obs, rewards, _, infos = self._sim.step(w if step == 0 else self._mean(obs))
            if any(info.get("worker_failed") for info in infos):
                raise RuntimeError("A worker failed during a search, and the states of its envs are lost: search again")
            lengths = np.array([info["chunk_length"] for info in infos])
            self.env_steps += int(lengths.sum())
            scores += discount * rewards
            discount *= self.steering.contract.gamma**lengths
            over = np.array([info["episode_over"] for info in infos])
            if over.all():
                break
        if self._value is not None:
            scores += discount * ~over * self._value(obs)
        return scores


def search_noise(
    env: gym.Env | VecEnv,
    proposal: Actor,
    episodes: int,
    *,
    n_candidates: int = 8,
    horizon: int = 3,
    share: float = 1.0,
    value: Value | None = None,
    prior_std: float = 1.0,
    seed: int = 0,
    progress_bar: bool = False,
) -> SearchResult:
    """
    Plays episodes with :class:`NoiseSearch` and keeps what was tried: ``pretrain_latent(flow, search=result)`` learns from it.
    Every macro-step that is searched costs up to ``n_candidates * horizon * H`` env steps.

    :param env: see :class:`NoiseSearch`
    :param proposal: see :class:`NoiseSearch`
    :param episodes: in all; split evenly over the envs. A multiple of their number leaves none of them idle.
    :param n_candidates: M
    :param horizon: macro-steps of a score
    :param share: of the macro-steps that are searched
    :param value: see :class:`NoiseSearch`
    :param prior_std: see :class:`NoiseSearch`
    :param seed: of the envs and of the noises
    :param progress_bar: show a progress bar
    :return: features, noises and scores of all macro-steps that were searched, and how the episodes went
    :raises ValueError: as :class:`NoiseSearch`, or if there is no episode to play, or none of their macro-steps was searched
    """
    search = NoiseSearch(env, proposal, n_candidates, horizon, share, value, prior_std, seed)
    log = _Log()
    for step in play(search, env, episodes, seed, True, progress_bar, "search"):
        log.env_steps += count_env_steps(step.infos)
        log.add(step, search.last, search.steering.contract.gamma)
    if not any(len(rows) for rows in log.finished):
        raise ValueError(f"No macro-step of {episodes} episodes was searched: more episodes, or a larger share than {share}")
    return log.result(search)


class _Log:
    """Macro-steps of the episodes that are played, and what was searched in them."""

    def __init__(self) -> None:
        self.env_steps = 0
        self._open: dict[int, list[tuple[Any, ...]]] = {}
        self.finished: list[list[tuple[Any, ...]]] = []
        self._infos: list[dict[str, Any]] = []

    def add(self, step: MacroStep, searched: tuple[np.ndarray, np.ndarray] | None, gamma: float) -> None:
        for i, info in enumerate(step.infos):
            if info.get("worker_failed"):
                self._open.pop(i, None)
        for i in np.flatnonzero(step.counts):
            info = step.infos[i]
            tried = None if searched is None else (searched[0][i], searched[1][i])
            row = (step.obs[i], tried, float(step.rewards[i]), gamma ** info["chunk_length"])
            self._open.setdefault(int(i), []).append(row)
            if step.dones[i]:
                self._close(self._open.pop(int(i)))
                self._infos.append(info)

    def _close(self, rows: list[tuple[Any, ...]]) -> None:
        kept, to_go = [], 0.0
        for obs, tried, reward, discount in reversed(rows):
            to_go = reward + discount * to_go
            if tried is not None:
                kept.append((obs, *tried, to_go))
        self.finished.append(kept[::-1])

    def result(self, search: NoiseSearch) -> SearchResult:
        columns = [np.stack([row[c] for rows in self.finished for row in rows]).astype(np.float32) for c in range(4)]
        cond, w, scores, to_go = map(th.from_numpy, columns)
        episode = np.repeat(np.arange(len(self.finished)), [len(rows) for rows in self.finished])
        env_steps = self.env_steps + search.env_steps
        outcomes = {
            key: np.array([info.get(name, False) for info in self._infos])
            for key, name in (
                ("success_once", "success_once"),
                ("success_at_end", "success_at_end"),
                ("returns", "episode_return"),
                ("lengths", "episode_length"),
            )
        }
        return SearchResult(cond, w, scores, to_go, episode, env_steps, search.steering.contract, **outcomes)


class _Simulators:
    """The envs that are searched, below whatever records episodes."""

    def __init__(self, venv: VecEnv) -> None:
        self.venv = venv
        while isinstance(self.venv, VecEnvWrapper) and not isinstance(self.venv, VecLatentSteering):
            self.venv = self.venv.venv
        if not all(self.venv.get_attr("can_restore")):
            raise ValueError(cannot_restore(str(self.venv.get_attr("env_id")[0] or "The env")))

    def get(self) -> Any:
        return self.venv.get_sim_state() if isinstance(self.venv, VecLatentSteering) else get_sim_states(self.venv)

    def set(self, state: Any) -> None:
        if isinstance(self.venv, VecLatentSteering):
            self.venv.set_sim_state(state)
        else:
            set_sim_states(self.venv, state)

    def hold_ends(self, hold: bool) -> None:
        if isinstance(self.venv, VecLatentSteering):
            self.venv.hold_ends(hold)
        else:
            self.venv.env_method("hold_ends", hold)

    def step(self, w: np.ndarray) -> Any:
        return self.venv.step(w)


def _value_function(value: Value | None) -> Callable[[np.ndarray], np.ndarray] | None:
    if value is None:
        return None
    policy: Any = value.policy if isinstance(value, BaseAlgorithm) else value
    if not isinstance(policy, ActorCriticPolicy):
        raise ValueError(f"value must be a model or policy with a value network, found {type(policy).__name__}")

    @th.no_grad()
    def values(obs: np.ndarray) -> np.ndarray:
        return policy.predict_values(th.as_tensor(obs, device=policy.device)).squeeze(-1).cpu().numpy()

    return values
