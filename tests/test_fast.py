"""The shortcuts of envs/fast: equal bit for bit, and only where they are known to be."""

import ast
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import mani_skill
import numpy as np
import pytest
import torch as th
from mani_skill.envs.tasks.tabletop import PushCubeEnv
from mani_skill.utils.geometry import rotation_conversions as rotations
from mani_skill.utils.registration import REGISTERED_ENVS, register_env
from mani_skill.utils.structs import Actor, Link, Pose

from sb3_dsrl import ActionChunkWrapper, LatentSteeringWrapper, make_chunk_env
from sb3_dsrl.envs.fast import install, wants_fast
from sb3_dsrl.envs.fast.end_effector import matrix_to_quaternion
from sb3_dsrl.envs.fast.observations import ObserveOnDemand
from sb3_dsrl.envs.fast.poses import FastActor, FastPose, rotation_matrix
from sb3_dsrl.envs.maniskill_wrappers import unbatched
from tests.envs import tiny_flow
from tests.identity import OBJECTS, Pair

TASKS = list(OBJECTS)
STEPS = 12
CONTROL_MODES = [
    "pd_joint_pos",
    "pd_joint_delta_pos",
    "pd_joint_target_delta_pos",
    "pd_joint_vel",
    "pd_joint_pos_vel",
    "pd_ee_delta_pos",
    "pd_ee_delta_pose",
    "pd_ee_target_delta_pos",
    "pd_ee_target_delta_pose",
    "pd_ee_pose",
]


@pytest.mark.parametrize("env_id", TASKS)
def test_dense_episodes_are_equal(env_id: str) -> None:
    """Every step, with and without contact: observations, rewards, flags, infos, the simulator's state, controller targets."""
    pair = Pair(env_id, control_mode="pd_ee_delta_pose", reward_mode="normalized_dense", max_episode_steps=STEPS)
    for seed in (0, None):
        assert pair.episode(STEPS + 5, seed)[-1][3], "must end at the time limit"
    before = pair.contacts
    pair.episode(STEPS, 1, hold=True)
    assert pair.contacts - before >= 2
    pair.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_sparse_chunks_are_equal(env_id: str) -> None:
    """Chunks with a sparse reward; the last one ends at a termination."""
    chunk = dict(act_horizon=4, obs_horizon=2)
    pair = Pair(env_id, chunk=chunk, control_mode="pd_joint_delta_pos", reward_mode="sparse")
    pair.episode(3, 2, hold=True)
    pair.reset(3)
    pair.win()
    *_, terminated, _, info = pair.step(np.zeros((4, 8), np.float32))
    assert terminated and info["chunk_length"] < 4
    pair.reset()
    pair.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_chunks_show_the_same_and_observe_less(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ignore_terminations only the last ``obs_horizon`` observations of a chunk are computed."""
    pair = Pair(env_id, chunk=dict(act_horizon=8, obs_horizon=2), control_mode="pd_joint_delta_pos", reward_mode="dense")
    pair.reset(4)
    counts = []
    for base in pair.bases:
        plain, count = base._get_obs_extra, []
        monkeypatch.setattr(base, "_get_obs_extra", lambda info, plain=plain, count=count: count.append(1) or plain(info))
        counts.append(count)
    rng = np.random.default_rng(0)
    for _ in range(3):
        pair.step(rng.uniform(-1, 1, (8, 8)).astype(np.float32))
    assert [len(count) for count in counts] == [24, 6]
    pair.reset()
    pair.close()


@pytest.mark.parametrize("control_mode", CONTROL_MODES)
def test_controllers_are_equal(control_mode: str) -> None:
    """Of each kind, known or not, also after the task was built anew."""
    pair = Pair("PickCube-v1", control_mode=control_mode, reward_mode="none")
    pair.episode(6, 0, scale=1.5)
    for env in pair.envs:
        env.reset(seed=1, options={"reconfigure": True})
    pair.episode(4, 1, hold=True)
    pair.close()


def test_state_dict_observations_are_equal() -> None:
    pair = Pair("PushCube-v1", chunk=dict(act_horizon=4), obs_mode="state", reward_mode="dense")
    pair.episode(3, 0)
    pair.close()
    pair = Pair("PickCube-v1", obs_mode="state_dict", reward_mode="dense")
    pair.episode(3, 0)
    pair.close()


def test_images_are_equal() -> None:
    pair = Pair("PickCube-v1", chunk=dict(act_horizon=2), obs_mode="rgb", render_backend="cpu", reward_mode="dense")
    pair.episode(3, 0)
    pair.close()


def test_pose_arithmetic_is_equal() -> None:
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30], np.float32)
    for i in range(600):
        numbers = rng.normal(size=(2, 7)).astype(np.float32) if i % 3 else rng.choice(special, (2, 7))
        a, b = (Pose(th.tensor(row[None])) for row in numbers)
        fast_a, fast_b = FastPose(a.raw_pose.clone()), FastPose(b.raw_pose.clone())
        for plain, fasts in (
            (a * b, (fast_a * fast_b, fast_a * b, a * fast_b)),
            (a.inv(), (fast_a.inv(),)),
            (a * b.sp, (fast_a * b.sp,)),
        ):
            for fast in fasts:
                assert isinstance(fast, FastPose)
                assert plain.raw_pose.numpy().tobytes() == fast.raw_pose.numpy().tobytes()
    for i in range(600):
        numbers = rng.normal(size=(2, 3, 7)).astype(np.float32) if i % 3 else rng.choice(special, (2, 3, 7))
        many, others = (Pose(th.tensor(rows)) for rows in numbers)
        fast_many, fast_others = FastPose(many.raw_pose.clone()), FastPose(others.raw_pose.clone())
        for plain, fasts in (
            (many * others, (fast_many * fast_others, fast_many * others, many * fast_others)),
            (a * many, (fast_a * many, a * fast_many)),
            (many * a, (many * fast_a, fast_many * a)),
            (many * a.sp, (fast_many * a.sp,)),
            (many.inv(), (fast_many.inv(),)),
        ):
            for fast in fasts:
                assert isinstance(fast, FastPose)
                assert plain.raw_pose.numpy().tobytes() == fast.raw_pose.numpy().tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_matrices_are_equal(n: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(600):
        pose = Pose(th.tensor(rng.normal(size=(n, 7)).astype(np.float32)))
        expected, found = rotations.quaternion_to_matrix(pose.q), rotation_matrix(pose)
        assert expected.numpy().tobytes() == found.numpy().tobytes() and expected.stride() == found.stride()


def test_quaternions_of_matrices_are_equal() -> None:
    rng = np.random.default_rng(0)
    for i in range(600):
        angles = rng.uniform(-4, 4, 3) if i % 3 else rng.choice([0, np.pi, np.pi / 2, -np.pi / 2, 1e-4], 3)
        matrix = rotations.euler_angles_to_matrix(th.tensor(angles[None], dtype=th.float32), "XYZ")
        expected = rotations.matrix_to_quaternion(matrix).numpy()[0]
        assert matrix_to_quaternion(matrix).tobytes() == expected.tobytes()


def test_maniskill_observes_without_side_effects_and_rewards_without_observations() -> None:
    """What leaving out observations rests on, read from the source of all its tasks and robots."""
    root = Path(mani_skill.__file__).parent
    observing = {"_get_obs_extra", "_get_obs_agent", "_get_obs_state_dict", "get_proprioception"}
    found = 0
    for file in (*root.glob("envs/**/*.py"), *root.glob("agents/**/*.py")):
        if file.name == "sim2real_env.py":  # no simulator
            continue
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            nodes = list(ast.walk(function))
            if function.name in observing:
                found += 1
                stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
                assert not stored and "rand" not in ast.unparse(function), f"{file}: {function.name}"
            elif function.name in ("compute_dense_reward", "compute_sparse_reward", "compute_normalized_dense_reward"):
                found += 1
                reads = [n for n in nodes if isinstance(n, ast.Subscript | ast.Attribute) and ast.unparse(n.value) == "obs"]
                assert not reads, f"{file}: {function.name}"
    assert found > 100


class ObsReward(gym.Wrapper):
    """Somebody's wrapper, whose reward reads the observation."""

    def step(self, action: Any) -> tuple[Any, ...]:
        obs, _, *rest = self.env.step(action)
        return (obs, obs.sum(), *rest)


@register_env("ObsRewardPushCube-v1", max_episode_steps=50)
class ObsRewardPushCube(PushCubeEnv):
    """Somebody's task, whose reward reads the observation."""

    def compute_dense_reward(self, obs: Any, action: Any, info: dict[str, Any]) -> th.Tensor:
        return obs["extra"]["obj_pose"].sum(1) + obs["agent"]["qpos"].sum(1)


@pytest.mark.parametrize("own", ["wrapper", "task"])
def test_what_others_wrote_sees_every_observation(own: str) -> None:
    env_id, rewards = {"wrapper": "PushCube-v1", "task": "ObsRewardPushCube-v1"}[own], []
    for fast in (False, True):
        env = gym.make(env_id, obs_mode="state", render_backend="none", reward_mode="dense")
        env = ActionChunkWrapper(unbatched(ObsReward(env) if own == "wrapper" else env, fast), act_horizon=4)
        env.reset(seed=0)
        rewards.append([env.step(np.full((4, 8), 0.1 * i, np.float32))[1] for i in range(3)])
        env.close()
    assert rewards[0] == rewards[1] and len(set(rewards[0])) == 3


def test_nan_actions_are_refused_as_ever() -> None:
    env = unbatched(gym.make("PushCube-v1", obs_mode="state", render_backend="none"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Action cannot be NaN"):
        env.step(np.full(8, np.nan, np.float32))
    env.close()


def test_a_failed_step_leaves_no_old_observation() -> None:
    """After an error in the middle of a chunk the next episode begins with its own observation."""
    kwargs = dict(obs_mode="state", render_backend="none", reward_mode="dense")
    env = ActionChunkWrapper(unbatched(gym.make("PushCube-v1", **kwargs)), act_horizon=4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full((4, 8), np.nan, np.float32))
    obs, _ = env.reset(seed=1)
    np.testing.assert_array_equal(obs[0], env.unwrapped.get_obs().numpy()[0])
    env.close()


def is_fast(env: Any) -> bool:
    return any(type(actor) is FastActor for actor in env.unwrapped.scene.actors.values())


def test_installed_in_both_forms_and_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = tiny_flow(35, 8, pred_horizon=4, act_horizon=4, env_id="PushCube-v1", control_mode="pd_joint_delta_pos")

    def forms(**kwargs: Any) -> list[bool]:
        venv = make_chunk_env("PushCube-v1", **kwargs)
        env = LatentSteeringWrapper(gym.make("PushCube-v1", obs_mode="state", render_backend="none"), flow)
        found = [is_fast(venv.envs[0]), is_fast(env)]  # type: ignore[attr-defined]
        venv.close()
        env.close()
        return found

    before = dict(vars(Actor)), dict(vars(Link)), dict(vars(Pose))
    assert forms() == [True, True]
    assert before == (dict(vars(Actor)), dict(vars(Link)), dict(vars(Pose))), "ManiSkill's classes are nobody's to change"
    assert forms(fast=False) == [False, True]
    monkeypatch.setenv(install.SWITCH, "0")
    assert forms() == [False, False]


def test_off_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mani_skill, "__version__", "9.9")
    install._tested.cache_clear()
    with pytest.warns(UserWarning, match=r"mani_skill 9\.9 is stepped at its own speed"):
        assert not wants_fast()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        assert not wants_fast()
    install._tested.cache_clear()


def test_unbatched_twice_is_unbatched_once() -> None:
    env = unbatched(gym.make("PushCube-v1", obs_mode="state", render_backend="none"))
    assert unbatched(env) is env
    assert isinstance(env.env, ObserveOnDemand)  # type: ignore[attr-defined]
    env.close()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("reward_mode", ["normalized_dense", "sparse"])
@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
@pytest.mark.parametrize("env_id", TASKS)
def test_whole_episodes_are_equal(env_id: str, control_mode: str, reward_mode: str) -> None:
    """
    Twenty episodes, half of them with contact: to the time limit with a dense reward, to a termination or the time limit
    with a sparse one.
    """
    pair = Pair(env_id, control_mode=control_mode, reward_mode=reward_mode)
    touched = 0
    for seed in range(20):
        before = pair.contacts
        results = pair.episode(200, seed, hold=seed % 2 == 1)
        touched += pair.contacts - before >= 2
        assert results[-1][2] or results[-1][3]
        if reward_mode == "sparse":
            pair.reset(seed + 100)
            pair.win()
            assert pair.step(np.zeros(pair.envs[0].action_space.shape, np.float32))[2]
    assert touched >= 10
    pair.close()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("env_id", sorted(REGISTERED_ENVS))
def test_every_task_is_equal(env_id: str) -> None:
    """One episode of every task that can be built on a CPU without downloads, with the first reward mode that it has."""
    kwargs: dict[str, Any] = {}
    try:
        plain = Pair(env_id, fast=False, chunk=dict(act_horizon=8, ignore_terminations=True), **kwargs)
    except (Exception, SystemExit) as error:
        pytest.skip(f"cannot be built here: {type(error).__name__}: {error}")
    try:
        plain.episode(7, 0)
    except AssertionError as error:
        pytest.skip(f"not deterministic by itself: {error}")
    finally:
        plain.close()
    pair = Pair(env_id, chunk=dict(act_horizon=8, ignore_terminations=True), **kwargs)
    pair.episode(7, 0)
    pair.close()
