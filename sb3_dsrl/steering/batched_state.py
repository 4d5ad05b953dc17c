"""States of a batched simulator that one can go back to.

A simulator with ``get_sim_state()`` and ``set_sim_state(state, env_idx)`` of its own is asked for them. One with ManiSkill's
``get_state_dict`` and ``set_state_dict`` gets here what these leave out: elapsed steps, controllers, what the task keeps in
tensors. Not yet run on ``physx_cuda``: the tests have a scripted simulator with the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch as th

#: Attributes that are no part of a state: observations that nobody reads again.
NOT_KEPT = {"_last_obs", "_init_raw_obs", "_init_raw_state"}

State = dict[str, Any]


def can_restore_batch(env: Any) -> bool:
    """
    :param env: a batched simulator
    :return: whether it can go back to a state
    """
    return _has(env, "get_sim_state", "set_sim_state") or _has(env, "get_state_dict", "set_state_dict")


def get_batch_state(env: Any) -> Any:
    """
    :param env: a batched simulator for which :func:`can_restore_batch` is true
    :return: for :func:`set_batch_state`
    """
    if _has(env, "get_sim_state", "set_sim_state"):
        return env.get_wrapper_attr("get_sim_state")()
    n = env.unwrapped.num_envs
    return dict(
        simulator=_each(th.clone, env.unwrapped.get_state_dict()),
        tensors=[{name: tensor.clone() for name, tensor in _rows(part, n)} for part in _parts(env.unwrapped)],
    )


def set_batch_state(env: Any, state: Any, env_idx: th.Tensor) -> None:
    """
    :param env: the simulator that :func:`get_batch_state` was asked of
    :param state: what it returned
    :param env_idx: envs that go back, (n,), in ascending order
    """
    if _has(env, "get_sim_state", "set_sim_state"):
        env.get_wrapper_attr("set_sim_state")(state, env_idx)
        return
    base = env.unwrapped
    base.set_state_dict(_each(lambda tensor: tensor[env_idx], state["simulator"]), env_idx)
    for part, kept in zip(_parts(base), state["tensors"], strict=True):
        now = dict(_rows(part, base.num_envs))
        for name, tensor in kept.items():
            # a tensor of its own: who holds the old one, of an info say, keeps what it was
            fresh = now[name].clone() if name in now else tensor.clone()
            fresh[env_idx] = tensor[env_idx]
            _put(part, name, fresh)


def _has(env: Any, *names: str) -> bool:
    try:
        return all(env.get_wrapper_attr(name) is not None for name in names)
    except AttributeError:
        return False


def _each(fn: Callable[[th.Tensor], th.Tensor], state: Any) -> Any:
    return {key: _each(fn, value) for key, value in state.items()} if isinstance(state, dict) else fn(state)


def _parts(base: Any) -> Iterator[Any]:
    """The task and its controllers: what keeps tensors beside the simulator."""
    yield base
    yield from controllers_of(base)


def controllers_of(base: Any) -> Iterator[Any]:
    """
    :param base: an env of ManiSkill, or one with the same interface
    :return: the controllers of its robots, each before its parts
    """
    agent = getattr(base, "agent", None)
    for one in [] if agent is None else getattr(agent, "agents", [agent]):
        yield from _with_parts(one.controller)


def _with_parts(controller: Any) -> Iterator[Any]:
    yield controller
    parts = getattr(controller, "controllers", {})
    for part in parts.values() if isinstance(parts, dict) else parts:
        yield from _with_parts(part)


def _rows(part: Any, n: int) -> Iterator[tuple[str, th.Tensor]]:
    """Its tensors and poses with a row for each env."""
    for name, value in vars(part).items():
        tensor = getattr(value, "raw_pose", value)
        if name not in NOT_KEPT and isinstance(tensor, th.Tensor) and tensor.ndim and len(tensor) == n:
            yield name, tensor


def _put(part: Any, name: str, tensor: th.Tensor) -> None:
    value = getattr(part, name)
    setattr(part, name, type(value)(tensor) if hasattr(value, "raw_pose") else tensor)
