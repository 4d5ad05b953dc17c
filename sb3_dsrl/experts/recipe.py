"""What an attempt at a demo depends on, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

ARM_JOINTS = 7  # of the Panda; what follows in an action is the gripper


@dataclass(kw_only=True)
class DemoRecipe:
    """Flags that decide what attempt i is."""

    env_id: str = "PushCube-v1"
    """A ManiSkill task with a scripted expert or a motion planning solution."""
    expert: Literal["scripted", "planner"] | None = None
    """A scripted expert in closed loop, or ManiSkill's motion planner, whose plan is tracked. If not given: scripted, where
    the task has one."""
    seed: int = 0
    """Attempt i resets its env with seed + i."""
    control_mode: str = "pd_joint_delta_pos"
    """pd_joint_delta_pos or pd_ee_delta_pose; the planner knows pd_joint_pos, too."""
    obs_mode: str = "state"
    """What to record, such as state or rgb."""
    camera_size: int | None = None
    """Height and width of recorded images in pixels. If not given: the task's."""
    reward_mode: str = "normalized_dense"
    """normalized_dense, dense, sparse or none."""
    render_backend: str | None = None
    """"none" for state observations and "cpu" for images, if not given."""
    noise: float | None = None
    """Std of the noise on the normalised arm action, smooth in time. The labels are what was executed. If not given: what the
    scripted expert bears, none for the planner."""
    noise_rho: float = 0.9
    """Its correlation from one step to the next, AR(1): 0.9 is about ten steps, a hand that drifts; 0 is white."""
    styles: int = 1
    """Scripted: how many operators take turns, with speeds, grasps and detours of their own. The style's index is recorded."""
    speedup: int = 1
    """Planner: keep every k-th moving waypoint of the plan: 2 is twice as fast."""
    trim_pauses: bool = False
    """Planner: drop steps where it waits. A policy trained on them may wait for ever."""
    keep_failures: bool = False
    """Keep episodes that do not end in success, too."""
    extra_steps: int = 5
    """Steps to go on after the task is solved."""
    max_episode_steps: int | None = None
    """Cut episodes here. If not given: at the registered time limit; the planner's are not cut and may exceed it."""


@dataclass
class Attempt:
    """
    What came of an attempt.

    :param success: whether the episode ended in success
    :param complaint: what went wrong
    :param episode: what a trajectory file says about the episode in its JSON; None if there was no episode
    :param arrays: what it holds of it in HDF5, nested dicts of arrays
    :param file: what it says about all of its episodes: ``env_info``, ``commit_info`` and, of flat states, ``state_layout``
    """

    success: bool
    complaint: str = ""
    episode: dict[str, Any] | None = None
    arrays: dict[str, Any] | None = None
    file: dict[str, Any] | None = None


class Demonstrator(Protocol):
    """Makes attempts, one after the other."""

    def rebuild(self) -> None:
        """Forgets the attempts so far: PhysX goes on from its caches after a reset, in the last bits."""

    def attempt(self, seed: int) -> Attempt:
        """
        :param seed: of the episode
        """


def smooth_noise(rng: np.random.Generator, std: float, rho: float) -> Iterator[np.ndarray]:
    """
    AR(1) noise for the arm, stationary from its first sample on.

    :param rng: source
    :param std: of every sample
    :param rho: correlation of a sample with the next one
    """
    noise = rng.normal(0.0, std, ARM_JOINTS)
    while True:
        yield noise
        noise = rho * noise + np.sqrt(1 - rho**2) * rng.normal(0.0, std, ARM_JOINTS)
