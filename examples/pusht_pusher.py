"""A scripted pusher for gym-pusht: it tries pushes in a simulator of its own and makes the one that helps most.

Greedy, one push ahead: from points on the outline of the T it tries straight pushes of several lengths and keeps the one after
which the T's keypoints lie closest to the goal's. On the way to the next push it goes around the T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pymunk
from gym_pusht.envs import PushTEnv

AGENT_RADIUS = 15.0
GAP = 8.0  # px between agent and T where a push begins
CIRCLE = 112.0  # px around the T's centre of gravity in which the agent cannot touch it
WALLS = (24.0, 487.0)  # where the centre of the agent may be
MAX_PUSH_STEPS = 14
N_TRIED = 36  # pushes that are tried before each one that is made
#: (x, y) on the outline of the T and the direction into it, in the T's own axes; none where the agent would not fit
OUTLINE: list[tuple[tuple[float, float], tuple[float, float]]] = [
    *(((x, 0.0), (0.0, 1.0)) for x in (-54.0, -40.0, -25.0, 0.0, 25.0, 40.0, 54.0)),
    *(((x, 30.0), (0.0, -1.0)) for x in (-55.0, -45.0, -34.0, 34.0, 45.0, 55.0)),
    *(((60.0 * side, y), (-side, 0.0)) for side in (-1.0, 1.0) for y in (5.0, 15.0, 25.0)),
    *(((15.0 * side, y), (-side, 0.0)) for side in (-1.0, 1.0) for y in (50.0, 70.0, 90.0, 105.0, 116.0)),
    *(((x, 120.0), (0.0, -1.0)) for x in (-10.0, 0.0, 10.0)),
]
CENTRE = np.array([0.0, 45.0])  # centre of gravity, in the T's own axes


@dataclass
class Push:
    """A straight push: where the agent stands before it, along which unit vector, at which speed, and for how many steps."""

    start: np.ndarray
    direction: np.ndarray
    speed: float
    steps: int


class Pusher:
    """
    Yields the actions of one episode.

    :param env: the unwrapped env, after a reset
    :param rng: which pushes are tried, and the noise
    :param noise: standard deviation in px that each action is off
    :param speed: px per env step of a push
    """

    def __init__(self, env: PushTEnv, rng: np.random.Generator, noise: float = 4.0, speed: float = 12.0) -> None:
        self.env, self.rng, self.noise, self.speed = env, rng, noise, speed
        self.model = PushTEnv(obs_type="state")
        self.model.reset(seed=0)
        goal = self.model.get_goal_pose_body(self.model.goal_pose)
        self.goal = np.array([goal.local_to_world(v) for shape in env._block_shapes for v in shape.get_vertices()])

    def actions(self) -> Iterator[np.ndarray]:
        """Targets of the agent in px, (2,), one for each env step; the env is stepped in between."""
        while True:
            push = self.best_push()
            yield from map(self._noisy, self._way_to(push))
            here = np.array(self.env.agent.position)
            for i in range(push.steps):
                yield self._noisy(here + push.direction * push.speed * (i + 1))
            yield self._noisy(np.array(self.env.agent.position) - push.direction * 3 * GAP)

    def best_push(self) -> Push:
        """The push of those tried after which the keypoints are closest to the goal's, counting what the push takes."""
        pose = np.array([*self.env.block.position, self.env.block.angle])
        best, best_score = None, np.inf
        for i in self.rng.choice(len(OUTLINE), min(N_TRIED, len(OUTLINE)), replace=False):
            point, inward = map(np.array, OUTLINE[i])
            lean = self.rng.choice([0.0, 0.0, -0.35, 0.35])
            direction = _rotated(inward, pose[2] + lean)
            start = pose[:2] + _rotated(point, pose[2]) - _rotated(inward, pose[2]) * (AGENT_RADIUS + GAP)
            if not (WALLS[0] <= start.min() and start.max() <= WALLS[1]):
                continue
            for speed in (self.speed, self.speed / 3):
                for steps, score in self._outcomes(pose, Push(start, direction, speed, 0)):
                    if score < best_score:
                        best, best_score = Push(start, direction, speed, steps), score
        if best is None:  # the T stands in a corner: any way out
            away = np.array([256.0, 256.0]) - pose[:2]
            best = Push(np.clip(pose[:2] - away, *WALLS), away / max(np.linalg.norm(away), 1.0), self.speed, 6)
        return best

    def _outcomes(self, pose: np.ndarray, push: Push) -> Iterator[tuple[int, float]]:
        """How far off the T is after so many steps of a push, tried in the model."""
        model = self.model
        model.agent.position, model.agent.velocity = push.start.tolist(), (0, 0)
        model.block.angle = pose[2]
        model.block.position = pose[:2].tolist()
        model.block.velocity, model.block.angular_velocity = (0, 0), 0.0
        for body in (model.agent, model.block):
            model.space.reindex_shapes_for_body(body)
        least = np.inf
        for steps in range(1, MAX_PUSH_STEPS + 1):
            target = push.start + push.direction * push.speed * steps
            for _ in range(10):
                pull = model.k_p * (target - model.agent.position) - model.k_v * np.array(model.agent.velocity)
                model.agent.velocity += pymunk.Vec2d(*(pull * model.dt))
                model.space.step(model.dt)
            off = self._off(model)
            yield steps, off + 0.05 * steps
            least = min(least, off)
            if off > least + 15:
                return

    def _off(self, env: PushTEnv) -> float:
        keypoints = np.array([env.block.local_to_world(v) for shape in env._block_shapes for v in shape.get_vertices()])
        return float(np.linalg.norm(keypoints - self.goal, axis=1).mean())

    def _way_to(self, push: Push) -> Iterator[np.ndarray]:
        """Around the T to where a push begins."""
        centre = np.array(self.env.block.local_to_world(CENTRE.tolist()))
        goal = push.start
        for _ in range(60):
            here = np.array(self.env.agent.position)
            if np.linalg.norm(goal - here) < 6:
                return
            if self._free(here, goal):
                yield here + _limited(goal - here, 32.0)
                continue
            radius, to_goal = here - centre, goal - centre
            if np.linalg.norm(radius) < CIRCLE - 12:
                yield here + _limited(radius / max(np.linalg.norm(radius), 1e-6) * 32.0, 32.0)
                continue
            angle = np.arctan2(*radius[::-1])
            turn = (np.arctan2(*to_goal[::-1]) - angle + np.pi) % (2 * np.pi) - np.pi
            angle += np.clip(turn, -0.4, 0.4)
            yield np.clip(centre + (CIRCLE + 4) * np.array([np.cos(angle), np.sin(angle)]), *WALLS)

    def _free(self, start: np.ndarray, end: np.ndarray) -> bool:
        """Whether the agent can go straight without touching the T."""
        shapes: Any = self.env._block_shapes
        radius = AGENT_RADIUS + 2.0
        return not any(shape.segment_query(start.tolist(), end.tolist(), radius).shape for shape in shapes)

    def _noisy(self, action: np.ndarray) -> np.ndarray:
        return np.clip(action + self.noise * self.rng.standard_normal(2), 0.0, 512.0).astype(np.float32)


def _rotated(vector: np.ndarray, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1]])


def _limited(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
