"""What the chunk envs, single and batched, have in common: their spaces, how actions are scaled and episodes summed up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces


def check_chunking(act_horizon: int, obs_horizon: int, gamma: float) -> None:
    """
    :param act_horizon: H
    :param obs_horizon: frames in an observation
    :param gamma: discount per env step
    :raises ValueError: if one of them is out of range
    """
    if act_horizon < 1 or obs_horizon < 1:
        raise ValueError(f"act_horizon and obs_horizon must be at least 1, found {act_horizon} and {obs_horizon}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is the discount per env step and must lie in (0, 1], found {gamma}")


def stacked_space(space: spaces.Space, obs_horizon: int) -> spaces.Space:
    """
    Space of ``obs_horizon`` stacked frames; floats become float32.

    :param space: Box of one frame, or a Dict of Boxes
    :param obs_horizon: frames in an observation
    :raises ValueError: if it is another kind of space
    """
    if isinstance(space, spaces.Dict) and all(isinstance(part, spaces.Box) for part in space.values()):
        return spaces.Dict({key: stacked_space(part, obs_horizon) for key, part in space.items()})
    if not isinstance(space, spaces.Box):
        raise ValueError(f"A chunk env needs a Box or a Dict of Boxes as observation space, found {space}")
    low, high = (np.repeat(bound[None], obs_horizon, 0) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=np.float32 if space.dtype.kind == "f" else space.dtype)  # type: ignore[arg-type]


def chunk_space(space: spaces.Space, act_horizon: int) -> spaces.Box:
    """
    Space of chunks of ``act_horizon`` actions, scaled to [-1, 1].

    :param space: of one action
    :param act_horizon: H
    :raises ValueError: if it is not a bounded Box of shape (A,)
    """
    if not (isinstance(space, spaces.Box) and space.is_bounded() and len(space.shape) == 1):
        raise ValueError(f"A chunk env needs a bounded Box of shape (A,) as action space, found {space}")
    return spaces.Box(-1.0, 1.0, (act_horizon, *space.shape), np.float32)


def clip_actions(actions: Any) -> Any:
    """
    The one clip between policy and env.

    :param actions: array or tensor of any shape
    :return: in [-1, 1], where flows act
    """
    return actions.clip(-1.0, 1.0)


class ActionScaler:
    """
    From [-1, 1], where the flow acts, to the env's own bounds; for NumPy arrays and tensors.

    :param space: of one action
    :param convert: makes the bounds what they are multiplied with, ``th.as_tensor`` for tensors
    """

    def __init__(self, space: spaces.Box, convert: Callable[[np.ndarray], Any] = np.asarray) -> None:
        self._low, self._span = convert(space.low), convert(0.5 * (space.high - space.low))
        self._unit = bool((space.low == -1.0).all() and (space.high == 1.0).all())

    def __call__(self, actions: Any) -> Any:
        """
        :param actions: (..., A), clipped to [-1, 1] first
        """
        actions = clip_actions(actions)
        return actions if self._unit else self._low + (actions + 1.0) * self._span


def episode_summary(
    episode_return: float,
    length: int,
    macro_return: float,
    macro_steps: int,
    started: float,
    success_once: bool | None,
    success_at_end: bool | None,
) -> dict[str, Any]:
    """
    What ``info`` holds at the end of an episode. ``episode`` means what SB3's ``Monitor`` above the env would say: what the
    algorithm saw, in macro-steps and macro rewards.

    :param episode_return: undiscounted and unscaled, up to the time limit
    :param length: env steps, up to the time limit
    :param macro_return: sum of the macro rewards
    :param macro_steps: number of macro-steps
    :param started: ``time.time()`` of its reset
    :param success_once: None if the env does not report success
    :param success_at_end: likewise
    """
    summary: dict[str, Any] = dict(
        episode_return=episode_return,
        episode_length=length,
        episode=dict(r=round(macro_return, 6), l=macro_steps, t=round(time.time() - started, 6)),
    )
    if success_at_end is not None:
        summary.update(success_once=success_once, success_at_end=success_at_end)
    return summary


def observing_switch(env: Any) -> Callable[[bool], None]:
    """
    How a chunk env says whether the frame of the next env step will be seen: what the chunk does not show need not be
    rendered or computed.

    :param env: if any of its wrappers has a method ``set_observing``, that is the switch; else there is nothing to switch
    """
    try:
        return env.get_wrapper_attr("set_observing")
    except AttributeError:
        return lambda observing: None
