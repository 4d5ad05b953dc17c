"""One episode of demos, and what must be true of it.

Letters in shapes: ``L`` env steps of an episode, ``D`` dimensions of the state part of one observation, ``A`` action dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike


class DemoError(ValueError):
    """Demos that are damaged or not what was asked for; the sentence names file and key."""


@dataclass
class StoredImages:
    """
    The images of one episode, in the file. They are laid out as ManiSkill's ``FlattenRGBDObservationWrapper`` does it.

    :param path: the ``.h5`` file
    :param cameras: for ``rgb`` and ``depth`` the names of their datasets, one a camera, in the order of the env
    :param shapes: (height, width, channels), all cameras together
    """

    path: Path
    cameras: dict[str, list[str]]
    shapes: dict[str, tuple[int, int, int]]

    def read(self) -> dict[str, np.ndarray]:
        """
        :return: for each key (L + 1, height, width, channels)
        :raises DemoError: if the file is damaged
        """
        try:
            with h5py.File(self.path, "r") as file:
                images = {
                    key: np.concatenate([np.asarray(file[name]) for name in names], axis=-1)
                    for key, names in self.cameras.items()
                }
        except Exception as error:  # of many kinds: HDF5 checks little before it reads
            raise DemoError(f"{self.path} cannot be read any more; it is damaged or was replaced ({error})") from error
        for key, image in images.items():
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                raise DemoError(f"{self.path}:{self.cameras[key][0]} holds NaN or infinite values")
        return images


@dataclass
class HeldImages:
    """
    The images of one episode, in memory.

    :param images: for ``rgb`` and ``depth`` (L + 1, height, width, channels)
    """

    images: dict[str, np.ndarray]

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(height, width, channels) of each."""
        return {key: (image.shape[1], image.shape[2], image.shape[3]) for key, image in self.images.items()}

    def read(self) -> dict[str, np.ndarray]:
        """
        :return: for each key (L + 1, height, width, channels)
        """
        return dict(self.images)


@dataclass
class Episode:
    """
    One episode, in env steps.

    :param obs: the state part of the observations, (L + 1, D)
    :param actions: (L, A), in [-1, 1]
    :param rewards: (L,), or None if there are none
    :param terminated: (L,)
    :param success: (L,), or None if it is unknown
    :param images: None if the observations hold none
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None
    terminated: np.ndarray
    success: np.ndarray | None
    images: StoredImages | HeldImages | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def read_obs(self) -> Any:
        """
        All observations, with images read from the file if they are in one.

        :return: (L + 1, D), or a dict of ``state`` and images, each with L + 1 rows
        """
        if self.images is None:
            return self.obs
        return ({"state": self.obs} if self.obs.shape[1] else {}) | self.images.read()


def checked_episode(
    where: str,
    obs: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray | None = None,
    terminated: np.ndarray | None = None,
    success: np.ndarray | None = None,
    *,
    images: StoredImages | HeldImages | None = None,
    advice: str,
) -> Episode:
    """
    An episode whose arrays fit each other.

    :param where: it is, for error messages
    :param obs: the state part of the observations, (L + 1, D)
    :param actions: (L, A)
    :param rewards: (L,), or None
    :param terminated: (L,); None is nowhere
    :param success: (L,), or None
    :param images: of the observations
    :param advice: what to do about actions outside of [-1, 1]
    :raises DemoError: if lengths differ, values are NaN or infinite, or actions are out of bounds
    """
    length = len(actions)
    if length == 0:
        raise DemoError(f"{where} has no steps")
    given: dict[str, Any] = dict(rewards=rewards, terminated=terminated, success=success)
    series = {key: numbers(f"{where}/{key}", value, 1) for key, value in given.items() if value is not None}
    expected = {"obs": (obs, length + 1), **{key: (value, length) for key, value in series.items()}}
    for key, (value, n) in expected.items():
        if len(value) != n:
            raise DemoError(f"{where}/{key} has {len(value)} entries, expected {n} for {length} actions")
    for key, value in {"obs": obs, "actions": actions, **series}.items():
        if not np.isfinite(value).all():
            raise DemoError(f"{where}/{key} holds NaN or infinite values")
    if np.abs(actions).max() > 1.0 + 1e-4:
        raise DemoError(f"{where}/actions reach {np.abs(actions).max():.3g}, expected [-1, 1]: {advice}")
    return Episode(
        obs=obs,
        actions=actions.clip(-1.0, 1.0),
        rewards=series["rewards"].astype(np.float32) if "rewards" in series else None,
        terminated=series["terminated"].astype(bool) if "terminated" in series else np.zeros(length, bool),
        success=series["success"].astype(bool) if "success" in series else None,
        images=images,
    )


def check_alike(path: str | Path, episodes: list[Episode]) -> None:
    """
    :param path: where the episodes come from
    :param episodes: which must have observations and actions of the same shapes
    :raises DemoError: if they do not
    """
    for attribute, letter in (("obs", "D"), ("actions", "A")):
        sizes = {getattr(episode, attribute).shape[-1] for episode in episodes}
        if len(sizes) > 1:
            raise DemoError(
                f"{path}: {attribute} have {sorted(sizes)} dimensions in different episodes; expected one {letter}"
            )
    shapes = {repr(episode.images and episode.images.shapes) for episode in episodes}
    if len(shapes) > 1:
        raise DemoError(f"{path}: images differ in shape between episodes ({' and '.join(sorted(shapes))})")


def asked_for(name: str, found: int, num_demos: int | None) -> int:
    """
    How many episodes are read.

    :param name: where they come from
    :param found: so many are there
    :param num_demos: so many were asked for; None is all
    :raises DemoError: if there are fewer, or none
    :raises ValueError: if ``num_demos`` is not positive
    """
    if num_demos is not None and num_demos < 1:
        raise ValueError(f"num_demos must be at least 1, found {num_demos}")
    if found == 0:
        raise DemoError(f"{name} holds no episodes")
    if num_demos is not None and num_demos > found:
        raise DemoError(f"{name} holds {found} episodes, but num_demos={num_demos} were asked for")
    return found if num_demos is None else num_demos


def numbers(where: str, value: Any, dims: int) -> np.ndarray:
    """
    :param where: the array is, for error messages
    :param value: what should be an array of numbers
    :param dims: number of its dimensions
    :raises DemoError: if it is not
    """
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise DemoError(f"{where} is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DemoError(f"{where} holds values of type {array.dtype}, expected numbers")
    if array.ndim != dims:
        raise DemoError(f"{where} has shape {array.shape}, expected {dims} dimension{'s' * (dims > 1)}")
    return array


def as_unit(where: str, actions: ArrayLike, bounds: tuple[ArrayLike, ArrayLike] | None) -> np.ndarray:
    """
    Actions in [-1, 1]; the chunk envs scale them back.

    :param where: the episode is, for error messages
    :param actions: (L, A)
    :param bounds: lowest and highest action of the env, each (A,) or a number; None is -1 and 1
    :raises DemoError: if they do not fit each other
    """
    array = numbers(f"{where}/actions", actions, 2)
    if bounds is None:
        return array.astype(np.float32)
    low, high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
    if low.shape != high.shape or low.shape not in ((), array.shape[1:]) or not (np.isfinite(high - low) & (high > low)).all():
        raise DemoError(
            f"{where}: action_bounds must be two finite numbers or arrays of shape (A,) = {array.shape[1:]}, the first "
            f"lower, found {bounds}"
        )
    return (2 * (array - low) / (high - low) - 1).astype(np.float32)


def split_obs(where: str, obs: Any) -> tuple[np.ndarray, HeldImages | None]:
    """
    The state part of observations, and their images.

    :param where: the episode is, for error messages
    :param obs: (L + 1, D), or a dict of ``state``, ``rgb`` and ``depth``
    :return: (L + 1, D), and the images, or None if there are none
    :raises DemoError: if it is something else
    """
    if not isinstance(obs, dict):
        return numbers(f"{where}/obs", obs, 2).astype(np.float32), None
    images = {key: numbers(f"{where}/obs/{key}", value, 4) for key, value in obs.items() if key in ("rgb", "depth")}
    if not images or obs.keys() - images.keys() - {"state"}:
        raise DemoError(
            f"{where}/obs has the keys {sorted(obs)}, expected one array, or 'rgb' or 'depth' or both and perhaps 'state'"
        )
    if "rgb" in images and images["rgb"].dtype != np.uint8:
        raise DemoError(f"{where}/obs/rgb holds values of type {images['rgb'].dtype}, expected uint8")
    for key, image in images.items():
        if not np.isfinite(image).all():
            raise DemoError(f"{where}/obs/{key} holds NaN or infinite values")
    rows = {len(image) for image in images.values()}
    state = numbers(f"{where}/obs/state", obs["state"], 2) if "state" in obs else np.zeros((max(rows), 0))
    if rows != {len(state)}:
        raise DemoError(f"{where}/obs mixes lengths {sorted(rows | {len(state)})}; expected one")
    ordered = {key: images[key] for key in ("rgb", "depth") if key in images}
    return state.astype(np.float32), HeldImages(ordered)
