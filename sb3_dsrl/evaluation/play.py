"""Plays a fixed quota of episodes per env, and evaluates with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm import tqdm

from sb3_dsrl.evaluation.results import OUTCOME, EvalResult
from sb3_dsrl.evaluation.vec_normalize import require_raw_features, statistics_kept
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.steering.contract import PLAYING, check_act_horizon, check_agreement
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.start_control import true_starts
from sb3_dsrl.utils.observations import map_frames


class Predictor(Protocol):
    """What SB3 algorithms and policies have in common here."""

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """Maps observations (N, C) to noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``."""


@runtime_checkable
class HasLatent(Protocol):
    """What holds a latent policy that sees the flow's own features, as :class:`~sb3_dsrl.SteeredPolicy` does."""

    @property
    def latent(self) -> Predictor:
        """Maps features to noise."""


@runtime_checkable
class ChoosesAtStart(Protocol):
    """What decides something for a whole episode, as :class:`~sb3_dsrl.TicketBandit` does."""

    def begin(self, obs: Any, starts: np.ndarray) -> None:
        """Is told, before each ``predict``, in which envs an episode begins, (N,)."""


#: Whatever chooses the noise: a model or a policy; a steered policy, by its latent one; a frozen flow, which stands for its
#: prior; the name of a control, "prior" or "zero"; or one fixed noise, (T, A), (H, A) or (1, A), see ``steer_mode``. What is
#: not learned plays residual 0, where there is one.
Actor = Predictor | HasLatent | SteerablePolicy | str | np.ndarray


@dataclass
class MacroStep:
    """
    One step of all envs; ``counts`` says which of them still play an episode of their quota, and ``w`` are the actions, noise
    and residual if there is one.
    """

    obs: Any
    w: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]
    next_obs: Any
    counts: np.ndarray


def count_env_steps(infos: Iterable[Mapping[str, Any]]) -> int:
    """
    :param infos: of one macro-step of all envs
    :return: env steps that the simulators executed, those of envs that idle along included
    """
    return sum(info["chunk_length"] for info in infos)


def as_vec_env(env: gym.Env | VecEnv) -> VecEnv:
    """
    :param env: gym or vectorised
    :return: a VecEnv, of one env if it was a gym env
    """
    return env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])


def quota_per_env(episodes: int, n_envs: int) -> np.ndarray:
    """
    :param episodes: in all
    :param n_envs: envs that play them
    :return: episodes of each env, (n_envs,)
    """
    return np.full(n_envs, episodes // n_envs) + (np.arange(n_envs) < episodes % n_envs)


def play(
    actor: Actor,
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

    The env may be one that a model trains in: no VecNormalize updates its statistics meanwhile, no episode starts from a
    recorded one, and a model that plays in its own training env begins new episodes when it learns on.

    :param actor: see :data:`Actor`
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param seed: of the envs
    :param deterministic: passed on to ``predict``
    :param progress_bar: show a progress bar
    :param name: shown beside the bar
    :param noise_seed: of the noise; None is ``seed``
    :raises ValueError: if there is no episode to play, or the actor is unknown or was made for another flow
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, found {episodes}")
    venv = as_vec_env(env)
    noise_seed = seed if noise_seed is None else noise_seed
    act = actor_function(actor, venv, noise_seed, deterministic)
    quota = quota_per_env(episodes, venv.num_envs)
    gpus = range(th.cuda.device_count() if th.cuda.is_initialized() else 0)  # manual_seed seeds them, too
    bar = tqdm(total=episodes, desc=name, disable=not progress_bar)
    with bar, th.random.fork_rng(gpus), statistics_kept(venv), _own_env_left_behind(actor, venv), true_starts(venv):
        venv.seed(seed)
        obs: Any = map_frames(np.asarray, venv.reset())
        th.manual_seed(noise_seed)
        starts = np.ones(venv.num_envs, bool)
        while quota.any():
            if isinstance(actor, ChoosesAtStart):
                actor.begin(obs, starts)
            w = act(obs)
            next_obs, rewards, dones, infos = venv.step(w)
            failed = np.array([info.get("worker_failed", False) for info in infos])
            counts = (quota > 0) & ~failed  # the episode that a failed worker lost is played again
            yield MacroStep(obs, w, rewards, dones, infos, map_frames(np.asarray, next_obs), counts)
            finished = dones & counts
            bar.update(int(finished.sum()))
            quota = quota - finished
            obs, starts = map_frames(np.asarray, next_obs), dones


def evaluate(
    actor: Actor,
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

    :param actor: a model, a policy or a :class:`~sb3_dsrl.SteeredPolicy`; a flow or "prior" (w ~ N(0, I)); "zero" (w = 0); or
        one fixed noise, of the shape that the env steers. All but the first three play residual 0, where there is one;
        :func:`~sb3_dsrl.without_residual` makes these do so, too.
    :param env: steered env, gym or vectorised
    :param episodes: in all; split evenly over the envs
    :param name: of the result; None takes the control's name or "model"
    :param seed: of the envs
    :param deterministic: w is the policy's mean, except for a :class:`~sb3_dsrl.SteeredPolicy` that is to be sampled;
        otherwise it is sampled from the policy
    :param progress_bar: show a progress bar
    :param noise_seed: of the noise, for the same episodes under other noise; None is ``seed``
    :return: success with its interval, return and length, the last two in env steps
    :raises ValueError: if the env does not report success, there is no episode to play, or the actor is unknown or was made
        for another flow
    """
    if name is None:
        name = actor if isinstance(actor, str) else "prior" if isinstance(actor, SteerablePolicy) else "model"
    final_infos: list[dict[str, Any]] = []
    for step in play(actor, env, episodes, seed, deterministic, progress_bar, f"evaluate {name}", noise_seed):
        require_success(step.infos, "evaluate")
        final_infos += [step.infos[i] for i in np.flatnonzero(step.counts & step.dones)]
    return EvalResult.of(name, *(np.array([info[key] for info in final_infos]) for key in OUTCOME))


def require_success(infos: list[dict[str, Any]], who: str) -> None:
    """
    :param infos: of one macro-step of all envs
    :param who: needs to know success, the subject of the message
    :raises ValueError: if an env does not report it
    """
    for info in infos:
        if "worker_failed" in info:
            continue
        if "chunk_length" not in info:
            raise ValueError(f"{who} needs a steered env, but the env's info holds no 'chunk_length': use make_latent_env")
        if "is_success" not in info:
            raise ValueError(
                f"{who} needs to know success, but the env's info holds no 'is_success': expected an "
                f"env that reports 'success' or 'is_success' at every step"
            )


@contextmanager
def _own_env_left_behind(actor: Actor, venv: VecEnv) -> Iterator[None]:
    """A model that has played in the env it trains in must not learn on from the observation that it had before."""
    try:
        yield
    finally:
        model = getattr(actor, "model", actor)  # of without_residual
        if isinstance(model, BaseAlgorithm):
            own = model.get_env()
            if own is not None and share_a_simulator(own, venv):
                model._last_obs = None  # learn() then resets the env


def share_a_simulator(a: gym.Env | VecEnv, b: gym.Env | VecEnv) -> bool:
    """
    :param a: gym or vectorised
    :param b: gym or vectorised
    :return: whether the same env of this process is below both
    """
    return not _innermost(a).isdisjoint(_innermost(b))


def _innermost(env: gym.Env | VecEnv) -> set[int]:
    base = env.unwrapped
    return {id(inner.unwrapped) for inner in base.envs} if isinstance(base, DummyVecEnv) else {id(base)}


def actor_function(actor: Actor, venv: VecEnv, seed: int, deterministic: bool) -> Callable[[np.ndarray], np.ndarray]:
    space: Any = venv.action_space
    shape = (venv.num_envs, *(space.noise_shape if isinstance(space, NoiseSpace) else space.shape))

    def played(noise: np.ndarray) -> np.ndarray:
        action = space.join(noise) if isinstance(space, NoiseSpace) else noise
        return action.clip(space.low, space.high).astype(np.float32)

    if isinstance(actor, SteerablePolicy):
        if isinstance(space, NoiseSpace):
            check_act_horizon(actor, space.contract)
            if actor.fingerprint() != space.contract.flow_hash:
                raise ValueError(
                    f"The env steers flow {space.contract.flow_hash}, but the flow to play is {actor.fingerprint()}"
                )
        actor = "prior"
    if isinstance(actor, str):
        if actor == "prior":
            rng = np.random.default_rng(seed)
            return lambda obs: played(rng.standard_normal(shape))
        if actor == "zero":
            return lambda obs: played(np.zeros(shape))
        raise ValueError(f"Unknown control {actor!r}; expected 'prior' (w ~ N(0, I)) or 'zero' (w = 0)")
    if isinstance(actor, np.ndarray):
        fixed = played(np.broadcast_to(actor.astype(np.float32), shape))
        return lambda obs: fixed
    if isinstance(actor, HasLatent):
        require_raw_features(venv, "A steered policy")
        deterministic = deterministic and getattr(actor, "deterministic", True)
        actor = actor.latent
    own = getattr(actor, "action_space", None)
    if isinstance(own, NoiseSpace) and isinstance(space, NoiseSpace):
        check_agreement("model", own.contract, "env", space.contract, PLAYING)
    predictor = actor
    return lambda obs: predictor.predict(obs, deterministic=deterministic)[0]
