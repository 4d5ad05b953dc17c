"""Chunk envs of one process, whose simulators may take their steps together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_dsrl.steering.chunk_env import ActionChunkWrapper


class Together(Protocol):
    """Envs that take their steps together, with the results that each has by itself."""

    @property
    def works(self) -> bool:
        """Whether they still do."""

    def begin(self) -> None:
        """A chunk begins; envs may have been reset since the last one."""

    def end(self) -> None:
        """A chunk is over, or has failed."""

    def step(self, actions: dict[int, np.ndarray], observing: bool) -> dict[int, tuple[Any, ...]]:
        """
        :param actions: (A,) of each env that takes part
        :param observing: whether the observation is seen; otherwise it may be an old one
        :return: what ``step`` of each of these envs returns
        """


class LockstepVecEnv(DummyVecEnv):
    """
    SB3's ``DummyVecEnv``, with the same results. Chunk envs go through their chunks side by side, if the envs below them can
    take their steps together: if they have a method ``together``, which takes all of them and returns a :class:`Together` or
    None.

    :param env_fns: make the envs
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        super().__init__(list(env_fns))
        self._together: Together | None = None
        if len(self.envs) > 1 and all(type(env) is ActionChunkWrapper for env in self.envs):
            below = [env.env for env in self.envs]  # type: ignore[attr-defined]
            if below[0].has_wrapper_attr("together"):
                self._together = below[0].get_wrapper_attr("together")(below)

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations (N, ...), rewards (N,), dones (N,), infos
        """
        if self._together is None or not self._together.works:
            return super().step_wait()
        envs, results = self.envs, self._chunks(self._together)
        self.envs = [_Played(env, results[i]) for i, env in enumerate(envs)]  # type: ignore[misc]
        try:
            return super().step_wait()
        finally:
            self.envs = envs

    def set_sim_states(self, states: Sequence[Any], indices: VecEnvIndices = None) -> None:
        """
        :param states: of :meth:`ActionChunkWrapper.get_sim_state <sb3_dsrl.ActionChunkWrapper.get_sim_state>`, one of each
        :param indices: of the envs; None are all
        """
        for i, state in zip(self._get_indices(indices), states, strict=True):
            self.env_method("set_sim_state", state, indices=[i])

    def _chunks(self, together: Together) -> dict[int, Any]:
        envs: list[Any] = self.envs
        chunks = {i: env.chunk_steps(self.actions[i]) for i, env in enumerate(envs)}
        wanted: dict[int, tuple[np.ndarray, bool]] = {}
        results: dict[int, Any] = {}
        for i, chunk in chunks.items():
            try:
                wanted[i] = next(chunk)
            except StopIteration as end:  # an episode that is held at its end
                results[i] = end.value
        together.begin()
        try:
            while wanted:
                actions = {i: action for i, (action, _) in wanted.items()}
                steps = together.step(actions, any(observing for _, observing in wanted.values()))
                for i, step in steps.items():
                    try:
                        wanted[i] = chunks[i].send(step)
                    except StopIteration as end:
                        results[i] = end.value
                        del wanted[i]
        finally:
            together.end()
        return results


class _Played:
    """An env whose step was taken already."""

    def __init__(self, env: gym.Env, result: tuple[Any, ...]) -> None:
        self.reset, self._result = env.reset, result

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        return self._result
