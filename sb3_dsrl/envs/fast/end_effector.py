"""Target poses of end effector controllers, and their inverse kinematics, with few tensor operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import sapien
import torch as th
from mani_skill.agents.controllers import PDEEPoseController
from mani_skill.agents.controllers.utils.kinematics import Kinematics
from mani_skill.utils.geometry import rotation_conversions as rotations
from mani_skill.utils.structs import Pose

from sb3_dsrl.envs.fast.poses import empty_poses, quaternion_product, standardized

#: The frame that :func:`moved_pose` is for; the one that ManiSkill's robots use.
FRAME = "root_translation:root_aligned_body_rotation"

#: Of the inverse kinematics, as ``Kinematics.compute_ik`` has it.
MAX_ITERATIONS = 100

ONE, TWO, FLOOR = np.float32(1), np.float32(2), np.float32(0.1)


def moved_pose(previous: Pose, action: th.Tensor) -> Pose:
    """
    Stands for ``PDEEPoseController.compute_target_pose`` in the frame ``FRAME``, with ``use_delta``.

    :param previous: pose of the end effector at the robot's base
    :param action: (1, 6), translation and Euler angles
    """
    # Sines, cosines and products of matrices stay torch's: NumPy's differ in the last bit.
    matrix = rotations.euler_angles_to_matrix(action[:, 3:6], "XYZ")
    pose, array = empty_poses(1)
    before = previous.raw_pose.numpy()[0]
    np.add(before[:3], action.numpy()[0, :3], out=array[:3])
    array[3:] = standardized(quaternion_product(matrix_to_quaternion(matrix), before[3:]))
    return pose


def matrix_to_quaternion(matrix: th.Tensor) -> np.ndarray:
    """
    Stands for ``matrix_to_quaternion``: only the candidate that is taken is computed.

    :param matrix: rotation (1, 3, 3)
    :return: quaternion (4,), real part first
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.numpy().reshape(9)
    sums = [ONE + m00 + m11 + m22, ONE + m00 - m11 - m22, ONE - m00 + m11 - m22, ONE - m00 - m11 + m22]
    q_abs = rotations._sqrt_positive_part(th.from_numpy(np.array([sums], np.float32))).numpy()[0]
    best = int(q_abs.argmax())
    square = q_abs[best] * q_abs[best]
    candidate = (
        (square, m21 - m12, m02 - m20, m10 - m01),
        (m21 - m12, square, m10 + m01, m02 + m20),
        (m02 - m20, m10 + m01, square, m12 + m21),
        (m10 - m01, m20 + m02, m21 + m12, square),
    )[best]
    return standardized(np.array(candidate, np.float32) / (TWO * max(q_abs[best], FLOOR)))


def pose_action_scaling(controller: PDEEPoseController) -> Callable[[th.Tensor], th.Tensor]:
    """
    Stands for ``PDEEPoseController._clip_and_scale_action``.

    :param controller: scales translations from [-1, 1] to its own bounds, and rotations by one factor
    """
    low, high = controller.action_space_low.numpy()[:3], controller.action_space_high.numpy()[:3]
    middle, half = np.float32(0.5) * (high + low), np.float32(0.5) * (high - low)
    factor = np.float32(controller.config.rot_lower)

    def scaled(action: th.Tensor) -> th.Tensor:
        result = th.empty((1, 6))
        move, array = result.numpy()[0], action.numpy()[0]
        move[:3] = middle + half * np.clip(array[:3], -1, 1)
        norm = th.linalg.norm(action[:, 3:].clone(), axis=1).numpy()[0]
        move[3:] = (array[3:] * (ONE / norm) if norm > 1 else array[3:]) * factor
        return result

    return scaled


def inverse_kinematics(kinematics: Kinematics) -> Callable[[Pose], np.ndarray | None]:
    """
    Stands for ``Kinematics.compute_ik`` on the CPU.

    :param kinematics: of one robot
    :return: takes a pose to joint positions (1, number of joints); None if there are none
    """
    robot, model = kinematics.articulation._objs[0], kinematics.pmodel
    active, controlled = kinematics.pmodel_active_joint_indices.numpy(), kinematics.pmodel_controlled_joint_indices.numpy()
    mask = kinematics.qmask.numpy()

    def solve(pose: Pose) -> np.ndarray | None:
        target = pose.raw_pose.numpy()[0]
        result, success, _ = model.compute_inverse_kinematics(
            kinematics.end_link_idx,
            sapien.Pose(target[:3], target[3:]),
            initial_qpos=robot.qpos[active],
            active_qmask=mask,
            max_iterations=MAX_ITERATIONS,
        )
        return result[None, controlled].astype(np.float32) if success else None

    return solve
