"""Workers: groups of envs in other processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from sb3_dsrl.envs.fork_server import ServedProcess
from sb3_dsrl.steering.lockstep import LockstepVecEnv

EnvFn = Callable[[], gym.Env]


#: Seconds that a worker has at least until its first answer: it loads libraries, a simulator, a scene.
START_TIMEOUT = 600.0

#: A worker imports the main script, to find its classes there.
GUARD = 'A script that starts worker processes must do so below `if __name__ == "__main__":`, since each of them imports it.'


class WorkerError(RuntimeError):
    """A worker that died or hangs, or an exception in one of its envs."""


class EnvGroup:
    """
    What a worker holds: several envs in one process.

    :param env_fns: make the envs
    :param hide_gpu: a CUDA context costs each worker hundreds of MB; only envs that render on the GPU need one
    """

    def __init__(self, env_fns: Sequence[EnvFn], hide_gpu: bool = True) -> None:
        if hide_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        th.set_num_threads(1)  # one worker a core: their threads would only fight
        # ManiSkill collects garbage whenever it builds a scene, some tasks at every reset: 0.2 s if it searched libraries.
        gc.freeze()
        self._envs = LockstepVecEnv(env_fns)

    def reset(self, seeds: list[int | None], options: list[dict[str, Any]]) -> tuple[VecEnvObs, list[dict[str, Any]]]:
        """Starts an episode in every env."""
        self._envs._seeds, self._envs._options = seeds, options
        return self._envs.reset(), self._envs.reset_infos

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """
        :param actions: (envs of the group, H, A)
        :return: what a VecEnv's ``step`` returns, and the reset infos
        """
        return (*self._envs.step(actions), self._envs.reset_infos)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the group's ``LockstepVecEnv``."""
        return getattr(self._envs, name)(*args, **kwargs)


class Worker(ABC):
    """
    Carries calls to an :class:`EnvGroup` somewhere else; one call at a time.

    :param env_fns: make the envs of its group
    :param hide_gpu: see :class:`EnvGroup`
    """

    #: whether it has answered a call
    answered: bool = False
    #: workers before it in its place that failed, one right after the other
    failures: int = 0

    @abstractmethod
    def __init__(self, env_fns: Sequence[EnvFn], hide_gpu: bool = True) -> None: ...

    @abstractmethod
    def submit(self, method: str, *args: Any, **kwargs: Any) -> None:
        """
        Sends a call and does not wait for it.

        :param method: of :class:`EnvGroup`
        """

    @abstractmethod
    def result(self, timeout: float | None = None) -> Any:
        """
        Waits for the last call.

        :param timeout: seconds; a worker that takes longer is ended. None waits for ever.
        :raises WorkerError: if the worker died or was ended, or the call raised
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the worker, also one that is busy or dead."""

    @staticmethod
    @abstractmethod
    def available() -> int:
        """Number of workers that make sense: the cores that there are."""


class ProcessWorker(Worker):
    """
    A worker in a process of its own.

    It ignores Ctrl-C, which is the main process's to handle, and ends when the main process ends in whatever way, since its
    pipe then closes.

    :param env_fns: make the envs of its group
    :param hide_gpu: see :class:`EnvGroup`
    :raises WorkerError: if the main script starts workers when it is merely imported
    """

    def __init__(self, env_fns: Sequence[EnvFn], hide_gpu: bool = True) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that imports the main script
            raise WorkerError(GUARD)
        self._pipe, remote = multiprocessing.Pipe()
        args = (remote, CloudpickleWrapper(list(env_fns)), hide_gpu)
        self._process = ServedProcess(_preload(env_fns), _serve, args)
        with _one_thread_each():
            self._process.start()
        remote.close()
        self._call = 0
        self._lost = False

    def submit(self, method: str, *args: Any, **kwargs: Any) -> None:
        """See :class:`Worker`."""
        self._call += 1
        try:
            self._pipe.send((self._call, method, args, kwargs))
        except (BrokenPipeError, ConnectionError):
            self._lost = True

    def result(self, timeout: float | None = None) -> Any:
        """See :class:`Worker`."""
        call, ok = 0, False
        value: Any = None
        while call != self._call and not self._lost:  # skips the answer to a call that Ctrl-C interrupted
            try:
                if not self._answers(timeout):
                    self._lost = True
                    self._process.kill()
                    raise WorkerError(f"process {self._process.pid} gave no answer for {timeout:g} s and was ended")
                call, ok, value = self._pipe.recv()
            except (EOFError, ConnectionError):
                self._lost = True
        if self._lost:
            self._process.join(timeout=5)
            code = self._process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            hint = "" if self.answered or code != 1 else f" while it started; its own words stand above. {GUARD}"
            raise WorkerError(f"process {self._process.pid} died ({how}){hint}")
        if not ok:
            trace, exception = value
            raise WorkerError(f"an exception in process {self._process.pid}:\n{trace}") from exception
        return value

    def _answers(self, timeout: float | None) -> bool:
        if timeout is None:
            return self._pipe.poll(None)
        # Second by second: the hours for which a job is stopped (Ctrl-Z), workers and all, are one of them.
        while not self._pipe.poll(min(max(timeout, 0.0), 1.0)):
            timeout -= 1.0
            if timeout <= 0:
                return False
        return True

    def close(self) -> None:
        """See :class:`Worker`."""
        self._pipe.close()  # the worker ends when it finds its pipe closed
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    @staticmethod
    def available() -> int:
        """The cores that this process may use."""
        return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class WorkerSettings:
    """
    How envs on the CPU are spread over workers, and what happens to workers that fail.

    :param n_workers: None is :meth:`Worker.available`, and never more than there are envs
    :param on_failure: what a worker that dies or hangs, or an exception in an env means: "raise" or "restart", see
        :class:`~sb3_dsrl.envs.worker_vec_env.WorkerVecEnv`
    :param worker: :class:`ProcessWorker` or :class:`~sb3_dsrl.envs.ray_workers.RayWorker`
    :param timeout: seconds after which a worker that gives no answer counts as hanging; a worker that starts has at least
        ``START_TIMEOUT``. None waits for ever.
    :raises ValueError: if an argument is out of range
    """

    n_workers: int | None = None
    on_failure: Literal["raise", "restart"] = "raise"
    worker: type[Worker] = ProcessWorker
    timeout: float | None = 600.0

    def __post_init__(self) -> None:
        if self.n_workers is not None and self.n_workers < 1:
            raise ValueError(f"n_workers must be at least 1, found {self.n_workers}")
        if self.on_failure not in ("raise", "restart"):
            raise ValueError(f"on_failure must be 'raise' or 'restart', found {self.on_failure!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is in seconds and must be positive, found {self.timeout}")


def _preload(env_fns: Sequence[EnvFn]) -> list[str]:
    """What a fork server imports for these envs: this module, and those of ours that make them, such as ManiSkill's."""
    modules = {str(getattr(env_fn, "__module__", None)) for env_fn in env_fns}
    return sorted({__name__} | {module for module in modules if module.startswith("sb3_dsrl.")})


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """
    Libraries decide on their threads when they are loaded. A fork server loads them, and the first worker that asks it
    starts it; with one worker a core, more threads than one only take the cores away from each other.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")  # the last is Mesa's lavapipe
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _let_others_go_on() -> None:
    """
    A message wakes a worker, and Linux may at once give it the core of the main process, which has not sent the other workers
    theirs: they would wait for a millisecond or two. Of processes that are "batch" it does not.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # some containers do not allow it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _serve(pipe: Connection, env_fns: CloudpickleWrapper, hide_gpu: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _let_others_go_on()
    group: EnvGroup | None = None
    while True:
        try:
            call, method, args, kwargs = pipe.recv()
        except (EOFError, ConnectionError):
            break
        try:
            if group is None:
                group = EnvGroup(env_fns.var, hide_gpu)
            answer = (call, True, getattr(group, method)(*args, **kwargs))
        except BaseException as exception:
            # an exception of some other class might not survive the way
            builtin = exception if type(exception).__module__ == "builtins" else None
            answer = (call, False, (traceback.format_exc(), builtin))
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            break
        except Exception:  # what cannot be pickled
            trace = traceback.format_exc() if answer[1] else answer[2][0]
            pipe.send((call, False, (trace, None)))
    if group is not None:
        group.call("close")
