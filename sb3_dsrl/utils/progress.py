"""Progress bar, TensorBoard and checkpoints of the two offline stages, as one loop object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch as th
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sb3_dsrl.utils.checkpoint import Stateful, TrainingCheckpoint
from sb3_dsrl.utils.interrupt import StopSignals


class ProgressLoop:
    """
    Iterates ``n_iterations`` times with a progress bar; :meth:`log` writes scalars now and then. With a checkpoint it first
    takes over the state of the iterations that are done, and leaves them out.

    :param name: shown beside the bar and in errors
    :param n_iterations: length of the loop
    :param progress_bar: show the bar
    :param tensorboard_log: folder for TensorBoard, or None
    :param every: iterations between two records
    :param checkpoint: keeps the state, or None
    :param parts: whatever changes in the loop
    :raises ValueError: if there is nothing to iterate
    """

    def __init__(
        self,
        name: str,
        n_iterations: int,
        progress_bar: bool = False,
        tensorboard_log: str | Path | None = None,
        every: int = 100,
        checkpoint: TrainingCheckpoint | None = None,
        parts: Mapping[str, Stateful] | None = None,
    ) -> None:
        if n_iterations < 1:
            raise ValueError(f"{name}: n_iterations must be at least 1, found {n_iterations}")
        self.name, self.n_iterations, self.every = name, n_iterations, every
        self.last: dict[str, float] = {}
        self._checkpoint, self._parts = checkpoint, parts or {}
        self._i = 0
        if checkpoint is not None:
            self._file = checkpoint.file(name)
            self._i = checkpoint.load(self._file, n_iterations, self._parts)
        # records after the checkpoint come once more
        purge = self._i or None
        self._writer = SummaryWriter(str(tensorboard_log), purge_step=purge) if tensorboard_log is not None else None
        self._bar = tqdm(
            range(self._i, n_iterations), desc=name, disable=not progress_bar, initial=self._i, total=n_iterations
        )

    def __iter__(self) -> Iterator[int]:
        signals = StopSignals("the end of this iteration")
        if self._checkpoint is not None:
            signals.listen()
        try:
            for i in self._bar:
                self._i = i
                yield i
                if self._checkpoint is not None:
                    done = i + 1
                    if signals.received or done % self._checkpoint.save_freq == 0 or done == self.n_iterations:
                        self._checkpoint.save(self._file, done, self.n_iterations, self._parts)
                    if signals.received:
                        signals.leave(f"a resume goes on from {self._file}")
        finally:
            signals.ignore()
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def log(self, scalars: dict[str, th.Tensor]) -> None:
        """
        Records scalars at every ``every``-th iteration and at the last one.

        :param scalars: name -> value
        :raises ValueError: if one of them is NaN or infinite
        """
        if self._i % self.every == 0 or self._i == self.n_iterations - 1:
            self.record({key: float(value.detach()) for key, value in scalars.items()})

    def record(self, scalars: Mapping[str, float]) -> None:
        """
        Records scalars now.

        :param scalars: name -> value
        :raises ValueError: if one of them is NaN or infinite
        """
        self.last |= scalars
        for key, value in scalars.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.name}: {key} is {value} at iteration {self._i}; check the data or lower the learning rate"
                )
            if self._writer is not None:
                self._writer.add_scalar(key, value, self._i)
        self._bar.set_postfix({key.split("/")[-1]: f"{value:.3g}" for key, value in self.last.items()})
