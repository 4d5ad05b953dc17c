"""Whether a gripper holds something, decided by its contacts before anything else is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sapien
import torch as th
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.robots import SO100, Fetch, Panda, WidowXAI, XArm6Robotiq
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils import common
from mani_skill.utils.sapien_utils import compute_total_impulse
from mani_skill.utils.structs import Link

from sb3_dsrl.envs.fast.poses import rotation_matrix


@dataclass(frozen=True)
class Grasp:
    """
    How a robot's ``is_grasping`` differs from the others'.

    :param signs: of the y axes of both fingers, in the direction that opens the gripper
    :param min_force: default of ``min_force``, in newtons
    :param max_angle: default of ``max_angle``, in degrees
    """

    signs: tuple[int, int]
    min_force: float = 0.5
    max_angle: float = 85


GRASPS: dict[Callable[..., Any], Grasp] = {
    Panda.is_grasping: Grasp((1, -1)),
    Fetch.is_grasping: Grasp((-1, 1)),
    XArm6Robotiq.is_grasping: Grasp((1, 1)),
    SO100.is_grasping: Grasp((1, -1), max_angle=110),
    WidowXAI.is_grasping: Grasp((1, -1), min_force=0.2),
}


def speed_up_grasping(base: BaseEnv) -> None:
    """
    Binds a fast ``is_grasping`` to a robot that is known.

    :param base: one CPU env
    """
    agent = base.agent
    grasp = GRASPS.get(type(agent).is_grasping) if isinstance(agent, BaseAgent) else None
    if grasp is not None:
        agent.is_grasping = is_grasping_of(agent, grasp)


def is_grasping_of(agent: BaseAgent, grasp: Grasp) -> Callable[..., th.Tensor]:
    """
    Stands for ``is_grasping`` of the robots in ``GRASPS``. Both fingers must press on the object: the first that does not
    decides.

    :param agent: the robot
    :param grasp: its gripper
    """
    scene = agent.scene
    fingers = [(agent.finger1_link, grasp.signs[0]), (agent.finger2_link, grasp.signs[1])]

    def is_grasping(object: Any, min_force: float = grasp.min_force, max_angle: float = grasp.max_angle) -> th.Tensor:
        pairs = contacts_of(scene.px.get_contacts(), object._bodies[0].entity)
        grasping = True
        for link, sign in fingers:
            contacts = pairs.get(link._bodies[0].entity)
            if contacts is None and min_force > 0:
                grasping = False
                break
            force = common.to_tensor(compute_total_impulse(contacts or []))[None, :] / scene.px.timestep
            if not th.linalg.norm(force, axis=1) >= min_force:
                grasping = False
                break
            angle = common.compute_angle_between(opening_direction(link, sign), force)
            if not th.rad2deg(angle) <= max_angle:
                grasping = False
                break
        return th.full((1,), grasping)

    return is_grasping


def contacts_of(contacts: list[Any], entity: sapien.Entity) -> dict[sapien.Entity, list[tuple[Any, bool]]]:
    """
    Stands for ``get_pairwise_contacts``, with all other entities at once.

    :param contacts: all contacts of the scene
    :param entity: whose contacts are asked for
    :return: for each entity that it touches the contacts, in order, and whether the other entity comes first in them
    """
    pairs: dict[sapien.Entity, list[tuple[Any, bool]]] = {}
    for contact in contacts:
        first, second = (body.entity for body in contact.bodies)
        if second == entity:
            pairs.setdefault(first, []).append((contact, True))
        elif first == entity:
            pairs.setdefault(second, []).append((contact, False))
    return pairs


def opening_direction(link: Link, sign: int) -> th.Tensor:
    """
    Stands for ``link.pose.to_transformation_matrix()[..., :3, 1]``: the other columns are left out.

    :param link: a finger
    :param sign: of the axis
    :return: (1, 3), in a matrix's memory as there, since the order in which torch sums depends on it
    """
    matrix = th.empty((1, 4, 4))
    matrix[..., :3, 1] = rotation_matrix(link.pose)[..., 1]
    direction = matrix[..., :3, 1]
    return direction if sign > 0 else -direction
