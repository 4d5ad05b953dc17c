"""Whether a gripper holds something, decided by its contacts before anything else is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.robots import SO100, Fetch, Panda, WidowXAI, XArm6Robotiq
from mani_skill.envs.sapien_env import BaseEnv

#: Grippers that hold something only if both fingers press on it, with at least so many newtons by default.
GRASPS: dict[Callable[..., Any], float] = {
    Panda.is_grasping: 0.5,
    Fetch.is_grasping: 0.5,
    XArm6Robotiq.is_grasping: 0.5,
    SO100.is_grasping: 0.5,
    WidowXAI.is_grasping: 0.2,
}


def speed_up_grasping(base: BaseEnv) -> None:
    """
    Binds a fast ``is_grasping`` to a robot that is known.

    :param base: one CPU env
    """
    agent = base.agent
    if isinstance(agent, BaseAgent) and type(agent).is_grasping in GRASPS:
        agent.is_grasping = is_grasping_of(agent, GRASPS[type(agent).is_grasping])


def is_grasping_of(agent: BaseAgent, default_force: float) -> Callable[..., th.Tensor]:
    """
    Stands for ``is_grasping`` of the robots in ``GRASPS``: False as soon as a finger does not touch the object, the robot's own
    function otherwise.

    :param agent: the robot
    :param default_force: default of ``min_force``
    """
    plain = agent.is_grasping
    fingers = [link._bodies[0].entity for link in (agent.finger1_link, agent.finger2_link)]
    scene = agent.scene

    def is_grasping(object: Any, min_force: float = default_force, *args: Any, **kwargs: Any) -> th.Tensor:
        if min_force > 0:
            entity, touching = object._bodies[0].entity, set()
            for contact in scene.px.get_contacts():
                pair = [body.entity for body in contact.bodies]
                if entity in pair:
                    touching.update(finger for finger in (0, 1) if fingers[finger] in pair)
            if len(touching) < 2:
                return th.zeros(1, dtype=th.bool)
        return plain(object, min_force, *args, **kwargs)

    return is_grasping
