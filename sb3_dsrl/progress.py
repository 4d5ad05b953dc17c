"""Progress bar and TensorBoard of the two offline stages, as one loop object."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch as th
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class ProgressLoop:
    """
    Iterates ``n_iterations`` times with a progress bar; :meth:`log` writes scalars now and then.

    :param name: shown beside the bar and in errors
    :param n_iterations: length of the loop
    :param progress_bar: show the bar
    :param tensorboard_log: folder for TensorBoard, or None
    :param every: iterations between two records
    :raises ValueError: if there is nothing to iterate
    """

    def __init__(
        self,
        name: str,
        n_iterations: int,
        progress_bar: bool = False,
        tensorboard_log: str | Path | None = None,
        every: int = 100,
    ) -> None:
        if n_iterations < 1:
            raise ValueError(f"{name}: n_iterations must be at least 1, found {n_iterations}")
        self.name, self.n_iterations, self.every = name, n_iterations, every
        self.last: dict[str, float] = {}
        self._writer = SummaryWriter(str(tensorboard_log)) if tensorboard_log is not None else None
        self._bar = tqdm(range(n_iterations), desc=name, disable=not progress_bar)
        self._i = 0

    def __iter__(self) -> Iterator[int]:
        try:
            for i in self._bar:
                self._i = i
                yield i
        finally:
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def log(self, scalars: dict[str, th.Tensor]) -> None:
        """
        Records scalars at every ``every``-th iteration and at the last one.

        :param scalars: name -> value
        :raises ValueError: if one of them is NaN or infinite
        """
        if self._i % self.every and self._i != self.n_iterations - 1:
            return
        self.last = {key: float(value.detach()) for key, value in scalars.items()}
        for key, value in self.last.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.name}: {key} is {value} at iteration {self._i}; check the data or lower the learning rate"
                )
            if self._writer is not None:
                self._writer.add_scalar(key, value, self._i)
        self._bar.set_postfix({key.split("/")[-1]: f"{value:.3g}" for key, value in self.last.items()})
