"""Metrics of the episodes in a batched simulator."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch as th

from sb3_dsrl.steering.batched_infos import reported_success


class BatchedMetrics:
    """
    Return, length and success of the episode of each env, up to the time limit, and what the algorithm saw of it; all tensors
    are (N,).

    :param num_envs: N
    :param device: of the simulator
    """

    def __init__(self, num_envs: int, device: th.device) -> None:
        self._return, self._length, self._macro_return, self._macro_steps = (
            th.zeros(num_envs, device=device) for _ in range(4)
        )
        self._once, self._success, self._closed = (th.zeros(num_envs, dtype=th.bool, device=device) for _ in range(3))
        self.knows_success = False
        self.started = np.full(num_envs, time.time())

    def start(self, index: th.Tensor) -> None:
        """
        Episodes begin.

        :param index: of their envs
        """
        for tensor in vars(self).values():
            if isinstance(tensor, th.Tensor):
                tensor[index] = 0
        self.started[index.cpu().numpy()] = time.time()

    def update(self, reward: th.Tensor, info: dict[str, Any], alive: th.Tensor) -> None:
        """
        :param reward: of an env step, (N,)
        :param info: of the simulator
        :param alive: envs for which the step counts, (N,)
        """
        counts = alive & ~self._closed
        self._return += reward * counts
        self._length += counts
        success, reports = reported_success(info, counts)
        if success is not None:
            self.knows_success = True
            self._success = th.where(reports, success, self._success)
            self._once = self._once | (success & reports)

    def end_macro_step(self, macro_reward: th.Tensor) -> None:
        """
        :param macro_reward: (N,)
        """
        self._macro_return += macro_reward
        self._macro_steps += 1

    def close(self, which: th.Tensor) -> None:
        """
        :param which: envs at their time limit, (N,): what follows is not counted
        """
        self._closed = self._closed | which

    def state(self) -> dict[str, th.Tensor]:
        """
        :return: for :meth:`set_state`
        """
        return {name: value.clone() for name, value in vars(self).items() if isinstance(value, th.Tensor)}

    def set_state(self, state: dict[str, th.Tensor], index: th.Tensor) -> None:
        """
        :param state: of :meth:`state`
        :param index: of the envs that go back
        """
        for name, kept in state.items():
            fresh = getattr(self, name).clone()
            fresh[index] = kept[index]
            setattr(self, name, fresh)

    def rows(self) -> tuple[th.Tensor, ...]:
        """
        :return: return, length, macro return, macro-steps, success once and at the end, (N,) each
        """
        return self._return, self._length, self._macro_return, self._macro_steps, self._once, self._success
