"""A ManiSkill env at its own speed beside the same env with the shortcuts, and whether their results are equal bit for bit."""

from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from mani_skill.utils.structs import Pose

from sb3_dsrl import ActionChunkWrapper
from sb3_dsrl.envs.fast.grasping import contacts_of
from sb3_dsrl.envs.maniskill_wrappers import unbatched

#: For each task the attribute that holds what the robot moves.
OBJECTS = {
    "PushCube-v1": "obj",
    "PickCube-v1": "cube",
    "LiftPegUpright-v1": "peg",
    "StackCube-v1": "cubeA",
    "PegInsertionSide-v1": "peg",
}


def _pose(p: Any, q: Any = (1.0, 0, 0, 0)) -> Pose:
    return Pose.create_from_pq(th.as_tensor(p, dtype=th.float32), th.as_tensor(q, dtype=th.float32))


WINS: dict[str, Callable[[Any], None]] = {
    "PushCube-v1": lambda base: base.obj.set_pose(_pose(base.goal_region.pose.p + th.tensor([0, 0, 0.02]))),
    "PickCube-v1": lambda base: base.goal_site.set_pose(base.cube.pose),
    "LiftPegUpright-v1": lambda base: base.peg.set_pose(_pose([0.1, 0, base.peg_half_length], [0.5, 0.5, -0.5, 0.5])),
    "StackCube-v1": lambda base: base.cubeA.set_pose(_pose(base.cubeB.pose.p + th.tensor([0, 0, 0.04]), base.cubeB.pose.q)),
    "PegInsertionSide-v1": lambda base: base.peg.set_pose(base.goal_pose),
}


class Pair:
    """
    The same env twice, plain and fast; whatever is done is done to both, and must have the same results.

    :param env_id: ManiSkill task
    :param fast: the second env's; False for a comparison of an env with itself
    :param chunk: arguments of an :class:`ActionChunkWrapper` around both
    :param kwargs: of ``gym.make``
    """

    def __init__(self, env_id: str, fast: bool = True, chunk: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs = dict(obs_mode="state", render_backend="none", sim_backend="physx_cpu") | kwargs
        self.envs = [unbatched(gym.make(env_id, **kwargs), own) for own in (False, fast)]
        if chunk is not None:
            self.envs = [ActionChunkWrapper(env, **chunk) for env in self.envs]
        self.bases: list[Any] = [env.unwrapped for env in self.envs]
        self.env_id, self.object = env_id, OBJECTS.get(env_id)
        self.contacts = 0  # env steps after which a finger touches the object

    def reset(self, seed: int | None = None) -> Any:
        """Starts an episode in both."""
        return self._same("reset", [env.reset(seed=seed) for env in self.envs])

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        """An action or a chunk of actions in both."""
        results = [env.step(action) for env in self.envs]
        for result in results:
            result[4].pop("episode", None)  # it holds seconds
        return self._same("step", results)

    def hold(self) -> None:
        """Puts the object between the fingers."""
        for base in self.bases:
            hold(base, str(self.object))

    def win(self) -> None:
        """Puts the objects where the task wants them."""
        for base in self.bases:
            WINS[str(self.env_id)](base)

    def episode(self, steps: int, seed: int | None, hold: bool = False, scale: float = 0.4) -> list[tuple[Any, ...]]:
        """
        :param steps: of random actions at most; it ends at a termination and at the time limit
        :param seed: of the reset and of the actions
        :param hold: with the object between the fingers, which close
        :param scale: of the actions
        :return: what the steps returned
        """
        self.reset(seed)
        if hold:
            self.hold()
        rng, shape, results = np.random.default_rng(seed), self.envs[0].action_space.shape, []
        for i in range(steps):
            action = np.clip(rng.normal(0, scale, shape), -1, 1).astype(np.float32)
            if hold:
                action[..., :-1] *= i > 2  # the fingers close first
                action[..., -1] = np.where(rng.random(shape[:-1]) < 0.9, -1, 1)
            results.append(self.step(action))
            if results[-1][2] or results[-1][3]:
                break
        return results

    def close(self) -> None:
        """Closes both."""
        for env in self.envs:
            env.close()

    def _same(self, what: str, results: list[Any]) -> Any:
        for name, found in (("results", results), ("state", [state(base) for base in self.bases])):
            different = list(differences(*found))
            assert not different, f"{name} of {what}: {'; '.join(different)}"
        if self.object is not None:
            self.contacts += touched(self.bases[1], self.object)
        return results[1]


def hold(base: Any, name: str) -> None:
    """Puts an object between the fingers."""
    getattr(base, name).set_pose(_pose(base.agent.tcp.pose.p + th.tensor([0, 0, 0.03])))


def touched(base: Any, name: str) -> bool:
    """Whether a finger touches an object."""
    found = contacts_of(base.scene.px.get_contacts(), getattr(base, name)._bodies[0].entity)
    return any(link._bodies[0].entity in found for link in (base.agent.finger1_link, base.agent.finger2_link))


def state(base: Any) -> dict[str, Any]:
    """The simulator's state, and what the controllers want."""
    agents = getattr(base.agent, "agents", [base.agent])
    controllers = [part for agent in agents if agent is not None for part in parts(agent.controller)]
    return {
        "simulator": base.get_state_dict(),
        "drives": [joint._objs[0].drive_target for part in controllers for joint in part.joints],
        "targets": [getattr(part, "_target_qpos", None) for part in controllers],
        "starts": [getattr(part, "_start_qpos", None) for part in controllers],
        "poses": [getattr(getattr(part, "_target_pose", None), "raw_pose", None) for part in controllers],
    }


def parts(controller: Any) -> Iterable[Any]:
    """The controllers of which a controller consists."""
    if isinstance(controller, dict):
        return [part for own in controller.values() for part in parts(own)]
    return list(controller.controllers.values()) if hasattr(controller, "controllers") else [controller]


def differences(a: Any, b: Any, path: str = "") -> Iterable[str]:
    """Where two nested results differ in type, shape or any bit."""
    if isinstance(a, th.Tensor):
        a = a.numpy()
    if isinstance(b, th.Tensor):
        b = b.numpy()
    if type(a) is not type(b):
        yield f"{path} is {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f"{path} has keys {list(a)} and {list(b)}"
        else:
            for key in a:
                yield from differences(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{path} has {len(a)} and {len(b)} parts"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{path}[{i}]")
    elif isinstance(a, np.ndarray):
        if (a.shape, a.dtype) != (b.shape, b.dtype) or a.tobytes() != b.tobytes():
            yield f"{path} is {a} and {b}"
    elif np.asarray(a).tobytes() != np.asarray(b).tobytes() if isinstance(a, (int, float, np.generic)) else a != b:
        yield f"{path} is {a!r} and {b!r}"
