"""Chunk envs go back to a state: in every form, for some envs or all, and nothing of what was in between is left."""

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor

from sb3_dsrl import ActionChunkWrapper, LatentSteeringWrapper, VecLatentSteering
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import WorkerSettings
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.lockstep import LockstepVecEnv
from sb3_dsrl.steering.sim_state import get_sim_states, set_sim_states
from tests.envs import RestorableBatch, RestorableEnv, ScriptedEnv, scripted, tiny_flow
from tests.identity import differences
from tests.test_conformance import Together

N, H = 3, 3
#: An episode ends by its time limit of 10, or by a termination.
LENGTHS = [(1000,), (7, 1000), (13, 4)]


def raw(i: int) -> gym.Env:
    return TimeLimit(RestorableEnv(episode_lengths=LENGTHS[i], random_start=True), 10)


def chunk(i: int) -> ActionChunkWrapper:
    return ActionChunkWrapper(raw(i), H, obs_horizon=2)


FNS = [lambda i=i: chunk(i) for i in range(N)]
FORMS: dict[str, Callable[[], VecEnv]] = {
    "one after the other": lambda: DummyVecEnv(FNS),
    "side by side": lambda: LockstepVecEnv([lambda i=i: ActionChunkWrapper(Together(raw(i)), H, 2) for i in range(N)]),
    "workers": lambda: WorkerVecEnv(FNS, WorkerSettings(2)),
    "SubprocVecEnv": lambda: SubprocVecEnv(FNS, start_method="fork"),
    "batched": lambda: BatchedChunkEnv(RestorableBatch([raw(i) for i in range(N)]), H, 2),
}


def get(venv: VecEnv) -> Any:
    return venv.get_sim_state() if isinstance(venv, BatchedChunkEnv) else get_sim_states(venv)


def back(venv: VecEnv, state: Any, indices: list[int] | None = None) -> None:
    if isinstance(venv, BatchedChunkEnv):
        venv.set_sim_state(state, indices)
    else:
        set_sim_states(venv, state if indices is None else [state[i] for i in indices], indices)


def hold(venv: VecEnv, on: bool) -> None:
    if isinstance(venv, BatchedChunkEnv):
        venv.hold_ends(on)
    else:
        venv.env_method("hold_ends", on)


def kept(step: tuple[Any, ...]) -> Any:
    """A copy of what a step returned, without the clock."""
    obs, rewards, dones, infos = step
    infos = [{key: value for key, value in info.items() if key != "episode"} for info in infos]
    return pickle.loads(pickle.dumps((np.asarray(obs), rewards, dones, infos)))


def played(venv: VecEnv, chunks: np.ndarray) -> list[Any]:
    return [kept(venv.step(own)) for own in chunks]


def chunks_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, N, H, 2)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_follows_again(form: str) -> None:
    """Rewards, frames, flags, metrics at the end of an episode, time limits: all as if nothing had been in between."""
    venv, untouched = FORMS[form](), FORMS[form]()
    for own in (venv, untouched):
        own.seed(0)
        own.reset()
        own.step(chunks_of(1, 5)[0])
    state = get(venv)
    hold(venv, True)
    ahead = played(venv, chunks_of(6, 1))
    hold(venv, False)
    assert [info["episode_over"] for info in ahead[-1][3]] == [True] * N
    back(venv, state)
    # ends are real again, and the episodes after them start where they would have
    assert not list(differences(played(venv, chunks_of(8, 2)), played(untouched, chunks_of(8, 2))))
    for own in (venv, untouched):
        own.close()


@pytest.mark.parametrize("form", FORMS)
def test_some_envs_go_back_and_others_do_not(form: str) -> None:
    venv = FORMS[form]()
    venv.seed(0)
    venv.reset()
    state = get(venv)
    hold(venv, True)
    first = played(venv, chunks_of(2))
    back(venv, state, [0, 2])
    second = played(venv, np.concatenate([chunks_of(2), chunks_of(1, 3)]))
    for i in (0, 2):
        assert not list(differences([row(step, i) for step in first], [row(step, i) for step in second[:2]]))
    later = played_on(form)
    assert not list(differences([row(step, 1) for step in later], [row(step, 1) for step in second[:2]]))
    venv.close()


def played_on(form: str) -> list[Any]:
    """The third and fourth chunk of all envs, without going back."""
    venv = FORMS[form]()
    venv.seed(0)
    venv.reset()
    hold(venv, True)
    steps = played(venv, np.concatenate([chunks_of(2), chunks_of(2)]))[2:]
    venv.close()
    return steps


def row(step: Any, i: int) -> Any:
    obs, rewards, dones, infos = step
    return obs[i], rewards[i], dones[i], infos[i]


@pytest.mark.parametrize("form", FORMS)
def test_an_episode_is_held_at_its_end(form: str) -> None:
    """No reset, no env step, no reward; the last observation again; and no done."""
    venv = FORMS[form]()
    venv.seed(0)
    venv.reset()
    hold(venv, True)
    steps = played(venv, chunks_of(6))
    lengths = np.array([[info["chunk_length"] for info in step[3]] for step in steps])
    assert lengths.tolist() == [[3, 3, 3], [3, 3, 3], [3, 1, 3], [3, 0, 3], [0, 0, 0], [0, 0, 0]]
    assert not any(step[2].any() for step in steps)
    assert all("terminal_observation" not in info for step in steps for info in step[3])
    np.testing.assert_array_equal(steps[4][1], 0.0)
    np.testing.assert_array_equal(steps[4][0], steps[3][0])
    over = [[info["episode_over"] for info in step[3]] for step in steps]
    assert over == [[False] * 3, [False] * 3, [False, True, False], [True] * 3, [True] * 3, [True] * 3]
    assert [info["is_success"] for info in steps[5][3]] == [info["is_success"] for info in steps[3][3]]
    venv.close()


def latent(n: int = N, steer_mode: Any = "act_horizon") -> VecLatentSteering:
    return VecLatentSteering(DummyVecEnv(FNS[:n]), tiny_flow(), steer_mode=steer_mode)


def test_the_steered_form_goes_back_with_features_and_tail() -> None:
    """The unsteered tail of the noise is drawn again, so that the same noise becomes the same chunk."""
    venv = latent()
    venv.seed(0)
    venv.reset()
    state = venv.get_sim_state()
    w = np.random.default_rng(0).standard_normal((2, N, 3, 2)).astype(np.float32)
    first = [kept(venv.step(own)) for own in w]
    venv.set_sim_state(state)
    second = [kept(venv.step(own)) for own in w]
    assert not list(differences(first, second))
    venv.set_sim_state(state, indices=[1])
    third = kept(venv.step(w[0]))
    assert np.array_equal(third[0].shape, (N, 6)) and not np.array_equal(third[3][1]["action_chunk"], np.zeros((3, 2)))


def test_the_gym_form_goes_back_with_what_lies_around_it() -> None:
    """Monitor, below the steering as make_vec_env puts it, forgets what was tried."""
    env = LatentSteeringWrapper(Monitor(raw(0)), tiny_flow())
    env.reset(seed=0)
    w = np.random.default_rng(0).standard_normal((4, 4, 2)).astype(np.float32)
    env.step(w[3])
    state = pickle.loads(pickle.dumps(env.get_sim_state()))
    env.get_wrapper_attr("hold_ends")(True)
    for own in w:
        env.step(own)
    env.get_wrapper_attr("hold_ends")(False)
    env.set_sim_state(state)
    rewards = []
    for own in w:
        *_, truncated, info = (result := env.step(own))
        rewards.append(result[1])
        if truncated:
            break
    assert truncated and len(rewards) == 3
    assert info["episode"]["l"] == 4 and info["episode_length"] == 10
    with pytest.raises(RuntimeError, match="needs reset"):  # Monitor knows that this episode is over
        env.step(w[0])


def test_wrappers_that_record_are_left_alone() -> None:
    env = VecMonitor(latent())
    env.seed(0)
    env.reset()
    state = env.venv.get_sim_state()  # type: ignore[attr-defined]
    env.venv.set_sim_state(state)  # type: ignore[attr-defined]
    assert env.episode_count == 0 and (env.episode_lengths == 0).all()


def test_an_env_that_cannot_go_back_says_so() -> None:
    sentence = r"ScriptedEnv cannot go back to a state: it needs the methods get_sim_state\(\) and set_sim_state\(state\)"
    env = ActionChunkWrapper(scripted(), H)
    env.reset(seed=0)
    assert not env.can_restore
    with pytest.raises(ValueError, match=sentence):
        env.get_sim_state()
    batched = BatchedChunkEnv(BatchedWithout([ScriptedEnv()]), H)
    assert not batched.can_restore
    with pytest.raises(ValueError, match="cannot go back to a state"):
        batched.get_sim_state()


class BatchedWithout(RestorableBatch):
    """A batched simulator that cannot go back."""

    get_state_dict = None  # type: ignore[assignment]


def test_states_must_be_as_many_as_envs() -> None:
    venv = FORMS["one after the other"]()
    venv.reset()
    with pytest.raises(ValueError, match="one state for each of 2 envs, found 3"):
        set_sim_states(venv, get_sim_states(venv), [0, 1])


def test_old_tensors_of_a_batched_simulator_stay() -> None:
    """Who holds a tensor of the simulator keeps what it was."""
    simulator = RestorableBatch([raw(i) for i in range(N)])
    venv = BatchedChunkEnv(simulator, H, 2)
    venv.seed(0)
    venv.reset()
    state = venv.get_sim_state()
    venv.step(th.from_numpy(chunks_of(1)[0]))
    held, value = simulator._elapsed_steps, simulator._elapsed_steps.clone()
    venv.set_sim_state(state)
    assert th.equal(held, value) and simulator._elapsed_steps.tolist() == [0, 0, 0]
