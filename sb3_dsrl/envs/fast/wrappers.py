"""The wrappers around a ManiSkill env in one function."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.wrappers import OrderEnforcing
from mani_skill.utils import common
from mani_skill.utils.registration import TimeLimitWrapper
from mani_skill.utils.wrappers import CPUGymWrapper

#: The wrappers that are known, from the outermost to the env.
CHAIN = [CPUGymWrapper, TimeLimitWrapper, OrderEnforcing]


def wrapper_types(env: gym.Env) -> list[type]:
    """
    :param env: any env
    :return: the types of its wrappers, from the outermost to the env
    """
    types = []
    while isinstance(env, gym.Wrapper):
        types.append(type(env))
        env = env.env
    return types


def speed_up_wrappers(env: gym.Env) -> None:
    """
    Stands for the chain of ``step`` from ``CPUGymWrapper`` to the env, if it is the one of ``CHAIN``.

    :param env: a ManiSkill env with wrappers
    """
    top: Any = env
    if wrapper_types(env) != CHAIN or top.ignore_terminations or top.record_metrics:
        return
    plain, limit, order, base = top.step, top.env, top.env.env, top.unwrapped

    def step(action: np.ndarray) -> tuple[Any, ...]:
        """Stands for ``CPUGymWrapper.step``, ``TimeLimitWrapper.step`` and ``OrderEnforcing.step``."""
        if not order._has_reset or limit._max_episode_steps is None:
            return plain(action)
        obs, reward, terminated, _, info = base.step(action)
        truncated = base._elapsed_steps >= limit._max_episode_steps
        return unbatched(obs), unbatched(reward), unbatched(terminated), unbatched(truncated), unbatched(info)

    top.step = step


def unbatched(value: Any) -> Any:
    """
    Stands for ``common.unbatch(common.to_numpy(value))``.

    :param value: a tensor, or a dict of such, or anything else that an info holds
    """
    if isinstance(value, th.Tensor) and value.shape == (1,):
        return value.item()
    if isinstance(value, dict):
        return {key: unbatched(part) for key, part in value.items()}
    return common.unbatch(common.to_numpy(value))
