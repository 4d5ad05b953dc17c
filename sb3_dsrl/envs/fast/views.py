"""Several envs of one task as one env of that task with a batch of states, for what is computed after the physics."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers.base_controller import BaseController
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.utils.structs import Actor, Articulation, Link, Pose

from sb3_dsrl.envs.fast.poses import FastPose, from_sapien
from sb3_dsrl.envs.fast.tasks import speed_up_task


class NotStackable(Exception):
    """What several envs have cannot be one value with a batch axis."""


class Stacked:
    """
    Many objects of a kind as one. An attribute is that of all of them, stacked; a method is called for one after the other.

    :param sources: one object of each env
    :param moment: counts the states of the simulators; what is read of one state is read once
    """

    def __init__(self, sources: Sequence[Any], moment: list[int]) -> None:
        vars(self).update(_sources=list(sources), _moment=moment, _read={}, _read_at=-1)

    def __getattr__(self, name: str) -> Any:
        return stacked([getattr(source, name) for source in self._sources], self._moment)

    def __setattr__(self, name: str, value: Any) -> None:
        raise NotStackable(f"{type(self._sources[0]).__name__}.{name} is set while results are computed")

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        if self._read_at != self._moment[0]:
            vars(self).update(_read={}, _read_at=self._moment[0])
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]


def reading(read: Callable[[Any], Any]) -> Any:
    """A property that is read once for each state of the simulators."""
    return property(lambda self: self._once(read.__name__, lambda: read(self)))


class StackedActor(Stacked):
    """Actors, one of each env. Each of the functions stands for the one of that name of ``Actor``."""

    is_static = Actor.is_static

    @reading
    def pose(self) -> Pose:
        return from_sapien(*(source._objs[0].pose for source in self._sources))

    @reading
    def linear_velocity(self) -> th.Tensor:
        return rows([source._bodies[0].linear_velocity for source in self._sources])

    @reading
    def angular_velocity(self) -> th.Tensor:
        return rows([source._bodies[0].angular_velocity for source in self._sources])


class StackedLink(Stacked):
    """Links, one of each env. Each of the functions stands for the one of that name of ``Link``."""

    @reading
    def pose(self) -> Pose:
        return from_sapien(*(source._objs[0].entity_pose for source in self._sources))


class StackedArticulation(Stacked):
    """Articulations, one of each env. Each of the functions stands for the one of that name of ``Articulation``."""

    @reading
    def qpos(self) -> th.Tensor:
        return rows([source._objs[0].qpos for source in self._sources])

    @reading
    def qvel(self) -> th.Tensor:
        return rows([source._objs[0].qvel for source in self._sources])

    def get_qpos(self) -> th.Tensor:
        return self.qpos

    def get_qvel(self) -> th.Tensor:
        return self.qvel


class _Computes(Stacked):
    """An object whose class computes on the stacked attributes; only the attributes that an instance has are stacked."""

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self._sources[0]):
            raise NotStackable(f"{type(self._sources[0]).__name__} has no attribute {name}")
        value = super().__getattr__(name)
        vars(self)[name] = value
        return value


class StackedAgent(_Computes):
    """Robots of one kind, one of each env. Contacts are those of its own simulator for each."""

    @property
    def controller(self) -> Any:
        return stacked([source.controller for source in self._sources], self._moment)

    def is_grasping(self, *args: Any, **kwargs: Any) -> th.Tensor:
        return each([source.is_grasping for source in self._sources], self._moment)(*args, **kwargs)


class StackedEnv(_Computes):
    """Envs of one task: ``step`` is that of ``BaseEnv``, where the physics are those of one env after the other."""

    def __init__(self, sources: Sequence[BaseEnv], moment: list[int]) -> None:
        super().__init__(sources, moment)
        vars(self).update(num_envs=len(sources), observing=True)
        speed_up_task(self)  # type: ignore[arg-type]

    @property
    def _elapsed_steps(self) -> th.Tensor:
        return th.cat([source._elapsed_steps for source in self._sources])

    def __setattr__(self, name: str, value: Any) -> None:
        """``step`` counts the steps and keeps the observation; the envs do so by themselves."""
        if name not in ("_elapsed_steps", "_last_obs"):
            super().__setattr__(name, value)

    def _step_action(self, actions: list[th.Tensor]) -> th.Tensor:
        """Stands for the function of ``BaseEnv``, after the envs have called theirs."""
        return th.cat(actions)

    def get_obs(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for the function of ``BaseEnv``."""
        return super().get_obs(*args, **kwargs) if self.observing else None  # type: ignore[misc]

    def _flatten_raw_obs(self, obs: Any) -> Any:
        """Stands for the function of ``BaseEnv``."""
        return super()._flatten_raw_obs(obs) if self.observing else None  # type: ignore[misc]


#: Of each kind of ManiSkill's objects.
VIEWS: dict[type, type[Stacked]] = {
    Actor: StackedActor,
    Link: StackedLink,
    Articulation: StackedArticulation,
    ManiSkillScene: Stacked,
    BaseController: Stacked,
}
COMPUTING: dict[type, type[Stacked]] = {BaseEnv: StackedEnv, BaseAgent: StackedAgent}


def stacked(values: Sequence[Any], moment: list[int]) -> Any:
    """
    :param values: one of each env
    :param moment: see :class:`Stacked`
    :return: one value with a batch axis, or the value that all have
    :raises NotStackable: if there is no such value
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise NotStackable(f"values of several types: {[type(value).__name__ for value in values]}")
    if isinstance(first, th.Tensor):
        if first.ndim and all(value.shape == first.shape for value in values) and len(first) == 1:
            return th.cat(list(values))
        if all(th.equal(value, first) for value in values):
            return first
        raise NotStackable(f"different tensors of shape {tuple(first.shape)}")
    if isinstance(first, Pose):
        return FastPose(stacked([value.raw_pose for value in values], moment))
    if isinstance(first, dict):
        if any(list(value) != list(first) for value in values):
            raise NotStackable("dicts with different keys")
        return {key: stacked([value[key] for value in values], moment) for key in first}
    for kind, view in VIEWS.items():
        if isinstance(first, kind):
            return view(values, moment)
    for kind, view in COMPUTING.items():
        if isinstance(first, kind):
            return computing_view(type(first), view)(values, moment)  # type: ignore[arg-type]
    if isinstance(first, types.MethodType | types.FunctionType):
        return each(values, moment)
    if all(_equal(value, first) for value in values):
        return first
    raise NotStackable(f"different values of type {type(first).__name__}")


def each(functions: Sequence[Callable[..., Any]], moment: list[int]) -> Callable[..., Any]:
    """
    :param functions: one of each env
    :param moment: see :class:`Stacked`
    :return: calls each with the arguments of its env and stacks the results
    """

    def own(argument: Any, i: int) -> Any:
        if isinstance(argument, th.Tensor | Pose):
            raise NotStackable("a function of one env is called with a batch")
        return argument._sources[i] if isinstance(argument, Stacked) else argument

    def call(*args: Any, **kwargs: Any) -> Any:
        results = [
            function(*(own(arg, i) for arg in args), **{key: own(arg, i) for key, arg in kwargs.items()})
            for i, function in enumerate(functions)
        ]
        return stacked(results, moment)

    return call


@functools.cache
def computing_view(cls: type, view: type[Stacked]) -> type[Stacked]:
    """
    :param cls: of an env or a robot
    :param view: what it becomes
    :return: a subclass of both. An attribute that the class has too is that of the instances, if they have their own.
    """
    defaults = {name for name, value in class_attributes(cls).items() if not _computes(value) and not name.startswith("__")}
    return type(f"Stacked{cls.__name__}", (view, cls), {name: _Own(name, cls) for name in defaults})


class _Own:
    """An attribute of the instances, or else of their class."""

    def __init__(self, name: str, cls: type) -> None:
        self._name, self._default = name, class_attributes(cls)[name]

    def __get__(self, view: Any, cls: type) -> Any:
        return view.__getattr__(self._name) if self._name in vars(view._sources[0]) else self._default


@functools.cache
def class_attributes(cls: type) -> dict[str, Any]:
    """
    :param cls: any class
    :return: what it and its bases define
    """
    return {name: value for base in reversed(cls.__mro__[:-1]) for name, value in vars(base).items()}


def own_functions(obj: Any) -> set[str]:
    """
    :param obj: of a class
    :return: names of functions of that class for which the object has some of its own
    """
    own, shared = vars(obj), class_attributes(type(obj))  # type: ignore[arg-type]
    return {name for name in own.keys() & shared.keys() if callable(own[name])}


def _computes(value: Any) -> bool:
    kinds = types.FunctionType | property | functools.cached_property | classmethod | staticmethod
    return isinstance(value, kinds)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    plain = isinstance(a, bool | int | float | str | tuple | th.device) or dataclasses.is_dataclass(a)
    return plain and (a == b) is True


def rows(found: Sequence[np.ndarray]) -> th.Tensor:
    """
    :param found: arrays (D,), one of each env
    :return: (N, D)
    """
    return th.from_numpy(np.stack(found))
