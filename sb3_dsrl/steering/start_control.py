"""Recorded starts of many envs, from outside: switched off for a while, saved and brought back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.steering.chunk_env import ActionChunkWrapper


def get_progress(venv: VecEnv) -> list[float] | None:
    """
    :param venv: vectorised envs, steered or not
    :return: how far the curriculum of each is; None if they start as they are
    """
    if not all(venv.env_is_wrapped(ActionChunkWrapper)):
        return None
    progress = venv.get_attr("start_progress")
    return None if None in progress else progress


def set_progress(venv: VecEnv, progress: Sequence[float]) -> None:
    """
    :param venv: vectorised envs with starts
    :param progress: of :func:`get_progress`
    """
    for i, own in enumerate(progress):
        venv.env_method("set_start_progress", own, indices=[i])


@contextmanager
def true_starts(venv: VecEnv) -> Iterator[None]:
    """
    Episodes that are reset within start as they would without recordings.

    :param venv: vectorised envs, with starts or without
    """
    if get_progress(venv) is None:
        yield
        return
    venv.env_method("use_starts", False)
    try:
        yield
    finally:
        venv.env_method("use_starts", True)
