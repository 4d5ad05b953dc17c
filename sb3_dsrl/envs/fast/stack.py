"""Envs of one process that take their steps together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.tabletop import (
    LiftPegUprightEnv,
    PegInsertionSideEnv,
    PickCubeEnv,
    PushCubeEnv,
    StackCubeEnv,
)
from mani_skill.utils.wrappers import CPUGymWrapper

from sb3_dsrl.envs.fast.views import NotStackable, own_functions, stacked
from sb3_dsrl.envs.fast.wrappers import CHAIN, wrapper_types

#: Tasks of which it is known that they compute the same for many envs at once as for one, and that they keep nothing.
STACKED: tuple[type[BaseEnv], ...] = (PushCubeEnv, PickCubeEnv, LiftPegUprightEnv, StackCubeEnv, PegInsertionSideEnv)

#: Functions that the other shortcuts bind to an env.
BOUND = {"_reconfigure", "get_obs", "_flatten_raw_obs", "evaluate", "compute_dense_reward"}

#: Of a task that computes something at each step, beside the physics.
HOOKS = ("_before_control_step", "_after_control_step", "_before_simulation_step", "_after_simulation_step")

#: Env steps that are checked against those of the envs by themselves: the first ones, and later one in so many.
FIRST_CHECKS, CHECK_EVERY = 16, 256

#: What a step returns.
PARTS = ("observation", "reward", "terminated", "truncated", "info")

#: As many at once. From 8 on torch takes other instructions for angles and the like, whose results differ in the last bit.
MOST = 4


def may_stack(envs: Sequence[gym.Env]) -> bool:
    """
    :param envs: fast ManiSkill envs
    :return: whether they can take their steps together
    """
    bases: list[Any] = [env.unwrapped for env in envs]
    kind = type(bases[0])
    return (
        len(envs) > 1
        and kind in STACKED
        and all(base.obs_mode == "state" for base in bases)
        and all(env.has_wrapper_attr("together") and _only_passed_on(env) for env in envs)
        and kind.step is BaseEnv.step
        and all(getattr(kind, name) is getattr(BaseEnv, name) for name in HOOKS)
        and all(type(base) is kind and isinstance(base.agent, BaseAgent) and own_functions(base) <= BOUND for base in bases)
    )


def _only_passed_on(env: Any) -> bool:
    """Whether :meth:`Stack.step` leaves out nothing that the wrappers do at a step."""
    while isinstance(env, gym.Wrapper) and type(env) is not CPUGymWrapper:
        if type(env).step is not gym.Wrapper.step:
            return False
        env = env.env
    return wrapper_types(env) == CHAIN and "step" in vars(env)


class Stack:
    """
    Steps envs one by one, but evaluates, rewards and observes all of them at once: for a few numbers the time goes into
    torch's calls, not into the arithmetic.

    Results are those of the envs by themselves, bit for bit. That is checked for the first env steps, and for some later. If
    they differ, or something cannot be stacked, the envs go on by themselves, and a warning says so.

    :param envs: for which :func:`may_stack` is true
    """

    def __init__(self, envs: Sequence[gym.Env]) -> None:
        self.envs = list(envs)
        self.bases: list[Any] = [env.unwrapped for env in envs]
        self.reason: str | None = None
        self._limits = [env.get_wrapper_attr("_max_episode_steps") for env in envs]
        self._actions = [th.zeros(1, *env.action_space.shape) for env in envs]  # type: ignore[misc]
        self._view: Any = None
        self._moment, self._steps = [0], 0

    @property
    def works(self) -> bool:
        """Whether the envs still take their steps together."""
        return self.reason is None

    def begin(self) -> None:
        """What the envs are now: scenes may have been built anew, and goals moved, since the last step."""
        if not self.works:
            return
        try:
            self._view = stacked(self.bases, self._moment)
        except NotStackable as error:
            self._give_up(str(error))

    def end(self) -> None:
        """Lets go of the scenes."""
        self._view = None

    def step(self, actions: dict[int, np.ndarray], observing: bool) -> dict[int, tuple[Any, ...]]:
        """
        :param actions: (A,) of each env that takes part
        :param observing: whether the observation is seen; otherwise it may be an old one
        :return: what ``step`` of each of these envs returns
        """
        if not self.works or len(actions) < 2:
            return {i: self._alone(i, action, observing) for i, action in actions.items()}
        for i, action in actions.items():
            self._actions[i] = self.bases[i]._step_action(action)
        self._moment[0] += 1
        self._steps += 1
        expected = None
        if self._steps <= FIRST_CHECKS or self._steps % CHECK_EVERY == 0:
            expected = self._evaluated(actions, observing)
        else:
            for i in actions:
                self.bases[i]._elapsed_steps += 1
        try:
            found = self._together(actions, observing)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            if expected is None:
                for i in actions:
                    self.bases[i]._elapsed_steps -= 1  # counted again there
                expected = self._evaluated(actions, observing)
            return expected
        if expected is None:
            return found
        for i, own in expected.items():
            pairs = zip(PARTS, own, found[i], strict=True)
            different = [name for name, *pair in pairs if (observing or name != PARTS[0]) and not identical(*pair)]
            if different:
                self._give_up(f"env {i} by itself has another {' and '.join(different)} than together with the others")
                break
        return expected

    def _together(self, actions: dict[int, np.ndarray], observing: bool) -> dict[int, tuple[Any, ...]]:
        vars(self._view)["observing"] = observing
        obs, *rest, info = self._view.step(self._actions)
        n = len(self.bases)
        seen = unstacked(obs, n) if observing else [base._last_obs.numpy()[0] for base in self.bases]
        reward, terminated, _ = (unstacked(part, n) for part in rest)
        infos = unstacked(info, n)
        return {
            i: (seen[i], reward[i], terminated[i], infos[i]["elapsed_steps"] >= self._limits[i], infos[i]) for i in actions
        }

    def _evaluated(self, actions: dict[int, np.ndarray], observing: bool) -> dict[int, tuple[Any, ...]]:
        """The step of each env by itself, after its physics."""
        results = {}
        for i, action in actions.items():
            moved = self._actions[i]
            self.bases[i]._step_action = lambda action, moved=moved: moved
            try:
                results[i] = self._alone(i, action, observing)
            finally:
                del self.bases[i]._step_action
                self.envs[i].get_wrapper_attr("set_observing")(True)  # for those who ask between two chunks
        return results

    def _alone(self, i: int, action: np.ndarray, observing: bool) -> tuple[Any, ...]:
        self.envs[i].get_wrapper_attr("set_observing")(observing)
        return self.envs[i].step(action)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(
            f"{self.bases[0].spec.id}: the envs of this process are evaluated one by one from now on, which is slower but "
            f"changes no result: {reason}"
        )


class Stacks:
    """
    As many stacks as the envs of a process need.

    :param envs: for which :func:`may_stack` is true
    """

    def __init__(self, envs: Sequence[gym.Env]) -> None:
        parts = np.array_split(range(len(envs)), math.ceil(len(envs) / MOST))
        self.stacks = {int(part[0]): Stack([envs[i] for i in part]) for part in parts}

    @property
    def works(self) -> bool:
        """Whether envs still take their steps together."""
        return any(stack.works for stack in self.stacks.values())

    def begin(self) -> None:
        """See :meth:`Stack.begin`."""
        for stack in self.stacks.values():
            stack.begin()

    def end(self) -> None:
        """See :meth:`Stack.end`."""
        for stack in self.stacks.values():
            stack.end()

    def step(self, actions: dict[int, np.ndarray], observing: bool) -> dict[int, tuple[Any, ...]]:
        """See :meth:`Stack.step`."""
        results: dict[int, tuple[Any, ...]] = {}
        for first, stack in self.stacks.items():
            own = {i: actions[first + i] for i in range(len(stack.envs)) if first + i in actions}
            results |= {first + i: result for i, result in stack.step(own, observing).items()}
        return results


def unstacked(value: Any, n: int) -> list[Any]:
    """
    :param value: a tensor (N, ...), or a dict of such
    :param n: N
    :return: for each env what :func:`~sb3_dsrl.envs.fast.wrappers.unbatched` makes of its own
    :raises NotStackable: if it is something else
    """
    if isinstance(value, dict):
        parts = {key: unstacked(part, n) for key, part in value.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(n)]
    if not isinstance(value, th.Tensor) or not value.ndim or len(value) != n:
        raise NotStackable(f"{value} has no batch axis")
    return value.tolist() if value.ndim == 1 else list(value.numpy())


def identical(a: Any, b: Any) -> bool:
    """
    :param a: a nested result of a step
    :param b: another
    :return: whether they are equal in every type and bit
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    x, y = np.asarray(a), np.asarray(b)
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()
