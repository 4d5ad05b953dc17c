"""Observations that are one array, or a dict of arrays: how they are mapped and stacked. NumPy arrays and tensors alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th


def map_frames(fn: Callable[..., Any], *frames: Any) -> Any:
    """
    Applies a function to observations: to themselves, or to each entry if they are dicts.

    :param fn: takes one array of each observation
    :param frames: observations of the same structure
    """
    if isinstance(frames[0], dict):
        return {key: fn(*(frame[key] for frame in frames)) for key in frames[0]}
    return fn(*frames)


def stack_frames(frames: Sequence[Any]) -> Any:
    """
    :param frames: observations, oldest first, each an array or a dict of arrays
    :return: the same with a leading axis of ``len(frames)``
    """

    def stack(*arrays: Any) -> Any:
        return th.stack(arrays) if isinstance(arrays[0], th.Tensor) else np.stack(arrays)

    return map_frames(stack, *frames)
