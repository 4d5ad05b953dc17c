"""Many envs, spread over few workers: one message a worker and macro-step each way, whatever carries the messages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_dsrl.envs.workers import START_TIMEOUT, EnvFn, WorkerError, WorkerSettings
from sb3_dsrl.utils.observations import map_frames

#: A worker is started again after so many failures in a row, and no more.
MAX_FAILURES = 3


class WorkerVecEnv(VecEnv):
    """
    Many envs, spread evenly over fewer workers. Stepping several envs one after the other in each of as many workers as
    there are cores beats one worker an env, whose processes only get in each other's way.

    Where SB3's ``SubprocVecEnv`` waits for ever or raises a bare EOFError, an exception in an env or a worker that dies or
    hangs is a :class:`WorkerError` with the worker's number and the traceback, or, with ``on_failure="restart"``, a warning:
    the worker starts anew, and the episodes that were lost are truncated at their last observation. Their last macro-step
    has no env step: ``chunk_length`` 0, reward 0, ``info["worker_failed"]`` and no episode metrics.
    :func:`~sb3_dsrl.evaluate` and :func:`~sb3_dsrl.collect_rollouts` leave it out and play the episode again. PPO bootstraps
    it as if it had lasted H env steps, unless the callback ``ExactBootstrap`` is there. A worker that fails at several steps
    in a row is an error in any case.

    :param env_fns: make the envs, which all have the same spaces
    :param settings: how many workers, of which kind, and what happens when one fails; None is the default of all
    :param hide_gpu: False if the envs render on the GPU; otherwise a CUDA context would only cost each worker memory
    :raises ValueError: if there is no env
    :raises WorkerError: if an env cannot be made
    """

    def __init__(self, env_fns: Sequence[EnvFn], settings: WorkerSettings | None = None, hide_gpu: bool = True) -> None:
        if not env_fns:
            raise ValueError("WorkerVecEnv needs at least one env")
        self.settings, self.n_restarts = settings or WorkerSettings(), 0
        n_workers = max(1, min(len(env_fns), self.settings.n_workers or self.settings.worker.available()))
        self._slices = [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(range(len(env_fns)), n_workers)]
        self._env_fns, self._hide_gpu = list(env_fns), hide_gpu
        self._workers = [self.settings.worker(self._env_fns[part], hide_gpu) for part in self._slices]
        self._obs: Any = None
        try:
            names, everywhere = ("observation_space", "action_space"), range(len(env_fns))
            super().__init__(len(env_fns), *(self._on("get_attr", (name,), {}, everywhere)[0] for name in names))
        except BaseException:
            self.close()
            raise

    def reset(self) -> VecEnvObs:
        """
        :return: observations of all envs, (N, ...)
        """
        for worker, part in zip(self._workers, self._slices, strict=True):
            worker.submit("reset", self._seeds[part], self._options[part])
        parts = [self._result(i, self._reset_again) for i in range(len(self._workers))]
        self.reset_infos = [info for _, infos in parts for info in infos]
        self._reset_seeds()
        self._reset_options()
        self._obs = _joined([obs for obs, _ in parts])
        return self._obs

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: (N, ...)
        """
        for worker, part in zip(self._workers, self._slices, strict=True):
            worker.submit("step", actions[part])

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations (N, ...), rewards (N,), dones (N,), infos
        """
        parts = [self._result(i, self._truncated) for i in range(len(self._workers))]
        obs, rewards, dones, infos, reset_infos = zip(*parts, strict=True)
        self.reset_infos = [info for part in reset_infos for info in part]
        self._obs = _joined(obs)
        return self._obs, np.concatenate(rewards), np.concatenate(dones), [info for part in infos for info in part]

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture an env, if they were made with ``render_mode="rgb_array"``."""
        return self.env_method("render")

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the envs."""
        return self._on("get_attr", (attr_name,), {}, indices)

    def has_attr(self, attr_name: str) -> bool:
        """Whether all envs have this attribute; it need not be sent."""
        return all(self.env_method("has_wrapper_attr", attr_name))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the envs."""
        self._on("set_attr", (attr_name, value), {}, indices)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of the envs."""
        return self._on("env_method", (method_name, *method_args), method_kwargs, indices)

    def set_sim_states(self, states: Sequence[Any], indices: VecEnvIndices = None) -> None:
        """
        :param states: of :meth:`ActionChunkWrapper.get_sim_state <sb3_dsrl.ActionChunkWrapper.get_sim_state>`, one of each
        :param indices: of the envs; None are all
        """
        given = dict(zip(self._get_indices(indices), states, strict=True))
        asked = []
        for i, part in enumerate(self._slices):
            own = [j for j in given if part.start <= j < part.stop]
            if own:
                local = [j - part.start for j in own]
                self._workers[i].submit("call", "set_sim_states", [given[j] for j in own], local)
                asked.append(i)
        for i in asked:
            self._result(i)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether the envs are wrapped in this class."""
        return self._on("env_is_wrapped", (wrapper_class,), {}, indices)

    def _on(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], indices: VecEnvIndices) -> list[Any]:
        """Calls a method of the workers' LockstepVecEnvs for some of the envs; the results in the order of the indices."""
        wanted = list(self._get_indices(indices))
        local = [[j - part.start for j in wanted if part.start <= j < part.stop] for part in self._slices]
        asked = [i for i, own in enumerate(local) if own]
        for i in asked:
            self._workers[i].submit("call", method, *args, indices=local[i], **kwargs)
        results: dict[int, Any] = {}
        for i in asked:
            values = self._result(i) or [None] * len(local[i])
            results |= {j + self._slices[i].start: value for j, value in zip(local[i], values, strict=True)}
        return [results[j] for j in wanted]

    def _result(self, i: int, recover: Callable[[int], Any] | None = None) -> Any:
        worker, timeout = self._workers[i], self.settings.timeout
        try:
            value = worker.result(timeout if worker.answered or timeout is None else max(timeout, START_TIMEOUT))
        except WorkerError as error:
            part = self._slices[i]
            message = f"Worker {i} (envs {part.start} to {part.stop - 1}): {error}"
            if recover is None and isinstance(error.__cause__, AttributeError):
                raise error.__cause__ from None  # as the other VecEnvs do
            if recover is None or self.settings.on_failure == "raise" or worker.failures == MAX_FAILURES:
                raise WorkerError(message) from error.__cause__
            warnings.warn(f"{message}\nIt is started again; episodes that were lost are truncated.")
            return recover(i)
        worker.answered = True
        if recover is not None:
            worker.failures = 0
        return value

    def _reset_again(self, i: int) -> tuple[VecEnvObs, list[dict[str, Any]]]:
        """A new worker in the place of one that failed, and the first observations of its envs, in other episodes."""
        self.n_restarts += 1
        part, failures = self._slices[i], self._workers[i].failures + 1
        self._workers[i].close()
        self._workers[i] = self.settings.worker(self._env_fns[part], self._hide_gpu)
        self._workers[i].failures = failures
        n = part.stop - part.start
        self._workers[i].submit("reset", [None] * n, [{} for _ in range(n)])
        return self._result(i)  # a worker that fails at once is an error in any case

    def _truncated(self, i: int) -> tuple[Any, ...]:
        """The step of a worker that failed: its episodes end where they were last seen, and new ones begin."""
        part = self._slices[i]
        last = map_frames(lambda obs: obs[part], self._obs)
        obs, reset_infos = self._reset_again(i)
        n = part.stop - part.start
        infos = [
            {
                "worker_failed": True,
                "chunk_length": 0,
                "TimeLimit.truncated": True,
                "terminal_observation": map_frames(lambda x, j=j: x[j].copy(), last),
            }
            for j in range(n)
        ]
        return obs, np.zeros(n, np.float32), np.ones(n, bool), infos, reset_infos


def spread_envs(make: EnvFn, n_envs: int, workers: WorkerSettings | None = None, hide_gpu: bool = True) -> VecEnv:
    """
    Envs that are made alike: one in this process, several in workers.

    :param make: makes one
    :param n_envs: N
    :param workers: how they are spread over workers; None is the default, and no worker for one env
    :param hide_gpu: see :class:`WorkerVecEnv`
    :raises ValueError: if there is no env to make, or ``make`` raises it
    :raises WorkerError: if ``make`` raises something else in a worker
    """
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, found {n_envs}")
    if n_envs == 1 and workers is None:
        return DummyVecEnv([make])
    try:
        return WorkerVecEnv([make] * n_envs, workers, hide_gpu)
    except WorkerError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # as it is with one env in this process
        raise


def _joined(parts: Sequence[Any]) -> Any:
    return map_frames(lambda *arrays: np.concatenate(arrays), *parts)
