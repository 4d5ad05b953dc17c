"""A replay buffer inside the zip of a model: the transitions that it holds, as plain arrays."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

#: Folder of its arrays in the zip.
FOLDER = "replay_buffer/"


def checked_buffer(model: OffPolicyAlgorithm) -> ReplayBuffer:
    """
    :param model: whose buffer should be kept
    :raises ValueError: if the buffer has more than its arrays, or a transition needs the one after it
    """
    buffer = model.replay_buffer
    assert buffer is not None
    if isinstance(buffer, HerReplayBuffer):
        raise ValueError("The state of a HerReplayBuffer is unknown: use SB3's CheckpointCallback(save_replay_buffer=True)")
    if buffer.optimize_memory_usage:
        raise ValueError(
            "With optimize_memory_usage a transition shares its observations with the next one, which a checkpoint cuts off: "
            "set it to False"
        )
    return buffer


def add_replay(file: BytesIO, buffer: ReplayBuffer) -> None:
    """
    :param file: the zip of a model
    :param buffer: is added to it
    """
    n = buffer.size()
    with zipfile.ZipFile(file, "a") as archive:
        for name, array in _arrays(buffer).items():
            with archive.open(f"{FOLDER}{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(array[:n]), allow_pickle=False)
        with archive.open(f"{FOLDER}position.npy", "w") as entry:
            np.lib.format.write_array(entry, np.array([buffer.pos, buffer.full]), allow_pickle=False)


def read_replay(path: Path, buffer: ReplayBuffer) -> None:
    """
    :param path: of a zip
    :param buffer: takes over what :func:`add_replay` wrote
    :raises ValueError: if the buffer is of another kind, size or number of envs than the one before
    """
    with zipfile.ZipFile(path) as archive:

        def read(name: str) -> np.ndarray:
            try:
                with archive.open(f"{FOLDER}{name}.npy") as entry:
                    return np.lib.format.read_array(entry, allow_pickle=False)
            except KeyError:
                raise ValueError(f"{path} holds no {name!r} of a replay buffer, which the model has") from None

        pos, full = read("position")
        found = {name: read(name) for name in _arrays(buffer)}
    for name, array in _arrays(buffer).items():
        n = buffer.buffer_size if full else int(pos)
        if found[name].shape != array[:n].shape or len(found[name]) != n:
            raise ValueError(
                f"{path} holds {name!r} of a replay buffer with shape {found[name].shape}, but the model's is "
                f"{array[:n].shape}: give it the same number of envs and the same buffer_size"
            )
        array[:n] = found[name]
    buffer.pos, buffer.full = int(pos), bool(full)


def cut_episodes(buffer: ReplayBuffer) -> None:
    """
    Marks the last transitions as truncated: what is added next begins new episodes.

    :param buffer: a replay buffer
    """
    if buffer.size():
        buffer.timeouts[buffer.pos - 1] = 1.0


def _arrays(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """All its arrays, by name; entries of dicts as ``name/key``."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(buffer).items():
        parts: dict[str, Any] = {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        arrays |= {key: x for key, x in parts.items() if isinstance(x, np.ndarray) and len(x) == buffer.buffer_size}
    return arrays
