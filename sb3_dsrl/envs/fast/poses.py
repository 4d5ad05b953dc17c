"""Poses of actors and links, and what tasks compute with them, without a tensor operation for every product."""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch as th
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs import Actor, Link, Pose

# Row k of b[TERMS] * SIGNS is what component k of a quaternion a is multiplied with, for each component of the product a * b.
TERMS = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
SIGNS = np.array([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]], np.float32)
INVERSE = np.array([1, -1, -1, -1], np.float32)


class FastPose(Pose):
    """Poses on the CPU. Products and the inverse take a few NumPy operations; all else is ManiSkill's."""

    def __mul__(self, arg0: Any) -> Pose:
        """Stands for ``Pose.__mul__``."""
        a, b = pose_array(self), pose_array(arg0)
        return super().__mul__(arg0) if a is None or b is None else product(a, b)

    def __rmul__(self, arg0: Any) -> Pose:
        """Stands for ``Pose.__mul__`` with this pose on the right; Python asks the subclass first."""
        a, b = pose_array(arg0), pose_array(self)
        if a is not None and b is not None:
            return product(a, b)
        return Pose.__mul__(arg0, self) if isinstance(arg0, Pose) else NotImplemented

    def inv(self) -> Pose:
        """Stands for ``Pose.inv``."""
        a = pose_array(self)
        if a is None:
            return super().inv()
        pose, inverse = empty_poses(len(self))
        inverse[3] = a[3]
        np.negative(a[4:], out=inverse[4:])
        inverse[:3] = rotated(inverse[3:], -a[:3])
        return pose


class FastActor(Actor):
    """One actor on the CPU."""

    def _pose(self) -> Pose:
        """Stands for the getter of ``Actor.pose``."""
        return from_sapien(self._objs[0].pose)

    pose = property(_pose, Actor.pose.fset)


class FastLink(Link):
    """One link on the CPU."""

    def _pose(self) -> Pose:
        """Stands for the getter of ``Link.pose``."""
        return from_sapien(self._objs[0].entity_pose)

    pose = property(_pose, Link.pose.fset)


FAST_STRUCTS: dict[type, type] = {Actor: FastActor, Link: FastLink}


def speed_up_poses(base: BaseEnv) -> None:
    """
    Makes the actors and links of a scene, and the poses that its env keeps, the fast kinds of themselves.

    :param base: one CPU env
    """
    scene = base.scene
    structs: list[Any] = [*scene.actors.values(), *scene.actor_views.values()]
    for articulation in (*scene.articulations.values(), *scene.articulation_views.values()):
        structs += articulation.links or []
    for struct in structs:
        if type(struct) in FAST_STRUCTS and len(struct._objs) == 1:
            struct.__class__ = FAST_STRUCTS[type(struct)]
    for value in vars(base).values():
        if type(value) is Pose:
            value.__class__ = FastPose


def from_sapien(*poses: sapien.Pose) -> FastPose:
    """
    Stands for ``Pose.create`` of a list.

    :param poses: one of each object
    """
    raw_pose = th.empty((len(poses), 7))  # torch's memory, aligned as that of the poses it stands for
    for row, pose in zip(raw_pose.numpy(), poses, strict=True):
        row[:3] = pose.p
        row[3:] = pose.q
    return FastPose(raw_pose)


def empty_poses(n: int) -> tuple[FastPose, np.ndarray]:
    """
    :param n: how many
    :return: new poses, and their memory in the form of :func:`pose_array`
    """
    raw_pose = th.empty((n, 7))
    return FastPose(raw_pose), raw_pose.numpy()[0] if n == 1 else raw_pose.numpy().T


def pose_array(pose: Any) -> np.ndarray | None:
    """
    :param pose: ManiSkill's or SAPIEN's
    :return: its seven numbers (7,), or those of N > 1 poses (7, N); None for another kind of number
    """
    if isinstance(pose, Pose):
        raw = pose.raw_pose
        plain = raw.ndim == 2 and raw.dtype == th.float32 and raw.device.type == "cpu" and not raw.requires_grad
        return None if not plain else raw.numpy()[0] if len(raw) == 1 else raw.numpy().T
    return np.concatenate((pose.p, pose.q)) if isinstance(pose, sapien.Pose) else None


def product(a: np.ndarray, b: np.ndarray) -> FastPose:
    """
    Stands for the arithmetic of ``Pose.__mul__``.

    :param a: pose (7,), or (7, N)
    :param b: pose (7,), or (7, N)
    """
    if a.ndim != b.ndim:
        a, b = np.broadcast_arrays(a.reshape(7, -1), b.reshape(7, -1))
    pose, array = empty_poses(1 if a.ndim == 1 else a.shape[1])
    array[3:] = standardized(quaternion_product(a[3:], b[3:]))
    np.add(a[:3], rotated(a[3:], b[:3]), out=array[:3])
    return pose


def quaternion_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """
    Stands for ``quaternion_raw_multiply``: the same products, added in the same order.

    :param a: quaternion (4,), real part first, or (4, N)
    :param b: quaternion (4,), or (4, N)
    """
    terms = a[:, None] * (b[TERMS] * (SIGNS if b.ndim == 1 else SIGNS[..., None]))
    return ((terms[0] + terms[1]) + terms[2]) + terms[3]


def standardized(q: np.ndarray) -> np.ndarray:
    """
    Stands for ``standardize_quaternion``.

    :param q: quaternion (4,), real part first, or (4, N)
    """
    if q.ndim > 1:
        return np.where(q[0] < 0, -q, q)
    return -q if q[0] < 0 else q


def rotated(q: np.ndarray, point: np.ndarray) -> np.ndarray:
    """
    Stands for ``quaternion_apply``.

    :param q: quaternion (4,), real part first, or (4, N)
    :param point: (3,), or (3, N)
    """
    quaternion = np.zeros(q.shape, np.float32)
    quaternion[1:] = point
    inverse = INVERSE if q.ndim == 1 else INVERSE[:, None]
    return quaternion_product(quaternion_product(q, quaternion), q * inverse)[1:]


def rotation_matrix(pose: Pose) -> th.Tensor:
    """
    Stands for ``quaternion_to_matrix(pose.q)``.

    :param pose: of one object, or of many
    :return: (1, 3, 3), or (N, 3, 3)
    """
    q = pose.q
    two_s = (2.0 / (q * q).sum(-1)).numpy()  # torch's sum has an order of its own
    matrix = th.empty((len(q), 3, 3))
    cells = matrix.numpy().reshape(-1, 9)
    if len(q) == 1:  # numbers are faster than arrays
        (r, i, j, k), (two_s,), cells = q.numpy()[0], two_s, cells[0]
    else:
        (r, i, j, k), cells = q.numpy().T, cells.T
    one = np.float32(1)
    cells[:] = (
        one - two_s * (j * j + k * k),
        two_s * (i * j - k * r),
        two_s * (i * k + j * r),
        two_s * (i * j + k * r),
        one - two_s * (i * i + k * k),
        two_s * (j * k - i * r),
        two_s * (i * k - j * r),
        two_s * (j * k + i * r),
        one - two_s * (i * i + j * j),
    )
    return matrix
