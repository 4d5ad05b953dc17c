"""Workers on the machines of a Ray cluster; the flow and PPO stay with the driver. Needs the extra ``ray``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from sb3_dsrl.envs.workers import EnvFn, EnvGroup, Worker, WorkerError

#: Of one GPU, for a worker that renders on it; to an actor that asks for none Ray shows none.
GPU_SHARE = 0.02


class RayWorker(Worker):
    """
    A worker that is a Ray actor, somewhere in the cluster; it takes one CPU. ``ray.init`` is called if nobody has.

    :param env_fns: make the envs of its group
    :param hide_gpu: see :class:`EnvGroup`; otherwise it also takes ``GPU_SHARE`` of a GPU
    """

    def __init__(self, env_fns: Sequence[EnvFn], hide_gpu: bool = True) -> None:
        _init()
        actor_class = ray.remote(num_cpus=1, num_gpus=0 if hide_gpu else GPU_SHARE)(EnvGroup)
        self._actor: Any = actor_class.remote(list(env_fns), hide_gpu)
        self._answer: Any = None

    def submit(self, method: str, *args: Any, **kwargs: Any) -> None:
        """See :class:`Worker`."""
        self._answer = getattr(self._actor, method).remote(*args, **kwargs)

    def result(self, timeout: float | None = None) -> Any:
        """See :class:`Worker`. Waiting for a free CPU of the cluster counts, too."""
        try:
            return ray.get(self._answer, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            self.close()
            raise WorkerError(f"a Ray actor gave no answer for {timeout:g} s and was ended") from None
        except ray.exceptions.RayTaskError as error:
            raise WorkerError(f"an exception in a Ray actor:\n{error}") from error.cause
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"the Ray actor died: {error}") from None

    def close(self) -> None:
        """See :class:`Worker`."""
        if ray.is_initialized():
            ray.kill(self._actor)

    @staticmethod
    def available() -> int:
        """The CPUs of the whole cluster."""
        _init()
        return int(ray.cluster_resources().get("CPU", 1))


def _init() -> None:
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
