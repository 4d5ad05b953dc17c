"""How envs of a simulator become standard gym envs, without this package importing the simulator."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym

#: An adapter returns the standard form of an env that it knows, and None for every other env.
Adapter = Callable[[gym.Env], gym.Env | None]

#: :mod:`sb3_dsrl.envs` adds ManiSkill's.
ADAPTERS: list[Adapter] = []


def standard_env(env: gym.Env) -> gym.Env:
    """
    :param env: any env
    :return: what the first adapter that knows it makes of it, or the env itself
    """
    for adapter in ADAPTERS:
        adapted = adapter(env)
        if adapted is not None:
            return adapted
    return env
