"""Held-out demos: how well a flow imitates what it never saw, and the best one so far."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.windows import FeatureWindows, ImageWindows

#: Batches and windows in each that the held-out loss is a mean over; the same ones every time.
N_BATCHES, BATCH_SIZE = 8, 256


@dataclass(frozen=True)
class Validation:
    """
    Judges the moving average of the training now and then; the best one is the result.

    :param fraction: of the demos that is held out, whole episodes
    :param freq: iterations between two judgements; the last iteration is judged in any case
    :param score: takes the flow as it would be saved and returns what shall be largest, such as its success in the simulator;
        None is the negative loss on the held-out demos
    :raises ValueError: if an argument is out of range
    """

    fraction: float = 0.1
    freq: int = 500
    score: Callable[[FlowPolicy], float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, found {self.fraction}")
        if self.freq < 1:
            raise ValueError(f"freq must be at least 1, found {self.freq}")

    def split(self, demos: Demos) -> tuple[Demos, Demos]:
        """
        Every so many episodes one is held out, whatever their order means.

        :param demos: all demos
        :return: those to learn from, those held out
        :raises ValueError: if there is only one episode
        """
        n = len(demos.episodes)
        if n < 2:
            raise ValueError(f"{demos.path} holds one demo: none can be held out for validation")
        n_held = min(max(1, round(self.fraction * n)), n - 1)
        held = set(np.linspace(0, n - 1, n_held + 1)[1:].round().astype(int).tolist())
        parts = ([episode for i, episode in enumerate(demos.episodes) if (i in held) == out] for out in (False, True))
        learned, held_out = (replace(demos, episodes=episodes) for episodes in parts)
        return learned, held_out


class Judge:
    """
    Keeps the best weights so far, and is part of a checkpoint.

    :param validation: what to judge by
    :param flow: the flow that is trained
    :param windows_of: training pairs of the held-out demos in the features of a flow
    :param averages: moving averages of ``flow.net`` and, if it learns, of ``flow.encoder``
    :param loss_kwargs: further arguments of ``flow.imitation_loss``
    """

    def __init__(
        self,
        validation: Validation,
        flow: FlowPolicy,
        windows_of: Callable[[FlowPolicy], FeatureWindows | ImageWindows],
        averages: Sequence[nn.Module],
        loss_kwargs: Mapping[str, Any],
    ) -> None:
        self.validation, self._averages, self._loss_kwargs = validation, averages, loss_kwargs
        self._candidate = copy.deepcopy(flow).freeze()
        self._windows = windows_of(self._candidate)
        self._best, self._weights = -math.inf, [copy.deepcopy(average.state_dict()) for average in averages]

    def due(self, iteration: int, n_iterations: int) -> bool:
        """
        :param iteration: number of the iteration that just ended, from 0
        :param n_iterations: of the training
        """
        return (iteration + 1) % self.validation.freq == 0 or iteration == n_iterations - 1

    @th.no_grad()
    def judge(self) -> dict[str, float]:
        """
        Judges the moving average as it is now. Random states stay as they were.

        :return: name -> value, for the record
        """
        for part, average in zip((self._candidate.net, self._candidate.encoder), self._averages, strict=False):
            part.load_state_dict(average.module.state_dict())  # type: ignore[union-attr, operator]
        device = self._candidate.device
        with th.random.fork_rng([device] if device.type == "cuda" else []):
            th.manual_seed(0)
            record = {"flow/validation_loss": float(np.mean([self._loss() for _ in range(N_BATCHES)]))}
            score = -record["flow/validation_loss"]
            if self.validation.score is not None:
                score = record["flow/validation_score"] = float(self.validation.score(self._candidate))
        if score >= self._best:
            self._best, self._weights = score, [copy.deepcopy(average.state_dict()) for average in self._averages]
        return record

    def _loss(self) -> float:
        cond, chunk, _ = self._windows.sample(BATCH_SIZE)
        losses = self._candidate.imitation_loss(self._candidate.net, cond, chunk, **self._loss_kwargs)
        return float(th.stack(list(losses.values())).sum())

    def restore_best(self) -> None:
        """Makes the best weights those of the moving averages."""
        for average, weights in zip(self._averages, self._weights, strict=True):
            average.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self._best, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state over."""
        self._best, self._weights = state_dict["best"], state_dict["weights"]
