"""Observations that are computed only where they are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from sb3_dsrl.envs.fast.stack import Stacks, may_stack
from sb3_dsrl.envs.fast.wrappers import CHAIN, wrapper_types


def may_leave_out(env: gym.Env) -> bool:
    """
    Whether observations can be left out unnoticed. Of ManiSkill's own tasks it is known that observing changes nothing, and
    that no reward reads the observation; somebody else's task or wrapper may do either.

    :param env: one CPU ManiSkill env
    """
    base: Any = env.unwrapped
    known = type(base).__module__.startswith("mani_skill.") and set(wrapper_types(env)) <= set(CHAIN)
    return known and base.obs_mode in ("state", "state_dict")


class ObserveOnDemand(gym.Wrapper):
    """
    An env whose observations can be switched off for a while. Meanwhile they stay as they were; rewards, flags and infos are
    those of the step.

    Inside a chunk nobody looks at most frames. What nobody computes is not checked either: a NaN in an unseen frame goes
    unnoticed, as long as no seen frame and no reward has it.

    :param env: one for which :func:`may_leave_out` is true
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        base: Any = env.unwrapped
        self._observing = True
        self._last: Any = None
        self._last_flat: Any = None
        self._get_obs, self._flatten = base.get_obs, base._flatten_raw_obs
        base.get_obs, base._flatten_raw_obs = self._obs, self._flat

    def set_observing(self, observing: bool) -> None:
        """
        :param observing: whether the next observations are seen
        """
        self._observing = observing

    @staticmethod
    def together(envs: Sequence[gym.Env]) -> Stacks | None:
        """
        How envs of one process take their steps together; see :class:`~sb3_dsrl.steering.lockstep.LockstepVecEnv`.

        :param envs: with this wrapper or not
        """
        return Stacks(envs) if may_stack(envs) else None

    def _obs(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``BaseEnv.get_obs``."""
        if self._observing or self._last is None:
            self._last = self._get_obs(*args, **kwargs)
        return self._last

    def _flat(self, obs: Any) -> Any:
        """Stands for ``BaseEnv._flatten_raw_obs``."""
        if self._observing or self._last_flat is None:
            self._last_flat = self._flatten(obs)
        return self._last_flat
