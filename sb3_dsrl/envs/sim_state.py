"""States of a ManiSkill env on the CPU: all that the rest of an episode depends on, as far as PhysX tells it.

What PhysX does not tell is what it remembers of contacts, from which its solver starts the next step. So an env that touches
something goes on slightly differently after a restore; the figures are in docs/simulators.md.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import sapien
import torch as th
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs import Pose
from sapien.physx import PhysxArticulation, PhysxArticulationLinkComponent, PhysxRigidDynamicComponent

from sb3_dsrl.steering import batched_state
from sb3_dsrl.steering.batched_state import controllers_of

#: Attributes of an env that are no part of a state: observations that nobody reads again, and which episodes come next.
NOT_KEPT = batched_state.NOT_KEPT | {"_main_seed", "_reconfig_counter"}


class _Tensor(NamedTuple):
    """A tensor, in a form that pickle knows to handle fast."""

    array: np.ndarray
    device: str


class _PoseOf(NamedTuple):
    """One of ManiSkill's poses."""

    cls: type[Pose]
    raw: _Tensor


class _NotPlain(Exception):
    """Something that is no part of a state: an object of the simulator, a function."""


def get_sim_state(base: BaseEnv) -> bytes:
    """
    Bodies and robots (poses, velocities, joints, drive targets), controllers, and whatever the task keeps in numbers, tensors
    and poses: goals, elapsed steps, the episode's random generator.

    :param base: one CPU env, after its first reset
    """
    scene = base.scene.sub_scenes[0]
    state = dict(
        scene=_name_of_scene(base),
        poses=np.array([_numbers(entity.pose) for entity in _free_entities(scene)]),
        bodies=[(body.linear_velocity, body.angular_velocity, body.is_sleeping) for body in _moving_bodies(scene)],
        articulations=[_articulation_state(articulation) for articulation in _articulations(base)],
        controllers=[_attributes(controller) for controller in controllers_of(base)],
        task=_attributes(base),
        rng=[rng.get_state() for rng in _generators(base)],
    )
    return pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL)


def set_sim_state(base: BaseEnv, state: bytes) -> None:
    """
    :param base: the env of which the state is
    :param state: of :func:`get_sim_state`
    :raises ValueError: if it is of another env, or the scene was built anew since then
    """
    kept = pickle.loads(state)
    if kept["scene"] != _name_of_scene(base):
        name = base.spec.id if base.spec is not None else type(base).__name__
        raise ValueError(f"{name}: this state is of another scene, of another env or of an episode before this one")
    scene = base.scene.sub_scenes[0]
    for articulation, own in zip(_articulations(base), kept["articulations"], strict=True):
        _set_articulation_state(articulation, own)
    moving = {body.entity for body in _moving_bodies(scene)}
    for entity, pose in zip(_free_entities(scene), kept["poses"], strict=True):
        if entity in moving or not np.array_equal(_numbers(entity.pose), pose):
            entity.set_pose(sapien.Pose(pose[:3], pose[3:]))
    for body, (linear, angular, sleeping) in zip(_moving_bodies(scene), kept["bodies"], strict=True):
        body.set_linear_velocity(linear)
        body.set_angular_velocity(angular)
        if sleeping:
            body.put_to_sleep()
    for controller, attributes in zip(controllers_of(base), kept["controllers"], strict=True):
        _set_attributes(controller, attributes)
    _set_attributes(base, kept["task"])
    for rng, own in zip(_generators(base), kept["rng"], strict=True):
        rng.set_state(own)


def set_recorded_state(base: BaseEnv, env_states: dict[str, dict[str, np.ndarray]], elapsed_steps: int) -> None:
    """
    Goes to a state that ManiSkill has recorded: bodies and joints, and nothing of controllers or contacts.

    :param base: one CPU env, in an episode with the same objects
    :param env_states: for "actors" and "articulations" the state of each, (D,), as ``BaseEnv.get_state_dict`` has it
    :param elapsed_steps: of the episode
    :raises ValueError: if it has other bodies or robots
    """
    now = base.get_state_dict()
    sizes = [
        {(kind, name): np.shape(value)[-1] for kind, part in state.items() for name, value in part.items()}
        for state in (env_states, now)
    ]
    if sizes[0] != sizes[1]:
        name = base.spec.id if base.spec is not None else type(base).__name__
        raise ValueError(f"{name} has {sorted(sizes[1].items())}, but the recorded state is of {sorted(sizes[0].items())}")
    base.set_state_dict(env_states)
    for controller in controllers_of(base):
        controller.reset()
    base._elapsed_steps[:] = elapsed_steps


def _name_of_scene(base: Any) -> str:
    """Tells a scene from all others; tasks whose objects differ from episode to episode build a new one for each."""
    return vars(base.scene).setdefault("_sb3_dsrl_name", uuid4().hex)


def _numbers(pose: sapien.Pose) -> np.ndarray:
    return np.concatenate((pose.p, pose.q))


def _free_entities(scene: sapien.Scene) -> list[sapien.Entity]:
    """All but the links of robots, which follow from their joints."""
    return [
        entity
        for entity in scene.entities
        if not any(isinstance(component, PhysxArticulationLinkComponent) for component in entity.components)
    ]


def _moving_bodies(scene: sapien.Scene) -> list[PhysxRigidDynamicComponent]:
    return [
        component
        for entity in scene.entities
        for component in entity.components
        if isinstance(component, PhysxRigidDynamicComponent) and not component.kinematic
    ]


def _articulations(base: Any) -> list[PhysxArticulation]:
    return [articulation._objs[0] for articulation in base.scene.articulations.values()]


def _articulation_state(articulation: PhysxArticulation) -> dict[str, Any]:
    targets = [(joint.drive_target, joint.drive_velocity_target) for joint in articulation.active_joints]
    root = _numbers(articulation.root_pose), articulation.root_linear_velocity, articulation.root_angular_velocity
    return dict(
        root=root, qpos=articulation.qpos, qvel=articulation.qvel, qf=articulation.qf, targets=targets
    )  # arrays of their own


def _set_articulation_state(articulation: PhysxArticulation, state: dict[str, Any]) -> None:
    pose, linear, angular = state["root"]
    if not np.array_equal(_numbers(articulation.root_pose), pose):  # the base of most robots is fixed
        articulation.set_root_pose(sapien.Pose(pose[:3], pose[3:]))
    if articulation.root.joint.type != "fixed":
        articulation.set_root_linear_velocity(linear)
        articulation.set_root_angular_velocity(angular)
    articulation.set_qpos(state["qpos"])
    articulation.set_qvel(state["qvel"])
    articulation.set_qf(state["qf"])
    for joint, (target, velocity) in zip(articulation.active_joints, state["targets"], strict=True):
        joint.set_drive_target(target)
        joint.set_drive_velocity_target(velocity)


def _generators(base: Any) -> list[np.random.RandomState]:
    """Of the episode. The one that draws the episodes' seeds is no part of a state."""
    batched = base._batched_episode_rng
    return [] if batched is None else [batched[0]]


def _attributes(obj: Any) -> dict[str, Any]:
    """What an object keeps in numbers, tensors, poses and containers of such."""
    kept = {}
    for name, value in vars(obj).items():
        if name not in NOT_KEPT:
            try:
                kept[name] = _frozen(value)
            except _NotPlain:
                continue
    return kept


def _set_attributes(obj: Any, kept: dict[str, Any]) -> None:
    now = vars(obj)
    for name in _attributes(obj).keys() - kept.keys():  # first set after the state was taken
        del now[name]
    now.update({name: _thawed(value) for name, value in kept.items()})


def _frozen(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return _Tensor(value.detach().cpu().numpy(), str(value.device))
    if isinstance(value, Pose):
        return _PoseOf(type(value), _frozen(value.raw_pose))
    if type(value) in (list, tuple):
        return type(value)(_frozen(part) for part in value)
    if type(value) is dict:
        return {key: _frozen(part) for key, part in value.items()}
    if value is None or isinstance(value, bool | int | float | str | np.number) or type(value) is np.ndarray:
        return value
    raise _NotPlain


def _thawed(value: Any) -> Any:
    if isinstance(value, _Tensor):
        return th.from_numpy(np.array(value.array)).to(value.device)
    if isinstance(value, _PoseOf):
        return value.cls(_thawed(value.raw))
    if type(value) in (list, tuple):
        return type(value)(_thawed(part) for part in value)
    if type(value) is dict:
        return {key: _thawed(part) for key, part in value.items()}
    return deepcopy(value)
