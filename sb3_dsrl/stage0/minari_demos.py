"""Reads Minari datasets (https://minari.farama.org), by the package ``minari``."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.episodes import DemoError, asked_for

#: Where Minari's infos say so if ``success_key`` does not.
SUCCESS_KEYS = ("success", "is_success")


def load_minari(dataset: Any, num_demos: int | None = None, *, success_key: str | None = None, **about: Any) -> Demos:
    """
    Reads a Minari dataset of an env with a bounded Box of actions. Dict observations are flattened as gymnasium's
    ``FlattenObservation`` does it, which the env to steer then needs as well.

    :param dataset: id of a dataset on this machine, or a ``minari.MinariDataset``
    :param num_demos: read only the first so many episodes; None reads all
    :param success_key: of the infos; None is "success" or "is_success" if there is one of them
    :param about: further arguments of :meth:`Demos.from_arrays <sb3_dsrl.Demos.from_arrays>`, in place of the dataset's own
        ``env_id`` and ``action_bounds``
    :return: the demos
    :raises ImportError: if an id is given and ``minari`` is not installed
    :raises FileNotFoundError: if there is no such dataset
    :raises DemoError: if the dataset is something else than what is said here
    """
    if isinstance(dataset, str):
        dataset = _opened(dataset)
    name = f"Minari dataset {dataset.spec.dataset_id}"
    n = asked_for(name, dataset.total_episodes, num_demos)
    space = dataset.action_space
    if not hasattr(space, "low") or len(space.shape) != 1:
        raise DemoError(f"{name} holds actions of {space}, expected a bounded Box of shape (A,)")
    columns: dict[str, list[Any]] = dict(obs=[], actions=[], rewards=[], terminated=[], success=[])
    for episode in islice(dataset.iterate_episodes(), n):
        columns["obs"].append(_flat(f"{name}: episode {episode.id}", episode.observations, dataset.observation_space))
        columns["actions"].append(episode.actions)
        columns["rewards"].append(episode.rewards)
        columns["terminated"].append(episode.terminations)
        columns["success"].append(_success(f"{name}: episode {episode.id}", episode, success_key))
    known: dict[str, Any] = {key: column for key, column in columns.items() if not any(value is None for value in column)}
    spec = dataset.env_spec
    own: dict[str, Any] = dict(env_id=None if spec is None else spec.id, action_bounds=(space.low, space.high))
    return Demos.from_arrays(**known, **(own | about), path=name)


def _opened(dataset_id: str) -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError("load_minari needs the package minari: pip install 'sb3-dsrl[minari]'") from error
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no Minari dataset {dataset_id!r} on this machine; minari.download_dataset({dataset_id!r}) fetches one "
            f"that is public ({error})"
        ) from error


def _flat(where: str, obs: Any, space: Any) -> np.ndarray:
    """(L + 1, D)."""
    if isinstance(obs, dict):
        return np.concatenate([_flat(where, obs[key], space[key]) for key in space.spaces], axis=1)
    array = np.asarray(obs)
    if array.dtype.kind not in "biuf" or (array.dtype == np.uint8 and array.ndim > 2):
        raise DemoError(f"{where} holds observations of {space}, expected numbers (and no images)")
    return array.reshape(len(array), -1)


def _success(where: str, episode: Any, key: str | None) -> np.ndarray | None:
    """(L,); infos begin with that of the reset if it was recorded."""
    infos = episode.infos or {}
    found = [name for name in ((key,) if key else SUCCESS_KEYS) if name in infos]
    if not found:
        if key is not None:
            raise DemoError(f"{where} has no info {key!r}; it has {sorted(infos)}")
        return None
    values = np.asarray(infos[found[0]])
    return values.reshape(len(values), -1).any(axis=1)[-len(episode.actions) :]
