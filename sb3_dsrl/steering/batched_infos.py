"""What a batched simulator reports in ``info``, env by env."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th


def last_counted(old: dict[str, Any], new: dict[str, Any], alive: th.Tensor) -> dict[str, Any]:
    """
    The report of each env's last step that counts.

    :param old: of the steps before; empty before the first
    :param new: of this step; its tensors may alias the simulator's memory
    :param alive: envs for which this step counts, (N,)
    """
    kept: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict):
            kept[key] = last_counted(before if isinstance(before, dict) else {}, value, alive)
        elif not (isinstance(value, th.Tensor) and value.dim() and len(value) == len(alive)):
            kept[key] = value
        elif isinstance(before, th.Tensor) and before.shape == value.shape:
            kept[key] = th.where(alive.reshape(-1, *[1] * (value.dim() - 1)), value, before)
        else:
            kept[key] = value.clone()
    return kept


def split_info(info: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """
    One dict an env, as ManiSkill's ``CPUGymWrapper`` gives it: numbers and NumPy arrays. Each key is one transfer.

    :param info: tensors and arrays with a leading axis N are split, dicts likewise; every env gets all other values
    :param n_envs: N
    """
    rows: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, value in info.items():
        values: list[Any] = [value] * n_envs
        if isinstance(value, dict):
            values = split_info(value, n_envs)
        elif isinstance(value, (th.Tensor, np.ndarray)) and value.ndim and len(value) == n_envs:
            array = value.cpu().numpy() if isinstance(value, th.Tensor) else value
            values = array.tolist() if array.ndim == 1 else [row.copy() for row in array]
        for row, own in zip(rows, values, strict=True):
            row[key] = own
    return rows
