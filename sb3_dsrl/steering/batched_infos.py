"""
What a batched simulator reports in ``info``, env by env: tensors or arrays with a leading axis N. Vector envs of gymnasium put
a mask beside each key, named like it with an underscore in front: which envs reported it.
"""

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
        before: Any = old.get(key)
        if isinstance(value, dict):
            kept[key] = last_counted(before if isinstance(before, dict) else {}, value, alive)
        elif not _has_rows(value, len(alive)):
            kept[key] = value
        elif type(before) is type(value) and before.shape == value.shape:
            kept[key] = _chosen(alive, value, before)
        elif old and _is_mask(key, new):
            kept[key] = _chosen(alive, value, value & False)
        else:
            kept[key] = value.clone() if isinstance(value, th.Tensor) else value.copy()
    for key, before in old.items():  # what the envs that go on have stopped to report
        if key not in new and _is_mask(key, old):
            kept[key], kept[key[1:]] = _chosen(alive, before & False, before), old[key[1:]]
    return kept


def reported_success(info: dict[str, Any], counts: th.Tensor) -> tuple[th.Tensor | None, th.Tensor]:
    """
    :param info: of one step
    :param counts: envs for which the step counts, (N,)
    :return: success, (N,), None if the simulator does not report it; the envs for which it counts and is reported, (N,)
    """
    key = "success" if "success" in info else "is_success"
    if key not in info:
        return None, counts

    def as_bools(values: Any) -> th.Tensor:
        values = values if isinstance(values, th.Tensor) else th.as_tensor(np.asarray(values).astype(bool))
        return values.to(counts.device).bool()

    return as_bools(info[key]), counts & as_bools(info[f"_{key}"]) if f"_{key}" in info else counts


def split_info(info: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """
    One dict an env, as ManiSkill's ``CPUGymWrapper`` gives it: numbers and NumPy arrays. Each key is one transfer. Masks are
    left out, and so is what an env did not report.

    :param info: tensors and arrays with a leading axis N are split, dicts likewise; every env gets all other values
    :param n_envs: N
    """
    rows: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, value in info.items():
        if _is_mask(key, info):
            continue
        values: list[Any] = [value] * n_envs
        if isinstance(value, dict):
            values = split_info(value, n_envs)
        elif _has_rows(value, n_envs):
            array = value.cpu().numpy() if isinstance(value, th.Tensor) else value
            values = array.tolist() if array.ndim == 1 else [row.copy() for row in array]
        for i, (row, own) in enumerate(zip(rows, values, strict=True)):
            if f"_{key}" not in info or info[f"_{key}"][i]:
                row[key] = own
    return rows


def _has_rows(value: Any, n_envs: int) -> bool:
    return isinstance(value, (th.Tensor, np.ndarray)) and value.ndim > 0 and len(value) == n_envs


def _is_mask(key: str, info: dict[str, Any]) -> bool:
    return key.startswith("_") and key[1:] in info


def _chosen(alive: th.Tensor, value: Any, before: Any) -> Any:
    mask = alive.reshape(-1, *[1] * (value.ndim - 1))
    return th.where(mask, value, before) if isinstance(value, th.Tensor) else np.where(mask.cpu().numpy(), value, before)
