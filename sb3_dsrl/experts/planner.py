"""Attempts of ManiSkill's own motion planner.

The planner solves an episode in a ``pd_joint_pos`` env. Its joint targets are thinned, and a second env that starts from the
same seed tracks them, in the control mode that is recorded.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import sapien
from transforms3d.euler import quat2euler

from sb3_dsrl.experts.recipe import ARM_JOINTS, Attempt, DemoRecipe, smooth_noise
from sb3_dsrl.experts.recording import make_recorded_env

CONTROL_MODES: tuple[str, ...] = ("pd_ee_delta_pose", "pd_joint_delta_pos", "pd_joint_pos")
MOVED = 1e-5  # rad: a joint target that changes by less stands still
FINGERS_MOVED = 5e-4  # m per step: below this the gripper has closed (or opened)
NOISE_UNIT = 0.1  # rad: what 1.0 means in pd_joint_delta_pos, used for pd_joint_pos, whose actions have no unit range
MAX_REPEATS = {
    "pd_ee_delta_pose": 4,
    "pd_joint_delta_pos": 2,
    "pd_joint_pos": 1,
}  # as ManiSkill's own replay has it
MAX_HOLD = 15  # steps to wait on the last target for success: objects and the arm itself have to settle


def solutions() -> dict[str, Callable[..., Any]]:
    """
    ManiSkill's motion planning solutions, by task.

    :raises ImportError: if ManiSkill or its planner is missing
    """
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    # The planner of the drawing tasks cannot be built in ManiSkill 3.0.1 (a TypeError in its constructor).
    return {name: solve for name, solve in MP_SOLUTIONS.items() if not name.startswith("Draw")}


class Planned:
    """
    The planner, and the env that tracks its plans.

    :param recipe: of the attempts
    """

    def __init__(self, recipe: DemoRecipe) -> None:
        self.recipe, self.solve = recipe, solutions()[recipe.env_id]
        self.plan_env = PlanRecorder(
            gym.make(
                recipe.env_id,
                obs_mode="none",
                reward_mode=recipe.reward_mode,
                control_mode="pd_joint_pos",
                render_backend="none",
                sim_backend="physx_cpu",
                num_envs=1,
            )
        )
        self.env = make_recorded_env(recipe)

    def rebuild(self) -> None:
        """Builds both scenes anew."""
        self.plan_env.reset(seed=0, options=dict(reconfigure=True))
        self.env.rebuild()

    def attempt(self, seed: int) -> Attempt:
        """
        :param seed: of the episode
        """
        recipe, printed = self.recipe, io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):  # the solutions print each failure
                planned = self.solve(self.plan_env, seed=seed, vis=False) != -1
        except Exception as error:  # a planner finds no grasp in many ways; ManiSkill's own runner does the same
            planned, printed = False, io.StringIO(f"{type(error).__name__}: {error}")
        if not planned:
            return Attempt(False, printed.getvalue().strip() or "the planner found no motion")
        targets, qpos = np.array(self.plan_env.targets), np.array(self.plan_env.qpos)
        waypoints = thin_plan(targets, qpos, recipe.speedup, recipe.trim_pauses)
        self.env.reset(seed=seed)
        noise = smooth_noise(np.random.default_rng([recipe.seed, seed]), recipe.noise or 0.0, recipe.noise_rho)
        return self.env.attempt(replay(self.env, Tracker(self.env, recipe.control_mode), waypoints, noise, recipe))


class PlanRecorder(gym.Wrapper):
    """Keeps the joint targets that a planner's solution executes, and how the robot moved meanwhile."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.targets: list[np.ndarray] = []
        self.qpos: list[np.ndarray] = []

    def _read_qpos(self) -> np.ndarray:
        base: Any = self.unwrapped
        return base.agent.robot.get_qpos()[0].cpu().numpy().copy()

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(**kwargs)
        self.targets, self.qpos = [], [self._read_qpos()]
        return result

    def step(self, action: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        result = self.env.step(action)
        self.targets.append(np.array(action, dtype=np.float64))
        self.qpos.append(self._read_qpos())
        return result


def thin_plan(targets: np.ndarray, qpos: np.ndarray, speedup: int, trim_pauses: bool) -> np.ndarray:
    """Drop waypoints: all but every ``speedup``-th while the arm moves and, on request, the planner's pauses.

    :param targets: joint targets and gripper command, ``(n, 8)``
    :param qpos: the joints before the plan and after each of its steps, ``(n + 1, 9)``
    """
    before = np.vstack([np.concatenate([qpos[0, :ARM_JOINTS], targets[0, ARM_JOINTS:]]), targets[:-1]])
    change = np.abs(targets - before)
    arm_moves = change[:, :ARM_JOINTS].max(axis=1) > MOVED
    gripper_switches = change[:, ARM_JOINTS:].max(axis=1, initial=0.0) > 0
    fingers_move = np.abs(np.diff(qpos[:, ARM_JOINTS:], axis=0)).max(axis=1, initial=0.0) > FINGERS_MOVED
    has_moved = np.cumsum(arm_moves) > 0

    keep = np.ones(len(targets), dtype=bool)
    run = 0  # moving waypoints since the last one that was kept
    for i in range(len(targets)):
        if gripper_switches[i]:
            run = 0
        elif arm_moves[i]:
            run += 1
            ends_here = i + 1 == len(targets) or not arm_moves[i + 1] or gripper_switches[i + 1]
            keep[i] = run == speedup or ends_here  # the end of a motion is where something is grasped: never skip it
            run = 0 if keep[i] else run
        elif trim_pauses:
            # Fingers that close on an object need their time. Before the arm has moved there is nothing to
            # grasp: there they close on the way.
            keep[i] = fingers_move[i] and has_moved[i]
    return targets[keep]


class Tracker:
    """The arm action that moves from where the robot is now to a joint target, in the env's control mode."""

    def __init__(self, env: Any, control_mode: str) -> None:
        self.agent = env.unwrapped.agent
        self.mode = control_mode
        self.low, self.high = env.action_space.low.reshape(-1), env.action_space.high.reshape(-1)
        # Pinocchio lives as long as the articulation, and some tasks rebuild theirs at every reset.
        self.model: Any = self.agent.robot.create_pinocchio_model() if control_mode == "pd_ee_delta_pose" else None

    def action_to(self, target: np.ndarray) -> np.ndarray:
        """Not clipped: beyond 1, the target is too far away for one step."""
        arm = self.agent.controller.controllers["arm"]
        if self.mode == "pd_joint_pos":
            return target
        if self.mode == "pd_joint_delta_pos":
            return (target - arm.qpos[0].cpu().numpy()) / arm.config.upper
        qpos = self.agent.robot.get_qpos()[0].cpu().numpy().astype(np.float64)
        qpos[:ARM_JOINTS] = target
        self.model.compute_forward_kinematics(qpos)
        goal: sapien.Pose = self.model.get_link_pose(arm.ee_link.index)
        now: sapien.Pose = arm.ee_pose_at_base.sp
        turn = sapien.Pose(q=goal.q) * sapien.Pose(q=now.q).inv()  # in the axes of the root, as the controller has it
        # The controller scales rotations by its *lower* limit, -0.1: a positive action turns backwards.
        rotation = np.array(quat2euler(turn.q, "rxyz")) / arm.config.rot_lower
        return np.concatenate([(goal.p - now.p) / arm.config.pos_upper, rotation])

    def clip(self, arm_action: np.ndarray) -> np.ndarray:
        """What the controller makes of the action: labels are clipped like what is executed."""
        size = len(arm_action)
        clipped = np.clip(arm_action, self.low[:size], self.high[:size])
        if self.mode == "pd_ee_delta_pose":  # rotations are clipped by their norm
            clipped[3:] /= max(1.0, float(np.linalg.norm(clipped[3:])))
        return clipped


def replay(env: gym.Env, tracker: Tracker, waypoints: np.ndarray, noise: Iterator[np.ndarray], recipe: DemoRecipe) -> bool:
    """Track the waypoints in an env that was just reset.

    :return: whether the episode ended in success
    """
    limit = recipe.max_episode_steps or sys.maxsize
    scale = NOISE_UNIT if recipe.control_mode == "pd_joint_pos" else 1.0
    length, success = 0, False

    def step_to(waypoint: np.ndarray) -> bool:
        """One step towards a waypoint; False if it is too far away for one."""
        nonlocal length, success
        wanted = tracker.action_to(waypoint[:ARM_JOINTS])
        within = bool(np.allclose(tracker.clip(wanted), wanted, atol=1e-3))
        executed = tracker.clip(wanted + scale * next(noise)[: len(wanted)])
        action = np.concatenate([executed, waypoint[ARM_JOINTS:]]).astype(np.float32)
        info = env.step(action)[-1]
        length, success = length + 1, bool(info["success"])
        return within

    for waypoint in waypoints:
        for _ in range(MAX_REPEATS[recipe.control_mode]):
            if length >= limit or step_to(waypoint):
                break
    for _ in range(MAX_HOLD):
        if success or length >= limit:
            break
        step_to(waypoints[-1])
    for _ in range(recipe.extra_steps):
        if length >= limit:
            break
        step_to(waypoints[-1])
    return success
