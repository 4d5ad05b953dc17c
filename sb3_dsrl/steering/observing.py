"""What the latent policy sees: the features of the flow, the env's observations, or both."""

from __future__ import annotations

from typing import Any, Literal

import torch as th
from gymnasium import spaces

from sb3_dsrl.steering.steering import to_numpy
from sb3_dsrl.utils.observations import map_frames

ObsKind = Literal["features", "env", "both"]

#: Entries of an observation of "both"; those of a dict observation of the env keep their names.
FEATURES, ENV = "features", "env"


class Observer:
    """
    Puts together what a steered env shows.

    :param kind: "features" is what the flow's ``encode`` gives; "env" the frames of the chunk env as they are; "both" is a
        dict of the two
    :param features: space of the features, (C,)
    :param env: space of the chunk env
    :raises ValueError: if there is no such kind, or the env has an entry "features" of its own
    """

    def __init__(self, kind: ObsKind, features: spaces.Space, env: spaces.Space) -> None:
        if kind not in ("features", "env", "both"):
            raise ValueError(f"obs must be 'features', 'env' or 'both', found {kind!r}")
        self.kind = kind
        parts = dict(env.spaces) if isinstance(env, spaces.Dict) else {ENV: env}
        if kind == "both" and FEATURES in parts:
            raise ValueError(f"obs='both' adds the entry {FEATURES!r}, but the env's observations have one: {sorted(parts)}")
        both = spaces.Dict({FEATURES: features, **parts})
        self.space: spaces.Space = {"features": features, "env": env, "both": both}[kind]

    def __call__(self, features: th.Tensor, obs: Any) -> Any:
        """
        :param features: (N, C) or (C,)
        :param obs: of the chunk env, arrays or tensors with the same leading axis
        :return: a NumPy observation of :attr:`space`, or N of them
        """
        if self.kind == "features":
            return to_numpy(features)
        if self.kind == "env":
            return map_frames(to_numpy, obs)
        parts = obs if isinstance(obs, dict) else {ENV: obs}
        return {FEATURES: to_numpy(features), **map_frames(to_numpy, parts)}
