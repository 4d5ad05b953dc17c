"""From the observations of an env to the batches of LeRobot: its names, its layouts, its units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch as th

from sb3_dsrl.policies.encoders import FrameShapes

Batch = dict[str, Any]

#: Vectors that LeRobot's policies read, in the order in which a flat observation holds them.
VECTORS = ("observation.state", "observation.environment_state")
COLOURS = 3


@dataclass(frozen=True)
class _Part:
    """Where an input feature lies: in which entry of the observation (None is all of it), and there on the last axis."""

    feature: str
    key: str | None
    columns: slice
    is_image: bool


class LeRobotObservations:
    """
    :param config: LeRobot's config of the policy; its ``input_features`` say what is read
    :param preprocess: LeRobot's, from batches to normalised batches
    :param obs_keys: input feature -> key of the env's observation. Features of one key lie side by side on its last axis,
        cameras with three channels each. None: the observation is one array, in which the vectors lie side by side
    :param task: the sentence that a vision-language-action policy reads; None is another kind of policy. Such policies read
        one frame, in batches without an axis for frames, and can do without a camera that no key is named for
    :raises ValueError: if a feature is unknown, or no key is named for one that the policy reads
    """

    def __init__(
        self, config: Any, preprocess: Callable[[Batch], Batch], obs_keys: Mapping[str, str] | None, task: str | None
    ) -> None:
        self._preprocess, self._task = preprocess, task
        vectors = [name for name in VECTORS if name in config.input_features]
        images = list(config.image_features)
        if obs_keys is not None:
            if unknown := sorted(set(obs_keys) - {*vectors, *images}):
                raise ValueError(f"obs_keys names {unknown[0]!r}, but the policy reads {[*vectors, *images]}")
            images = [name for name in images if name in obs_keys or task is None]
        missing = [*images] if obs_keys is None else [name for name in (*vectors, *images) if name not in obs_keys]
        if missing:
            raise ValueError(
                f"The policy reads {missing[0]!r}: pass obs_keys, which says what the env calls it, such as "
                f"obs_keys={{{missing[0]!r}: 'key of the observation'}}"
            )
        self._parts: list[_Part] = []
        widths: dict[str | None, int] = {}
        frames: dict[str | None, tuple[int, ...]] = {}
        for name in (*vectors, *images):
            key = None if obs_keys is None else obs_keys[name]
            is_image, shape = name in images, tuple(config.input_features[name].shape)
            begin = widths.get(key, 0)
            widths[key] = end = begin + (COLOURS if is_image else shape[0])
            frame = (*shape[1:], end) if is_image else (end,)
            if key in frames and frames[key][:-1] != frame[:-1]:
                raise ValueError(f"obs_keys names {key!r} for features of different sizes: {name!r} has {shape}")
            frames[key] = frame
            self._parts.append(_Part(name, key, slice(begin, end), is_image))
        #: shape of one frame of the env
        self.shapes: FrameShapes = frames[None] if obs_keys is None else {str(key): shape for key, shape in frames.items()}

    def batch(self, obs: Any, device: th.device) -> Batch:
        """
        :param obs: (B, frames, ...), or a dict of such; images are colours last, integers from 0 to 255 or floats from 0 to 1
        :param device: of the policy
        :return: what ``preprocess`` makes of vectors (B, frames, D) and images (B, frames, 3, height, width) in [0, 1], by the
            names of their features
        """
        batch: Batch = {}
        for part in self._parts:
            values = th.as_tensor(obs if part.key is None else obs[part.key], device=device)[..., part.columns]
            if part.is_image:
                values = values.movedim(-1, -3)
                values = values if values.is_floating_point() else values / 255
            batch[part.feature] = (values if self._task is None else values[:, -1]).float()
        if self._task is not None:
            batch["task"] = [self._task] * len(batch[self._parts[0].feature])
        return {key: x.to(device) for key, x in self._preprocess(batch).items() if isinstance(x, th.Tensor)}
