"""Many envs, spread over few workers: one message a worker and macro-step each way, whatever carries the messages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_dsrl.envs.workers import START_TIMEOUT, EnvFn, ProcessWorker, Worker, WorkerError
from sb3_dsrl.utils.observations import map_frames

#: A worker is started again after so many steps in a row that failed, and no more.
MAX_FAILURES = 3


class WorkerVecEnv(VecEnv):
    """
    Many envs, spread evenly over fewer workers. Stepping several envs one after the other in each of as many workers as
    there are cores beats one worker an env, whose processes only get in each other's way.

    Where SB3's ``SubprocVecEnv`` waits for ever or raises a bare EOFError, an exception in an env or a worker that dies or
    hangs is a :class:`WorkerError` with the worker's number and the traceback, or, with ``on_failure="restart"``, a warning:
    the worker starts anew, and the episodes that were lost are truncated at their last observation, with reward 0,
    ``info["worker_failed"]`` and no episode metrics. :func:`~sb3_dsrl.evaluate` and
    :func:`~sb3_dsrl.collect_rollouts` play them again, and :class:`~sb3_dsrl.ExactBootstrap` makes PPO exact where they end
    (SB3 takes a lost macro-step of no env steps for a whole one). A worker that fails at several steps in a row is an error
    in any case.

    :param env_fns: make the envs, which all have the same spaces
    :param n_workers: None is :meth:`Worker.available`, and never more than there are envs
    :param on_failure: "raise" or "restart"
    :param worker: makes a worker from its ``env_fns``: :class:`ProcessWorker`, :class:`~sb3_dsrl.envs.ray_workers.RayWorker`
    :param timeout: seconds after which a worker that gives no answer counts as hanging; a worker that starts has at least
        ``START_TIMEOUT``. None waits for ever.
    :raises ValueError: if an argument is out of range
    :raises WorkerError: if an env cannot be made
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        n_workers: int | None = None,
        on_failure: Literal["raise", "restart"] = "raise",
        worker: type[Worker] = ProcessWorker,
        timeout: float | None = 600.0,
    ) -> None:
        if not env_fns:
            raise ValueError("WorkerVecEnv needs at least one env")
        if n_workers is not None and n_workers < 1:
            raise ValueError(f"n_workers must be at least 1, found {n_workers}")
        if on_failure not in ("raise", "restart"):
            raise ValueError(f"on_failure must be 'raise' or 'restart', found {on_failure!r}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is in seconds and must be positive, found {timeout}")
        self.on_failure, self.timeout, self.n_restarts = on_failure, timeout, 0
        n_workers = max(1, min(len(env_fns), n_workers or worker.available()))
        self._slices = [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(range(len(env_fns)), n_workers)]
        self._env_fns, self._worker_class = list(env_fns), worker
        self._workers = [worker(self._env_fns[part]) for part in self._slices]
        self._first_seeds: list[int | None] = [None] * len(env_fns)
        self._obs: Any = None
        self._failures = [0] * n_workers  # steps in a row
        self._started = [False] * n_workers
        try:
            obs_space, action_space = (
                self._all("call", [(name,)] * n_workers)[0] for name in ("observation_space", "action_space")
            )
            super().__init__(len(env_fns), obs_space, action_space)
        except BaseException:
            self.close()
            raise

    def reset(self) -> VecEnvObs:
        """
        :return: observations of all envs, (N, ...)
        """
        if any(seed is not None for seed in self._seeds):
            self._first_seeds = list(self._seeds)
        seeds, options = self._seeds, self._options
        parts = self._all("reset", [(seeds[part], options[part]) for part in self._slices], self._reset_again)
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
        parts = self._results(self._truncated)
        self._failures = [
            n + 1 if part[3][0].get("worker_failed") else 0 for n, part in zip(self._failures, parts, strict=True)
        ]
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
        return [image for part in self._all("call", [("get_images",)] * len(self._workers)) for image in part]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the envs."""
        return self._on("get_attr", (attr_name,), {}, indices)

    def has_attr(self, attr_name: str) -> bool:
        """Whether all envs have this attribute."""
        return all(self._all("call", [("has_attr", attr_name)] * len(self._workers)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the envs."""
        self._on("set_attr", (attr_name, value), {}, indices)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of the envs."""
        return self._on("env_method", (method_name, *method_args), method_kwargs, indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether the envs are wrapped in this class."""
        return self._on("env_is_wrapped", (wrapper_class,), {}, indices)

    def _on(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], indices: VecEnvIndices) -> list[Any]:
        """Calls a method of the workers' DummyVecEnvs for some of the envs; the results in the order of the indices."""
        wanted = list(self._get_indices(indices))
        results: dict[int, Any] = {}
        for i, part in enumerate(self._slices):
            local = [j - part.start for j in wanted if part.start <= j < part.stop]
            if local:
                self._workers[i].submit("call", method, *args, indices=local, **kwargs)
                values = self._result(i) or [None] * len(local)
                results |= {j + part.start: value for j, value in zip(local, values, strict=True)}
        return [results[j] for j in wanted]

    def _all(self, method: str, args: Sequence[tuple[Any, ...]], recover: Callable[[int], Any] | None = None) -> list[Any]:
        for worker, own in zip(self._workers, args, strict=True):
            worker.submit(method, *own)
        return self._results(recover)

    def _results(self, recover: Callable[[int], Any] | None = None) -> list[Any]:
        return [self._result(i, recover) for i in range(len(self._workers))]

    def _result(self, i: int, recover: Callable[[int], Any] | None = None) -> Any:
        try:
            starts = self.timeout is not None and not self._started[i]
            value = self._workers[i].result(max(self.timeout or 0.0, START_TIMEOUT) if starts else self.timeout)
            self._started[i] = True
            return value
        except WorkerError as error:
            part = self._slices[i]
            message = f"Worker {i} (envs {part.start} to {part.stop - 1}): {error}"
            if recover is None and isinstance(error.__cause__, AttributeError):
                raise error.__cause__ from None  # as the other VecEnvs do
            if recover is None or self.on_failure == "raise" or self._failures[i] == MAX_FAILURES:
                raise WorkerError(message) from error.__cause__
            warnings.warn(f"{message}\nIt is started again; episodes that were lost are truncated.")
            return recover(i)

    def _reset_again(self, i: int) -> tuple[VecEnvObs, list[dict[str, Any]]]:
        """A new worker in the place of one that failed, and the first observations of its envs."""
        self.n_restarts += 1
        part = self._slices[i]
        self._workers[i].close()
        self._workers[i], self._started[i] = self._worker_class(self._env_fns[part]), False
        seeds: list[int | None] = [
            None if seed is None else int(np.random.SeedSequence([seed, self.n_restarts]).generate_state(1)[0] >> 1)
            for seed in self._first_seeds[part]
        ]
        self._workers[i].submit("reset", seeds, [{} for _ in seeds])
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


def _joined(parts: Sequence[Any]) -> Any:
    return map_frames(lambda *arrays: np.concatenate(arrays), *parts)
