"""Episodes with a fixed quota per env: evaluation with controls and intervals, and rollouts for stage 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize
from tqdm import tqdm

from sb3_dsrl.features import FeatureTransitions
from sb3_dsrl.noise_policy import NoisePolicy
from sb3_dsrl.steering import NoiseSpace
from sb3_dsrl.wrappers import find_steering


class Predictor(Protocol):
    """What SB3 algorithms and policies have in common here."""

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """Maps observations (N, C) to actions (N, T, A)."""


#: A model, a policy, a frozen flow (its prior), the name of a control ("prior", "zero") or one fixed noise (T, A).
Player = Predictor | NoisePolicy | str | np.ndarray


#: What the info at the end of an episode tells of it
OUTCOME = ("success_once", "success_at_end", "episode_return", "episode_length")


@dataclass
class EvalResult:
    """
    Outcome of an evaluation.

    :param name: of the row
    :param episodes: number of episodes
    :param success_once: part of the episodes that succeeded at any env step
    :param success_at_end: part of the episodes that were successful at their last env step
    :param ci_low: lower end of the 95% Wilson interval of ``success_at_end``
    :param ci_high: upper end
    :param mean_return: mean undiscounted return in env steps' rewards
    :param mean_length: mean length in env steps
    """

    name: str
    episodes: int
    success_once: float
    success_at_end: float
    ci_low: float
    ci_high: float
    mean_return: float
    mean_length: float

    @classmethod
    def of(
        cls, name: str, success_once: np.ndarray, success_at_end: np.ndarray, returns: np.ndarray, lengths: np.ndarray
    ) -> EvalResult:
        """
        :param name: of the row
        :param success_once: of each episode, (episodes,)
        :param success_at_end: of each episode, (episodes,)
        :param returns: of each episode, (episodes,)
        :param lengths: of each episode in env steps, (episodes,)
        """
        interval = wilson_interval(int(success_at_end.sum()), len(success_at_end))
        means = (float(x.mean()) for x in (returns, lengths))
        return cls(name, len(returns), float(success_once.mean()), float(success_at_end.mean()), *interval, *means)

    def as_row(self) -> dict[str, Any]:
        """The row of ``report.json``."""
        row = dict(vars(self))
        row["return"] = row.pop("mean_return")
        row["length"] = row.pop("mean_length")
        return row


@dataclass
class Rollouts:
    """
    Macro-steps of whole episodes, grouped by episode and in order.

    :param cond: features, (n, C)
    :param w: noise that was executed, (n, T, A)
    :param chunk: actions that it became, (n, H, A)
    :param reward: macro rewards, (n,)
    :param discount: ``gamma^k``, 0 after a termination, (n,)
    :param next_cond: features afterwards, (n, C)
    :param episode: index of the episode, (n,)
    :param success_at_end: of each episode, (episodes,)
    :param env_steps: env steps that the simulator executed
    :param flow_hash: fingerprint of the flow that was steered
    :param gamma: discount per env step of rewards and discounts
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
    flow_hash: str
    gamma: float
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


@dataclass
class MacroStep:
    """One step of all envs; ``counts`` says which of them still play an episode of their quota."""

    obs: np.ndarray
    w: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]
    next_obs: np.ndarray
    counts: np.ndarray


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """
    95% Wilson score interval of a success rate.

    :param successes: number of successes
    :param episodes: number of episodes
    """
    from scipy.stats import binomtest  # a second of every import otherwise, in every worker, too

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def quota_per_env(episodes: int, n_envs: int) -> np.ndarray:
    """
    :param episodes: in all
    :param n_envs: envs that play them
    :return: episodes of each env, (n_envs,)
    """
    return np.full(n_envs, episodes // n_envs) + (np.arange(n_envs) < episodes % n_envs)


def play(
    player: Player,
    env: gym.Env | VecEnv,
    episodes: int,
    seed: int = 0,
    deterministic: bool = True,
    progress_bar: bool = False,
    name: str = "episodes",
    noise_seed: int | None = None,
) -> Iterator[MacroStep]:
    """
    Plays a fixed quota of episodes in each env. (Taking the first that finish would favour the short ones.)

    The same seed and number of envs start the same episodes, whatever plays them, in ManiSkill's envs on the CPU. A GPU
    simulator and other gym envs go on with one random generator, so there it holds as long as all episodes are equally long
    (and, in a gym env, draw equally many random numbers).

    :param player: see :data:`Player`
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param seed: of the envs
    :param deterministic: passed on to ``predict``
    :param progress_bar: show a progress bar
    :param name: shown beside the bar
    :param noise_seed: of the noise; None is ``seed``
    :raises ValueError: if there is no episode to play, or the player is unknown or was made for another flow
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, found {episodes}")
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    noise_seed = seed if noise_seed is None else noise_seed
    act = _actor(player, venv, noise_seed, deterministic)
    quota = quota_per_env(episodes, venv.num_envs)
    venv.seed(seed)
    obs = np.asarray(venv.reset())
    gpus = range(th.cuda.device_count() if th.cuda.is_initialized() else 0)  # manual_seed seeds them, too
    with tqdm(total=episodes, desc=name, disable=not progress_bar) as bar, th.random.fork_rng(gpus):
        th.manual_seed(noise_seed)
        while quota.any():
            w = act(obs)
            next_obs, rewards, dones, infos = venv.step(w)
            failed = np.array([info.get("worker_failed", False) for info in infos])
            counts = (quota > 0) & ~failed  # the episode that a failed worker lost is played again
            yield MacroStep(obs, w, rewards, dones, infos, np.asarray(next_obs), counts)
            finished = dones & counts
            bar.update(int(finished.sum()))
            quota = quota - finished
            obs = np.asarray(next_obs)


def evaluate(
    player: Player,
    env: gym.Env | VecEnv,
    episodes: int = 100,
    *,
    name: str | None = None,
    seed: int = 1_000_000,
    deterministic: bool = True,
    progress_bar: bool = False,
    noise_seed: int | None = None,
) -> EvalResult:
    """
    Success, return and length over a fixed quota of episodes per env.

    Let the env ignore terminations, so that ``success_at_end`` is judged at the time limit. Report deterministic and
    stochastic play: they can differ widely.

    :param player: a model or policy, a :class:`NoisePolicy` or "prior" (w ~ N(0, I)), "zero" (w = 0), or a fixed noise (T, A)
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param name: of the result; None takes the control's name or "model"
    :param seed: of the envs
    :param deterministic: w is the policy's mean; otherwise it is sampled from the policy
    :param progress_bar: show a progress bar
    :param noise_seed: of the noise, for the same episodes under other noise; None is ``seed``
    :raises ValueError: if the env does not report success
    """
    if name is None:
        name = player if isinstance(player, str) else "prior" if isinstance(player, NoisePolicy) else "model"
    infos = [
        info
        for step in play(player, env, episodes, seed, deterministic, progress_bar, f"evaluate {name}", noise_seed)
        for info in _final_infos(step)
    ]
    for key in ("episode_return", "success_once"):
        if key not in infos[0]:
            raise ValueError(
                f"The env's info holds no {key!r} at the end of an episode; expected an ActionChunkWrapper that sees success"
            )
    return EvalResult.of(name, *(np.array([info[key] for info in infos]) for key in OUTCOME))


def collect_rollouts(
    player: Player,
    env: gym.Env | VecEnv,
    episodes: int,
    *,
    seed: int = 0,
    deterministic: bool = False,
    progress_bar: bool = False,
) -> Rollouts:
    """
    Plays episodes and keeps every macro-step, with the noise that was executed.

    :param player: see :func:`evaluate`
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param seed: of the envs and of the noise
    :param deterministic: passed on to ``predict``
    :param progress_bar: show a progress bar
    """
    if isinstance(env, VecEnv) and unwrap_vec_normalize(env) is not None:
        raise ValueError("collect_rollouts needs the flow's own features and rewards: pass the env below VecNormalize")
    steering = find_steering(env)
    gamma = steering.gamma
    open_episodes: dict[int, list[tuple[Any, ...]]] = {}
    finished: list[list[tuple[Any, ...]]] = []
    final_infos: list[dict[str, Any]] = []
    env_steps = 0
    for step in play(player, env, episodes, seed, deterministic, progress_bar, "rollouts"):
        env_steps += sum(info["chunk_length"] for info in step.infos)
        for i, info in enumerate(step.infos):
            if info.get("worker_failed"):
                open_episodes.pop(i, None)
        for i in np.flatnonzero(step.counts):
            info = step.infos[i]
            ended = step.dones[i] and not info["TimeLimit.truncated"]
            discount = 0.0 if ended else gamma ** info["chunk_length"]
            after = info["terminal_observation"] if step.dones[i] else step.next_obs[i]
            row = (step.obs[i], step.w[i], info["action_chunk"], step.rewards[i], discount, after)
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
        steering.action_space.flow_hash,
        gamma,
        *(
            np.array([info[key] for info in final_infos]) if key in final_infos[0] else None
            for key in OUTCOME
            if key != "success_at_end"
        ),
    )


def results_table(results: Sequence[EvalResult]) -> str:
    """
    :param results: rows
    :return: a table for the terminal
    """
    frame = pd.DataFrame([result.as_row() for result in results])
    frame["95% interval"] = [f"{r.ci_low:.2f} - {r.ci_high:.2f}" for r in results]
    columns = ["name", "episodes", "success_once", "success_at_end", "95% interval", "return"]
    return frame[columns].to_string(index=False, float_format="{:.2f}".format)


def _final_infos(step: MacroStep) -> list[dict[str, Any]]:
    return [step.infos[i] for i in np.flatnonzero(step.counts & step.dones)]


def _actor(player: Player, venv: VecEnv, seed: int, deterministic: bool) -> Callable[[np.ndarray], np.ndarray]:
    shape = (venv.num_envs, *venv.action_space.shape)  # type: ignore[misc]
    space: Any = venv.action_space
    if isinstance(player, NoisePolicy):
        player = "prior"
    if isinstance(player, str):
        if player == "prior":
            rng = np.random.default_rng(seed)
            return lambda obs: rng.standard_normal(shape).clip(space.low, space.high).astype(np.float32)
        if player == "zero":
            return lambda obs: np.zeros(shape, np.float32)
        raise ValueError(f"Unknown control {player!r}; expected 'prior' (w ~ N(0, I)) or 'zero' (w = 0)")
    if isinstance(player, np.ndarray):
        fixed = np.broadcast_to(player.astype(np.float32), shape).clip(space.low, space.high)
        return lambda obs: fixed
    own = getattr(player, "action_space", None)
    if isinstance(own, NoiseSpace) and isinstance(space, NoiseSpace) and own.flow_hash != space.flow_hash:
        raise ValueError(f"The player steers flow {own.flow_hash}, but the env steers flow {space.flow_hash}")
    predictor = player
    return lambda obs: predictor.predict(obs, deterministic=deterministic)[0]
