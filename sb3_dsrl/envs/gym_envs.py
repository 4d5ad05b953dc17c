"""Any gymnasium env from an env id or a callable: chunk envs, in this process or in workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.envs.worker_vec_env import spread_envs
from sb3_dsrl.envs.workers import WorkerSettings
from sb3_dsrl.steering.chunk_env import ActionChunkWrapper
from sb3_dsrl.steering.starts import RecordedStarts

EnvMaker = Callable[..., gym.Env]


class SuccessKey(gym.Wrapper):
    """
    An env that says of its success under another name than ``info["success"]``. It need not say so at every step, but once
    in an episode.

    :param env: the env
    :param key: of ``info``; what it holds becomes ``info["success"]``, as true or false
    :raises ValueError: in ``step``, if an episode ends without it
    """

    def __init__(self, env: gym.Env, key: str) -> None:
        super().__init__(env)
        self._key, self._seen = key, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As the env does it."""
        self._seen = False
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: of the env
        """
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self._key in info:
            self._seen = True
            info = dict(info, success=bool(info[self._key]))
        elif (terminated or truncated) and not self._seen:
            name = self.spec.id if self.spec is not None else type(self.unwrapped).__name__
            raise ValueError(f"success_key={self._key!r} is in no info of this episode of {name}, which holds {sorted(info)}")
        return obs, reward, terminated, truncated, info


def env_maker(
    env_id: str | EnvMaker,
    *,
    max_episode_steps: int | None = None,
    success_key: str | None = None,
    wrapper_class: Callable[..., gym.Env] | None = None,
    wrapper_kwargs: Mapping[str, Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Callable[[], gym.Env]:
    """
    What makes one raw env, here or in a process that has imported less.

    :param env_id: an id of gymnasium, or a class or function that returns an env
    :param max_episode_steps: time limit in env steps; None is the env's own
    :param success_key: see :class:`SuccessKey`; None is "success" or "is_success"
    :param wrapper_class: wrapper, or function of one env, around each env
    :param wrapper_kwargs: its arguments
    :param env_kwargs: arguments of ``gym.make`` or of the callable
    :raises ValueError: if there is no such id; when called, if the env has a time limit of its own beside
        ``max_episode_steps``, or does not know an argument
    """
    if wrapper_kwargs and wrapper_class is None:
        raise ValueError(f"wrapper_kwargs holds {sorted(wrapper_kwargs)}, but there is no wrapper_class")
    spec = _spec(env_id) if isinstance(env_id, str) else None
    maker = None if isinstance(env_id, str) else env_id
    kwargs, wrapper_kwargs = dict(env_kwargs or {}), dict(wrapper_kwargs or {})

    def make() -> gym.Env:
        if spec is not None:  # and not its id: whoever registered that has perhaps not been imported here
            try:
                env = gym.make(spec, max_episode_steps, **kwargs)
            except TypeError as error:
                raise ValueError(f"{spec.id} cannot be made as asked for: {error}") from error
        else:
            assert maker is not None
            env = maker(**kwargs)
            if max_episode_steps is not None:
                env = _limited(env, max_episode_steps)
        if wrapper_class is not None:
            env = wrapper_class(env, **wrapper_kwargs)
        return env if success_key is None else SuccessKey(env, success_key)

    return make


def make_chunk_env(
    env_id: str | EnvMaker,
    n_envs: int = 1,
    *,
    act_horizon: int = 1,
    obs_horizon: int = 1,
    max_episode_steps: int | None = None,
    ignore_terminations: bool | None = None,
    cut_at_time_limit: bool = False,
    gamma: float = 0.99,
    reward_scale: float = 1.0,
    workers: WorkerSettings | None = None,
    starts: RecordedStarts | None = None,
    **env: Any,
) -> VecEnv:
    """
    Many envs whose actions are chunks. One env runs in this process, several in worker processes or on a Ray cluster.

    :param env_id: an id of gymnasium, or a class or function that returns an env
    :param n_envs: N
    :param act_horizon: H, env steps in a chunk
    :param obs_horizon: frames in an observation
    :param max_episode_steps: time limit in env steps; None is the env's own
    :param ignore_terminations: see :class:`~sb3_dsrl.ActionChunkWrapper`
    :param cut_at_time_limit: see :class:`~sb3_dsrl.ActionChunkWrapper`
    :param gamma: discount per env step
    :param reward_scale: factor on the macro reward
    :param workers: how the envs are spread over workers; None is the default, and no worker for one env
    :param starts: recorded episodes to start from, see :class:`~sb3_dsrl.steering.starts.StateStarts`
    :param env: further arguments of :func:`env_maker`
    :return: the vectorised env; actions are (H, A), observations (obs_horizon, D), or dicts of such
    :raises ValueError: if an argument does not fit
    """
    make = env_maker(env_id, max_episode_steps=max_episode_steps, **env)

    def make_chunked() -> gym.Env:
        return ActionChunkWrapper(
            make(), act_horizon, obs_horizon, gamma, ignore_terminations, reward_scale, cut_at_time_limit, starts
        )

    return spread_envs(make_chunked, n_envs, workers, hide_gpu=False)  # nobody knows whether these envs need it


def _spec(env_id: str) -> gym.envs.registration.EnvSpec:
    package, _, name = env_id.rpartition(":")  # as gym.make has it
    try:
        if package:
            import_module(package)
        return gym.spec(name)
    except ImportError as error:
        raise ValueError(f"{env_id!r} cannot be made: {error}") from error
    except gym.error.Error as error:
        raise ValueError(f"{env_id!r} cannot be made, import the package that registers it: {error}") from error


def _limited(env: gym.Env, max_episode_steps: int) -> gym.Env:
    if is_wrapped(env, TimeLimit):
        raise ValueError(
            f"max_episode_steps={max_episode_steps} was given, but the env that the callable returns has a TimeLimit already: "
            f"set that"
        )
    return TimeLimit(env, max_episode_steps)
