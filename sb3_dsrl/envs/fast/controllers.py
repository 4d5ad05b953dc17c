"""Controllers of one robot on the CPU, without a tensor operation for every joint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch as th
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers import (
    PDEEPosController,
    PDEEPoseController,
    PDJointPosController,
    PDJointPosMimicController,
)
from mani_skill.agents.controllers.base_controller import BaseController, CombinedController
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs import Articulation

from sb3_dsrl.envs.fast.end_effector import FRAME, inverse_kinematics, moved_pose, pose_action_scaling

SetAction = Callable[[th.Tensor], None]


def speed_up_controllers(base: BaseEnv) -> None:
    """
    Binds a fast ``set_action`` to the controllers that are known; others stay as they are.

    :param base: one CPU env
    """
    agent = base.agent
    if not isinstance(agent, BaseAgent):  # none, or several robots
        return
    if type(agent).set_action is BaseAgent.set_action:
        agent.set_action = agent_set_action(agent)
    controller = agent.controller
    for part in controller.controllers.values() if type(controller) is CombinedController else [controller]:
        make = SET_ACTIONS.get(type(part))
        if make is not None and not part.config.interpolate and type(part.articulation) is Articulation:
            part.set_action = make(part)


def agent_set_action(agent: BaseAgent) -> SetAction:
    """
    Stands for ``BaseAgent.set_action``: the check for NaN.

    :param agent: the robot
    """

    def set_action(action: th.Tensor) -> None:
        if np.isnan(action.numpy() if isinstance(action, th.Tensor) else action).any():
            raise ValueError("Action cannot be NaN. Environment received:", action)
        agent.controller.set_action(action)

    return set_action


def joint_set_action(controller: PDJointPosController) -> SetAction:
    """
    Stands for ``PDJointPosController.set_action``.

    :param controller: of some joints
    """
    scaled, positions, drive = action_scaling(controller), joint_positions(controller), joint_drives(controller)
    use_delta, use_target = controller.config.use_delta, controller.config.use_target

    def set_action(action: th.Tensor) -> None:
        move = scaled(action)
        controller._step = 0
        start = positions()
        controller._start_qpos = th.from_numpy(start)
        if not use_delta:
            target = np.broadcast_to(move, start.shape).copy()
        elif use_target:
            target = controller._target_qpos.numpy() + move
        else:
            target = start + move
        controller._target_qpos = th.from_numpy(target)
        drive(target)

    return set_action


def mimic_set_action(controller: PDJointPosMimicController) -> SetAction:
    """
    Stands for ``PDJointPosMimicController.set_action``.

    :param controller: of joints of which some follow others
    """
    scaled, positions, drive = action_scaling(controller), joint_positions(controller), joint_drives(controller)
    use_delta, use_target = controller.config.use_delta, controller.config.use_target
    led, mimic, leader = (
        indices.numpy().reshape(-1)
        for indices in (
            controller.control_joint_indices,
            controller.mimic_joint_indices,
            controller.mimic_control_joint_indices,
        )
    )
    multiplier, offset = controller._multiplier.numpy(), controller._offset.numpy()

    def set_action(action: th.Tensor) -> None:
        move = scaled(action)
        controller._step = 0
        start = positions()
        controller._start_qpos = th.from_numpy(start)
        target = controller._target_qpos.numpy()  # the tensor's own memory: the targets change in place
        if not use_delta:
            target[:, led] = move
        elif use_target:
            target[:, led] += move
        else:
            target[:, led] = start[:, led] + move
        target[:, mimic] = target[:, leader] * multiplier + offset
        drive(target)

    return set_action


def end_effector_set_action(controller: PDEEPosController) -> SetAction:
    """
    Stands for ``PDEEPosController.set_action``, without what only the GPU's inverse kinematics need.

    :param controller: of the end effector
    """
    config, positions, drive = controller.config, joint_positions(controller), joint_drives(controller)
    solve = inverse_kinematics(controller.kinematics)
    if type(controller) is PDEEPoseController:
        if config.use_delta and config.frame == FRAME:
            controller.compute_target_pose = moved_pose
        if controller._normalize_action and isinstance(config.rot_lower, float):
            controller._clip_and_scale_action = pose_action_scaling(controller)

    def set_action(action: th.Tensor) -> None:
        action = controller._preprocess_action(action)
        controller._step = 0
        start = positions()
        controller._start_qpos = th.from_numpy(start)
        previous = controller._target_pose if config.use_target else controller.ee_pose_at_base
        controller._target_pose = controller.compute_target_pose(previous, action)
        target = solve(controller._target_pose)
        target = start if target is None else target
        controller._target_qpos = th.from_numpy(target)
        drive(target)

    return set_action


#: By the controller's type.
SET_ACTIONS: dict[type[BaseController], Callable[..., SetAction]] = {
    PDJointPosController: joint_set_action,
    PDJointPosMimicController: mimic_set_action,
    PDEEPosController: end_effector_set_action,
    PDEEPoseController: end_effector_set_action,
}


def action_scaling(controller: BaseController) -> Callable[[th.Tensor], np.ndarray]:
    """
    Stands for ``BaseController._preprocess_action`` and ``clip_and_scale_action``.

    :param controller: scales actions from [-1, 1] to its own bounds, or not at all
    """
    shape = (1, controller.action_space.shape[0])
    if controller._normalize_action:
        low, high = controller.action_space_low.numpy(), controller.action_space_high.numpy()
        middle, half = np.float32(0.5) * (high + low), np.float32(0.5) * (high - low)

    def scaled(action: th.Tensor) -> np.ndarray:
        assert action.shape == shape, (action.shape, shape)
        array = action.numpy()
        return middle + half * np.maximum(np.minimum(array, 1), -1) if controller._normalize_action else array

    return scaled


def joint_positions(controller: BaseController) -> Callable[[], np.ndarray]:
    """
    Stands for ``BaseController.qpos``: (1, number of joints).

    :param controller: of these joints
    """
    robot, indices = controller.articulation._objs[0], controller.active_joint_indices.numpy()
    return lambda: robot.qpos[None, indices]


def joint_drives(controller: BaseController) -> Callable[[np.ndarray], None]:
    """
    Stands for ``Articulation.set_joint_drive_targets`` and the setter of ``ArticulationJoint.drive_target``.

    :param controller: of these joints
    """
    setters = [joint._objs[0].set_drive_target for joint in controller.joints]

    def drive(targets: np.ndarray) -> None:
        for set_drive_target, target in zip(setters, targets[0].tolist(), strict=True):
            set_drive_target(target)

    return drive
