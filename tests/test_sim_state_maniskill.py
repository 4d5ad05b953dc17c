"""ManiSkill's envs on the CPU go back to a state, as exactly as PhysX allows."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import ActionChunkWrapper, WorkerSettings, make_chunk_env, make_latent_env, search_noise
from sb3_dsrl.envs.maniskill_wrappers import unbatched
from sb3_dsrl.steering.lockstep import LockstepVecEnv
from sb3_dsrl.steering.sim_state import get_sim_states, set_sim_states
from tests.envs import tiny_flow
from tests.identity import OBJECTS, WINS, differences, hold, state, touched

#: What PhysX remembers of contacts cannot be restored. With an object in the gripper, positions differed by up to 2.2 mm after
#: 12 env steps in 150 cases (docs/simulators.md), and after two restores of the same state by up to 1.8 mm, mostly not at all.
BOUND = 0.005


def chunk_env(env_id: str, control_mode: str = "pd_joint_delta_pos", fast: bool = True, **kwargs: Any) -> ActionChunkWrapper:
    made = gym.make(env_id, obs_mode="state", render_backend="none", control_mode=control_mode, **kwargs)
    return ActionChunkWrapper(unbatched(made, fast), 4, obs_horizon=2)


def positions(env: Any) -> np.ndarray:
    """Of all bodies (m), and of the joints (rad or m)."""
    base = env.unwrapped
    bodies = [np.asarray(actor.pose.p).reshape(-1) for actor in base.scene.actors.values()]
    return np.concatenate([*bodies, np.asarray(base.agent.robot.get_qpos()).reshape(-1)])


def random_chunks(n: int, seed: int, scale: float = 0.3, actions: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (n, 4, actions)).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_joint_target_delta_pos", "pd_ee_target_delta_pose"])
def test_without_contact_the_same_follows_bit_for_bit(control_mode: str, fast: bool) -> None:
    """Simulator, controllers with their own targets, drives, elapsed steps, observations, rewards, infos."""
    env = chunk_env("StackCube-v1", control_mode, fast)
    env.reset(seed=0)
    chunks = random_chunks(5, 0, actions=env.action_space.shape[1])
    env.step(chunks[0])
    kept = env.get_sim_state()
    env.set_sim_state(kept)  # from here on both have the same past
    results = []
    for _ in range(2):
        steps = [env.step(chunk) for chunk in chunks[1:4]]
        results.append((steps, state(env.unwrapped), env.unwrapped._elapsed_steps))
        for disturbing in random_chunks(2, 1, 0.6, env.action_space.shape[1]):
            env.step(disturbing)
        env.set_sim_state(kept)
    assert not list(differences(*results))
    env.close()


@pytest.mark.parametrize("env_id", OBJECTS)
def test_with_contact_the_bound_holds(env_id: str) -> None:
    """Twelve env steps with the object in the gripper, the first time and after a restore."""
    env = chunk_env(env_id)
    env.reset(seed=1)
    base = env.unwrapped
    closing = np.zeros((4, 8), np.float32)
    closing[:, -1] = -1
    for _ in range(6):  # the object falls while the fingers close
        hold(base, OBJECTS[env_id])
        env.env.step(closing[0])
    assert touched(base, OBJECTS[env_id])
    kept, chunks = env.get_sim_state(), random_chunks(3, 2, 0.1)
    chunks[:, :, -1] = -1
    found = []
    for _ in range(3):
        for chunk in chunks:
            env.step(chunk)
        found.append(positions(env))
        env.set_sim_state(kept)
    assert np.abs(found[1] - found[0]).max() < BOUND
    assert np.abs(found[2] - found[1]).max() < BOUND
    env.close()


def test_goals_and_elapsed_steps_come_back() -> None:
    env = chunk_env("PickCube-v1", max_episode_steps=10)
    env.reset(seed=0)
    base: Any = env.unwrapped
    env.step(random_chunks(1, 0)[0])
    kept, goal = env.get_sim_state(), np.array(base.goal_site.pose.p)
    WINS["PickCube-v1"](base)
    env.hold_ends(True)
    infos = [env.step(np.zeros((4, 8), np.float32))[4] for _ in range(3)]
    assert [info["chunk_length"] for info in infos] == [4, 4, 0] and infos[-1]["episode_over"]
    env.hold_ends(False)
    env.set_sim_state(kept)
    np.testing.assert_array_equal(np.array(base.goal_site.pose.p), goal)
    ends = [env.step(np.zeros((4, 8), np.float32))[3] for _ in range(2)]
    assert ends == [False, True]
    env.close()


def test_another_scene_is_refused() -> None:
    """Every episode of this task has a peg of its own, in a scene that is built for it."""
    env = chunk_env("PegInsertionSide-v1")
    env.reset(seed=0)
    kept = env.get_sim_state()
    env.reset(seed=1)
    with pytest.raises(ValueError, match="PegInsertionSide-v1: this state is of another scene"):
        env.set_sim_state(kept)
    env.close()


def test_episodes_that_follow_are_as_without() -> None:
    starts = []
    for look_ahead in (False, True):
        env = chunk_env("PushCube-v1")
        env.reset(seed=0)
        if look_ahead:
            kept = env.get_sim_state()
            env.step(random_chunks(1, 0)[0])
            env.set_sim_state(kept)
        starts.append(env.reset()[0])
        env.close()
    np.testing.assert_array_equal(*starts)


def lockstep() -> VecEnv:
    return LockstepVecEnv([lambda: chunk_env("PushCube-v1")] * 3)


def workers() -> VecEnv:
    kwargs: Any = dict(act_horizon=4, obs_horizon=2, control_mode="pd_joint_delta_pos")
    return make_chunk_env("PushCube-v1", 3, workers=WorkerSettings(2), **kwargs)


def one_by_one() -> VecEnv:
    return DummyVecEnv([lambda: chunk_env("PushCube-v1", fast=False)] * 3)


def test_stacked_envs_and_workers_go_back() -> None:
    """For some envs and for all, with the results that plain envs have."""
    results = []
    makers: list[Callable[[], VecEnv]] = [one_by_one, lockstep, workers]
    for make in makers:
        venv = make()
        venv.seed(0)
        venv.reset()
        chunks = random_chunks(3 * 6, 0).reshape(6, 3, 4, 8)
        kept, found = get_sim_states(venv), []
        venv.env_method("hold_ends", True)
        for t, own in enumerate(chunks):
            found.append(venv.step(own)[:2])
            if t == 1:
                set_sim_states(venv, kept)
            if t == 3:
                set_sim_states(venv, kept[2:], [2])
        results.append([(obs.copy(), rewards.copy()) for obs, rewards in found])
        venv.close()
    assert not list(differences(results[0], results[1])) and not list(differences(results[0], results[2]))


def test_search_on_a_task() -> None:
    """The states that are searched are those of episodes that nobody searches in, and the scores differ."""
    flow = tiny_flow(35, 8, pred_horizon=4, act_horizon=4, control_mode="pd_joint_delta_pos", env_id="PushCube-v1")
    env = make_latent_env("PushCube-v1", flow, 2, max_episode_steps=12, workers=WorkerSettings(1))
    result = search_noise(env, flow, 4, n_candidates=3, horizon=2)
    assert len(result) == 4 * 3 and result.env_steps == 4 * (12 + 3 * 4 * (2 + 2 + 1))
    assert (result.scores.std(dim=1) > 0).any() and result.lengths.tolist() == [12] * 4
    env.close()
