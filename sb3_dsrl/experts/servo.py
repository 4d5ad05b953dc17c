"""From the pose that a gripper should have to the arm's next action, by the Jacobian of the robot's own model."""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
from sapien.wrapper.pinocchio_model import PinocchioModel
from transforms3d.euler import quat2euler
from transforms3d.quaternions import quat2axangle

#: Share of a commanded move that the Panda makes within the step: its drives are a spring (1e3) on a damper (1e2), so that
#: after a step of 1/20 s all but exp(-0.5) of the way is done.
RESPONSE = 1 - np.exp(-0.5)
MAX_MOVE, MAX_TURN = 0.035, 0.12  # m and rad that the gripper moves and turns in a step at most
WEIGHTS = np.array([1.0, 1.0, 1.0, 0.2, 0.2, 0.2])  # where joints are too slow: a radian off counts as much as so many metres
MARGIN = 0.02  # rad to the joints' limits
DAMPING = 0.02  # of the least squares: bounds the joints' speed beside a singularity
CONTROL_MODES: tuple[str, ...] = ("pd_joint_delta_pos", "pd_ee_delta_pose")


class Servo:
    """
    Moves the tool centre point (tcp) of a Panda towards a pose, as far as it comes in a step.

    :param base: the unwrapped ManiSkill env, after a reset, with one of ``CONTROL_MODES``
    """

    def __init__(self, base: Any) -> None:
        self.agent, self.joints = base.agent, base.control_mode == "pd_joint_delta_pos"
        self.config = base.agent.controller.controllers["arm"].config
        # Of the URDF, not of the articulation: some tasks build a new one at every reset, with which its model goes.
        with open(self.agent.urdf_path) as file:
            self.model = PinocchioModel(file.read(), [0, 0, -9.81])
        self.model.set_joint_order([joint.name for joint in self.agent.robot.active_joints])
        self.model.set_link_order([self.agent.tcp.name])
        self.root = self.agent.robot.pose.sp.inv()
        self.limits = self.agent.robot.get_qlimits()[0].numpy().T[:, : len(self.config.joint_names)] + [[MARGIN], [-MARGIN]]
        self.size = len(self.config.joint_names) if self.joints else 6

    def action_to(self, target: sapien.Pose, speed: float = 1.0) -> np.ndarray:
        """
        :param target: of the tcp, in the world
        :param speed: share of the largest action
        :return: normalised action of the arm, within [-speed, speed]
        """
        qpos = self.agent.robot.get_qpos()[0].numpy().astype(np.float64)
        self.model.compute_forward_kinematics(qpos)
        now, goal = self.model.get_link_pose(0), self.root * target
        turn = goal * now.inv()
        axis, angle = quat2axangle(turn.q)
        move, angle = goal.p - now.p, (angle + np.pi) % (2 * np.pi) - np.pi
        move = move * min(1.0, MAX_MOVE / max(float(np.linalg.norm(move)), 1e-9))
        rotation = axis * np.clip(angle, -MAX_TURN, MAX_TURN)
        if self.joints:
            self.model.compute_full_jacobian(qpos)
            local = self.model.get_link_jacobian(0, True)[:, : self.size]  # in the axes of the tcp
            axes = now.to_transformation_matrix()[:3, :3]
            jacobian = np.concatenate([axes @ local[:3], axes @ local[3:]])
            limit = RESPONSE * speed * self.config.upper
            low, high = self.limits - qpos[: self.size]
            step = bounded_least_squares(
                jacobian * WEIGHTS[:, None],
                np.concatenate([move, rotation]) * WEIGHTS,
                np.clip(low, -limit, 0.0),
                np.clip(high, 0.0, limit),
            )
            return step / (RESPONSE * self.config.upper)
        # The controller scales rotations by its *lower* limit, -0.1: a positive action turns backwards.
        angles = np.array(quat2euler(axangle2quat(rotation), "rxyz")) / self.config.rot_lower
        action = np.concatenate([move / self.config.pos_upper, angles]) / RESPONSE
        return action * min(1.0, speed / max(float(np.abs(action).max()), 1e-9))

    def clip(self, arm_action: np.ndarray) -> np.ndarray:
        """What the controller makes of an action."""
        clipped = np.clip(arm_action, -1.0, 1.0)
        if not self.joints:  # rotations are clipped by their norm
            clipped[3:] /= max(1.0, float(np.linalg.norm(clipped[3:])))
        return clipped


def bounded_least_squares(matrix: np.ndarray, wanted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """
    The smallest x that brings ``matrix @ x`` close to ``wanted`` within bounds: whichever entry exceeds its own most is held
    there, and the others make up for it.

    :param matrix: (m, n)
    :param wanted: (m,)
    :param low: (n,), at most 0
    :param high: (n,), at least 0
    :return: x, (n,)
    """
    x, free = np.zeros(len(low)), np.ones(len(low), bool)
    while True:
        part = matrix[:, free]
        left = wanted - matrix @ np.where(free, 0.0, x)
        x[free] = part.T @ np.linalg.solve(part @ part.T + DAMPING**2 * np.eye(len(wanted)), left)
        excess = np.where(free, np.maximum(x - high, low - x), 0.0)
        worst = int(excess.argmax())
        if excess[worst] <= 1e-9:
            return x
        x, free = np.where(free & (np.arange(len(x)) != worst), x, np.clip(x, low, high)), free & (np.arange(len(x)) != worst)


def axangle2quat(rotation: np.ndarray) -> np.ndarray:
    """
    :param rotation: axis times angle
    :return: quaternion, real part first
    """
    half = float(np.linalg.norm(rotation)) / 2
    return np.concatenate([[np.cos(half)], rotation * (0.5 * np.sinc(half / np.pi))])
