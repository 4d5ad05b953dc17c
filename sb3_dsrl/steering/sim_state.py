"""States of simulators that one can go back to.

An env can go back if it, or a wrapper around it, has two methods: ``get_sim_state()`` returns a state, which can be pickled,
and ``set_sim_state(state)`` goes back to it within the same episode. :mod:`sb3_dsrl.envs` gives them to ManiSkill's envs; an
env of your own may have them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices


def can_restore(env: gym.Env) -> bool:
    """
    :param env: any env
    :return: whether it has ``get_sim_state`` and ``set_sim_state``
    """
    return all(env.has_wrapper_attr(name) for name in ("get_sim_state", "set_sim_state"))


def get_sim_state(env: gym.Env) -> dict[str, Any]:
    """
    The env's own state, and the counters of wrappers around it: what they hold in plain numbers, arrays and lists of such, as
    gymnasium's ``TimeLimit`` and SB3's ``Monitor`` do.

    :param env: any env
    :return: for :func:`set_sim_state`
    :raises ValueError: if it cannot go back to a state
    """
    if not can_restore(env):
        name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
        raise ValueError(cannot_restore(name))
    return dict(own=env.get_wrapper_attr("get_sim_state")(), wrappers=wrapper_counters(env))


def set_sim_state(env: gym.Env, state: dict[str, Any]) -> None:
    """
    :param env: the env that :func:`get_sim_state` was asked of
    :param state: what it returned
    """
    env.get_wrapper_attr("set_sim_state")(state["own"])
    set_wrapper_counters(env, state["wrappers"])


def cannot_restore(name: str) -> str:
    """
    :param name: of an env
    :return: the sentence that says so
    """
    return (
        f"{name} cannot go back to a state: it needs the methods get_sim_state() and set_sim_state(state), "
        f"which ManiSkill's envs get from make_latent_env"
    )


def get_sim_states(venv: VecEnv, indices: VecEnvIndices = None) -> list[Any]:
    """
    :param venv: vectorised chunk envs, in this process or others; not a batched simulator
    :param indices: None are all envs
    :return: a state of each
    """
    return venv.env_method("get_sim_state", indices=indices)


def set_sim_states(venv: VecEnv, states: Sequence[Any], indices: VecEnvIndices = None) -> None:
    """
    :param venv: vectorised chunk envs, in this process or others; not a batched simulator
    :param states: one of each of these envs
    :param indices: None are all envs
    """
    base: Any = venv.unwrapped
    wanted = list(venv._get_indices(indices))
    if len(states) != len(wanted):
        raise ValueError(f"There must be one state for each of {len(wanted)} envs, found {len(states)}")
    if hasattr(base, "set_sim_states"):  # one message a worker
        base.set_sim_states(states, wanted)
        return
    for i, state in zip(wanted, states, strict=True):
        base.env_method("set_sim_state", state, indices=[i])


def _wrappers_above(env: gym.Env) -> list[gym.Wrapper]:
    """The wrappers outside of the layer that knows its state."""
    layers: list[gym.Wrapper] = []
    layer: Any = env
    while isinstance(layer, gym.Wrapper) and not hasattr(layer, "get_sim_state"):
        layers.append(layer)
        layer = layer.env
    return layers


def wrapper_counters(env: gym.Env) -> list[dict[str, Any]]:
    """
    :param env: any env
    :return: what its wrappers hold in plain numbers, arrays and lists of such, down to a layer that knows its state or to the
        env
    """
    return [
        {name: deepcopy(value) for name, value in vars(layer).items() if _is_plain(value)} for layer in _wrappers_above(env)
    ]


def set_wrapper_counters(env: gym.Env, counters: Sequence[dict[str, Any]]) -> None:
    """
    :param env: the env that :func:`wrapper_counters` was asked of
    :param counters: what it returned
    """
    for layer, kept in zip(_wrappers_above(env), counters, strict=True):
        vars(layer).update(deepcopy(kept))


def set_elapsed_steps(env: gym.Env, elapsed_steps: int) -> None:
    """
    :param env: any env
    :param elapsed_steps: that gymnasium's ``TimeLimit`` has counted in this episode
    """
    for layer in _wrappers_above(env):
        if isinstance(layer, gym.wrappers.TimeLimit):
            layer._elapsed_steps = elapsed_steps  # type: ignore[assignment]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | deque):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    return value is None or isinstance(value, bool | int | float | str | np.number | np.ndarray)
