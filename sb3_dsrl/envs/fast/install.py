"""Where the shortcuts are installed, and whether."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import gymnasium as gym
import mani_skill
from mani_skill.envs.sapien_env import BaseEnv

from sb3_dsrl.envs.fast.controllers import speed_up_controllers
from sb3_dsrl.envs.fast.grasping import speed_up_grasping
from sb3_dsrl.envs.fast.observations import ObserveOnDemand, may_leave_out
from sb3_dsrl.envs.fast.poses import speed_up_poses
from sb3_dsrl.envs.fast.tasks import speed_up_task
from sb3_dsrl.envs.fast.wrappers import speed_up_wrappers

#: Versions of ManiSkill that the identity test has passed with.
TESTED = ("3.0.1",)

#: "0" in this environment variable switches all shortcuts off.
SWITCH = "SB3_DSRL_FAST"


def wants_fast() -> bool:
    """Whether the shortcuts are on: not switched off, and ManiSkill's version is a tested one. Warns, once, if it is not."""
    return os.environ.get(SWITCH, "1") != "0" and _tested()


@functools.cache
def _tested() -> bool:
    found = mani_skill.__version__
    if found not in TESTED:
        warnings.warn(
            f"mani_skill {found} is stepped at its own speed: the shortcuts of sb3_dsrl.envs.fast are known to be exact with "
            f"{' and '.join(TESTED)} only"
        )
    return found in TESTED


def make_fast(env: gym.Env) -> gym.Env:
    """
    Installs the shortcuts in an env, now and whenever its scene is built anew.

    :param env: one CPU ManiSkill env, with a ``CPUGymWrapper`` around it
    :return: the env, or a wrapper around it
    """
    base: Any = env.unwrapped
    plain = base._reconfigure

    def reconfigure(*args: Any, **kwargs: Any) -> None:
        """Stands for ``BaseEnv._reconfigure``."""
        plain(*args, **kwargs)
        _install(base)

    base._reconfigure = reconfigure
    _install(base)
    speed_up_wrappers(env)
    return ObserveOnDemand(env) if may_leave_out(env) else env


def _install(base: BaseEnv) -> None:
    speed_up_poses(base)
    speed_up_controllers(base)
    speed_up_grasping(base)
    speed_up_task(base)
