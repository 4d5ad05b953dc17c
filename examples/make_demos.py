"""Make ManiSkill demonstrations with ManiSkill's own motion planner: no download, no GPU, a few seconds.

    python examples/make_demos.py --env-id PushCube-v1 --num-demos 40 --speedup 2 --noise 0.3 --trim-pauses \\
        --output demos/PushCube-v1.h5

The planner solves an episode in a ``pd_joint_pos`` env. Its joint targets are thinned, and a second env that
starts from the same seed tracks them in closed loop, in the control mode you train with. The two files (an
``.h5`` and a ``.json``) have the format of ManiSkill's ``RecordEpisode`` and ``replay_trajectory``. On one
machine, the same flags give the same data.
"""

import contextlib
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import sapien
import torch
import tyro
from tqdm import tqdm
from transforms3d.euler import quat2euler

from sb3_dsrl.utils.integrity import write_sums

CONTROL_MODES = ("pd_ee_delta_pose", "pd_joint_delta_pos", "pd_joint_pos")
ARM_JOINTS = 7  # of the Panda; what follows in an action is the gripper
MOVED = 1e-5  # rad: a joint target that changes by less stands still
FINGERS_MOVED = 5e-4  # m per step: below this the gripper has closed (or opened)
NOISE_RHO = 0.9  # about ten steps of correlation, half a second: a hand that drifts, not one that trembles
NOISE_UNIT = 0.1  # rad: what 1.0 means in pd_joint_delta_pos, used for pd_joint_pos, whose actions have no unit range
MAX_REPEATS = {
    "pd_ee_delta_pose": 4,
    "pd_joint_delta_pos": 2,
    "pd_joint_pos": 1,
}  # as ManiSkill's own replay has it
MAX_HOLD = 15  # steps to wait on the last target for success: objects and the arm itself have to settle


@dataclass
class Args:
    """Demonstrations from ManiSkill's motion planner, in ManiSkill's trajectory format."""

    output: Path
    """The .h5 file to write; the .json and checksums (.sha256) go beside it. Existing files are replaced, at the very end."""
    env_id: str = "PushCube-v1"
    """A ManiSkill task with a motion planning solution."""
    num_demos: int = 40
    """Demos to keep."""
    max_attempts: int | None = None
    """Episodes to try at most; 10 * num_demos if not given."""
    seed: int = 0
    """Attempt i resets both envs with seed + i."""
    control_mode: str = "pd_joint_delta_pos"
    """pd_joint_delta_pos, pd_ee_delta_pose or pd_joint_pos."""
    obs_mode: str = "state"
    """What to record, such as state or rgb."""
    reward_mode: str = "normalized_dense"
    """normalized_dense, dense, sparse or none."""
    render_backend: str | None = None
    """"none" for state observations and "cpu" for images, if not given."""
    speedup: int = 1
    """Keep every k-th moving waypoint of the plan: 2 is twice as fast."""
    noise: float = 0.0
    """Std of the noise on the normalised arm action, smooth in time. The labels are what was executed."""
    trim_pauses: bool = False
    """Drop steps where the planner waits. A policy trained on them may wait for ever."""
    keep_failures: bool = False
    """Keep episodes that do not end in success, too."""
    extra_steps: int = 5
    """Steps to hold still after the task is solved."""
    max_episode_steps: int | None = None
    """Cut episodes here. If not given, no demo is cut: its length may exceed the registered time limit."""


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


def smooth_noise(rng: np.random.Generator, std: float) -> Iterator[np.ndarray]:
    """AR(1) noise for the arm, stationary from its first sample on."""
    noise = rng.normal(0.0, std, ARM_JOINTS)
    while True:
        yield noise
        noise = NOISE_RHO * noise + np.sqrt(1 - NOISE_RHO**2) * rng.normal(0.0, std, ARM_JOINTS)


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


def replay(env: gym.Env, tracker: Tracker, waypoints: np.ndarray, noise: Iterator[np.ndarray], args: Args) -> tuple[bool, int]:
    """Track the waypoints in an env that was just reset.

    :return: whether the episode ended in success, and its length
    """
    limit = args.max_episode_steps or sys.maxsize
    scale = NOISE_UNIT if args.control_mode == "pd_joint_pos" else 1.0
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
        for _ in range(MAX_REPEATS[args.control_mode]):
            if length >= limit or step_to(waypoint):
                break
    for _ in range(MAX_HOLD):
        if success or length >= limit:
            break
        step_to(waypoints[-1])
    for _ in range(args.extra_steps):
        if length >= limit:
            break
        step_to(waypoints[-1])
    return success, length


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"make_demos: {message}", file=sys.stderr)
    sys.exit(code)


def check_args(args: Args, planners: dict[str, Callable[..., Any]]) -> None:
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct
    from mani_skill.utils.registration import REGISTERED_ENVS

    if args.env_id not in planners:
        fail(f"no motion planner for --env-id {args.env_id}; there is one for: {', '.join(sorted(planners))}.")
    if args.control_mode not in CONTROL_MODES:
        fail(f"--control-mode {args.control_mode} is not supported; choose one of: {', '.join(CONTROL_MODES)}.")
    reward_modes = REGISTERED_ENVS[args.env_id].cls.SUPPORTED_REWARD_MODES
    if args.reward_mode not in reward_modes:
        fail(f"--reward-mode {args.reward_mode} is not one of {args.env_id}'s: {', '.join(reward_modes)}.")
    if args.obs_mode not in ("state", "state_dict"):
        try:
            parse_obs_mode_to_struct(args.obs_mode)
        except AssertionError as error:
            fail(f"--obs-mode {args.obs_mode} is not one of ManiSkill's, such as state or rgb: {error}")
    if not (np.isfinite(args.noise) and args.noise >= 0):
        fail(f"--noise is {args.noise}; it is a standard deviation and must be 0 or more.")
    for flag in ("num_demos", "max_attempts", "speedup", "max_episode_steps"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            fail(f"--{flag.replace('_', '-')} is {value}; it must be 1 or more.")
    for flag in ("extra_steps", "seed"):
        if getattr(args, flag) < 0:
            fail(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be 0 or more.")
    if args.output.suffix != ".h5" or args.output.is_dir():
        fail(f"--output is {args.output}; it must name a file that ends in .h5.")


def make_envs(args: Args, directory: str) -> tuple[PlanRecorder, Any]:
    """The env that the planner drives, and the one whose episodes are recorded in ``directory``."""
    from mani_skill.utils.wrappers.record import RecordEpisode

    shared: dict[str, Any] = dict(sim_backend="physx_cpu", num_envs=1)
    plan_env = gym.make(
        args.env_id,
        obs_mode="none",
        reward_mode=args.reward_mode,
        control_mode="pd_joint_pos",
        render_backend="none",
        **shared,
    )
    if args.max_episode_steps is not None:
        shared["max_episode_steps"] = args.max_episode_steps
    env = gym.make(
        args.env_id,
        obs_mode=args.obs_mode,
        reward_mode=args.reward_mode,
        control_mode=args.control_mode,
        render_backend=args.render_backend or ("none" if args.obs_mode.startswith("state") else "cpu"),
        **shared,
    )
    recorder = RecordEpisode(
        env,
        output_dir=directory,
        trajectory_name=args.output.stem,
        save_video=False,
        save_on_reset=False,
        record_reward=True,
        record_env_state=True,
        source_type="motionplanning",
        source_desc=f"ManiSkill's motion planner, replayed: {shlex.join(['python', *sys.argv])}",
    )
    return PlanRecorder(plan_env), recorder


def record(args: Args, solve: Callable[..., Any], directory: str) -> tuple[list[int], int, int, str]:
    """Record demos until there are enough of them.

    :return: lengths of the kept demos, number of attempts, of successes, and the planner's last complaint
    """
    plan_env, env = make_envs(args, directory)
    max_attempts = args.max_attempts or 10 * args.num_demos
    lengths: list[int] = []
    attempts, successes, complaint = 0, 0, ""
    with tqdm(total=args.num_demos, desc=args.env_id, unit="demo") as bar:
        while len(lengths) < args.num_demos and attempts < max_attempts:
            seed = args.seed + attempts
            attempts += 1
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):  # the solutions print each failure
                    planned = solve(plan_env, seed=seed, vis=False) != -1
            except Exception as error:  # a planner finds no grasp in many ways; ManiSkill's own runner does the same
                planned, printed = False, io.StringIO(f"{type(error).__name__}: {error}")
            if not planned:
                complaint = printed.getvalue().strip() or "the planner found no motion"
                continue
            targets, qpos = np.array(plan_env.targets), np.array(plan_env.qpos)
            waypoints = thin_plan(targets, qpos, args.speedup, args.trim_pauses)
            env.reset(seed=seed)
            noise = smooth_noise(np.random.default_rng([args.seed, seed]), args.noise)
            success, length = replay(env, Tracker(env, args.control_mode), waypoints, noise, args)
            successes += success
            complaint = complaint if success else "the replay did not end in success"
            kept = success or args.keep_failures
            env.flush_trajectory(save=kept)  # also when not kept, or its steps would end up in the next demo
            if kept:
                lengths.append(length)
                bar.update()
            bar.set_postfix(attempts=attempts, success=f"{successes / attempts:.2f}")
    env.close()  # closes the file; RecordEpisode never closes it on its own
    plan_env.close()
    return lengths, attempts, successes, complaint


def main(args: Args) -> None:
    if int(np.__version__.split(".")[0]) >= 2:
        fail(f"numpy is {np.__version__}; the motion planner (mplib) needs 1.x: pip install 'numpy<2'.")
    try:
        from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS
    except ImportError as error:
        fail(f"ManiSkill with its motion planner is needed ({error}): pip install mani_skill.")
    # The planner of the drawing tasks cannot be built in ManiSkill 3.0.1 (a TypeError in its constructor).
    planners = {name: solve for name, solve in MP_SOLUTIONS.items() if not name.startswith("Draw")}
    check_args(args, planners)
    torch.set_num_threads(1)  # one small env: more threads only wait for each other

    args.output.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename: an interrupted run leaves what was there.
    with tempfile.TemporaryDirectory(prefix=".make_demos_", dir=args.output.parent) as directory:
        lengths, attempts, successes, complaint = record(args, planners[args.env_id], directory)
        if not lengths:
            fail(
                f"no demo to keep after {attempts} attempts, nothing written; the last failure: {complaint}.",
                code=1,
            )
        files = [Path(directory, args.output.stem + suffix) for suffix in (".h5", ".json")]
        write_sums(files[0].with_suffix(".sha256"), files)  # load_demos verifies them: HDF5 and JSON have no checksums
        for suffix in (".h5", ".json", ".sha256"):
            os.replace(Path(directory, args.output.stem + suffix), args.output.with_suffix(suffix))

    print(
        f"{args.output}: kept {len(lengths)} of {attempts} attempts, success {successes / attempts:.2f}, "
        f"{np.mean(lengths):.1f} steps on average ({min(lengths)} to {max(lengths)}), "
        f"{args.output.stat().st_size / 1e6:.2f} MB"
    )
    if len(lengths) < args.num_demos:
        fail(
            f"only {len(lengths)} of {args.num_demos} demos in {attempts} attempts; raise --max-attempts.",
            code=1,
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        fail("interrupted, nothing written.", code=130)
