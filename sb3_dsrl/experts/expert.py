"""What the scripted experts share: goals, styles, grasps, and ways to them that lead past what stands around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import sapien

OPEN, CLOSED = 1.0, -1.0  # gripper actions


@dataclass(frozen=True)
class Style:
    """
    How an operator does a task. What a task makes of ``along`` stands in its file.

    :param name: for people
    :param speed: share of the arm's largest action
    :param along: m from the usual grasp or contact
    :param height: m added to the height at which things are carried and approached
    :param side: m by which the way to the object bends to the left (negative: right)
    """

    name: str
    speed: float = 1.0
    along: float = 0.0
    height: float = 0.0
    side: float = 0.0


@dataclass(frozen=True)
class Goal:
    """
    What an expert wants now.

    :param tcp: pose of the tool centre point, in the world
    :param gripper: OPEN, CLOSED or between
    """

    tcp: sapien.Pose
    gripper: float


class Expert:
    """
    Solves a task in closed loop: its goal depends on the poses of this moment only, not on time, so that whatever goes wrong
    is mended, and a policy can learn what to do from an observation.

    :param base: the unwrapped ManiSkill env, after a reset
    :param style: one of ``styles``
    """

    styles: ClassVar[tuple[Style, ...]]
    noise: ClassVar[float] = 0.05  # std on the normalised arm action, at which most attempts succeed

    def __init__(self, base: Any, style: Style) -> None:
        self.base, self.style = base, style

    @property
    def tcp(self) -> sapien.Pose:
        """Where the tool centre point is."""
        return self.base.agent.tcp.pose.sp

    def holds(self, actor: Any) -> bool:
        """Whether both fingers press on something."""
        return bool(self.base.agent.is_grasping(actor))

    def goal(self) -> Goal:
        """What to do next."""
        raise NotImplementedError

    def way_to(self, grasp: sapien.Pose, clearance: float, tolerance: float = 0.006) -> sapien.Pose:
        """
        A pose on the way to a grasp from above: beside it the gripper stays high, above it it comes down.

        :param grasp: pose of the tcp
        :param clearance: m above the grasp while far from it; the style's ``height`` is added
        :param tolerance: m within which the gripper goes straight down
        """
        now = self.tcp
        off = grasp.p - now.p
        beside = float(np.linalg.norm(off[:2])) + 0.05 * angle_between(grasp, now)
        height = np.clip(2.0 * (beside - tolerance), 0.0, clearance + self.style.height)
        left = np.array([-off[1], off[0], 0.0]) / max(beside, 1e-6)
        bend = self.style.side * np.clip((beside - 0.03) / 0.1, 0.0, 1.0)
        return sapien.Pose(grasp.p + up(height) + bend * left, grasp.q)

    def carried(self, off: np.ndarray) -> sapien.Pose:
        """
        A pose of the tcp for carrying something, pointing straight down: an orientation that is only kept as it is drifts.

        :param off: m by which the tcp moves, (3,)
        """
        tcp = self.tcp
        return self.grasp_from_above(tcp.p + off, tcp.to_transformation_matrix()[:3, 1])

    def grasp_from_above(self, center: np.ndarray, closing: np.ndarray, quarters: bool = False) -> sapien.Pose:
        """
        A pose of the tcp that points down, turned as little as possible from where it is.

        :param center: between the fingers
        :param closing: horizontal direction in which the fingers close, either way round
        :param quarters: the object may as well be grasped a quarter turn away, as a cube may
        """
        closing = np.array([closing[0], closing[1], 0.0]) / np.hypot(closing[0], closing[1])
        ways = [closing, -closing]
        if quarters:
            ways += [np.array([-way[1], way[0], 0.0]) for way in ways]
        present = self.tcp.to_transformation_matrix()[:3, 1]
        return self.base.agent.build_grasp_pose(np.array([0.0, 0.0, -1.0]), max(ways, key=lambda way: way @ present), center)


def up(height: float) -> np.ndarray:
    """
    :param height: in m
    :return: a vector that points up
    """
    return np.array([0.0, 0.0, height])


def angle_between(a: sapien.Pose, b: sapien.Pose) -> float:
    """
    :param a: a pose
    :param b: another one
    :return: angle of the rotation between them, in rad
    """
    return 2.0 * float(np.arccos(min(1.0, abs(float(a.q @ b.q)))))


def level_axis(pose: sapien.Pose) -> np.ndarray:
    """
    :param pose: of a box
    :return: that of its axes which is the most horizontal one, (3,)
    """
    axes = pose.to_transformation_matrix()[:3, :3]
    return axes[:, int(np.abs(axes[2]).argmin())]
