"""Episodes that start from recorded ones: exact frames, clocks and metrics, the curriculum, and a chain that needs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import ActionChunkWrapper, ResumeCallback, StateStarts, VecLatentSteering, evaluate, make_latent_env, resume
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import WorkerSettings
from sb3_dsrl.steering.lockstep import LockstepVecEnv
from sb3_dsrl.steering.start_control import get_progress, set_progress, true_starts
from sb3_dsrl.steering.starts import StartCurriculum
from tests.envs import RestorableEnv, scripted
from tests.toys import linear_flow

H, FRAMES, LIMIT = 3, 2, 30


def raw() -> gym.Env:
    return TimeLimit(RestorableEnv(episode_lengths=(12,), random_start=True), LIMIT)


def recorded(n: int = 2) -> tuple[StateStarts, list[list[np.ndarray]], list[list[float]]]:
    """Episodes of 12 steps with their observations and rewards."""
    env, rng = raw(), np.random.default_rng(0)
    states, actions, seen, rewards = [], [], [], []
    for seed in range(n):
        frames, own = [env.reset(seed=seed)[0].copy()], []
        states.append([])
        actions.append(rng.uniform(-1, 1, (12, 2)).astype(np.float32))
        for action in actions[-1]:
            states[-1].append(env.get_wrapper_attr("get_sim_state")())
            obs, reward, *_ = env.step(action)
            frames.append(obs.copy())
            own.append(float(reward))
        seen.append(frames)
        rewards.append(own)
    return StateStarts(states, actions, true_starts=0.0), seen, rewards


def chunk_env(starts: StateStarts | None, **kwargs: Any) -> ActionChunkWrapper:
    return ActionChunkWrapper(raw(), H, FRAMES, gamma=0.5, starts=starts, **kwargs)


@pytest.mark.parametrize("ignore_terminations", [False, True])
def test_an_episode_goes_on_as_the_recorded_one_did(ignore_terminations: bool) -> None:
    starts, seen, rewards = recorded()
    env = chunk_env(starts, ignore_terminations=ignore_terminations)
    drawn = []
    for i in range(40):
        env.set_start_progress((0.0, 0.5, 1.0)[i % 3])
        obs, _ = env.reset(seed=i if i < 20 else None)
        episode, t = _which(obs, seen)
        drawn.append((i % 3, t))
        actions, expected = starts.actions[episode][t:], rewards[episode][t:]
        chunk = np.concatenate([actions, np.zeros((H, 2), np.float32)])[:H]
        obs, reward, terminated, truncated, info = env.step(chunk)
        k = min(H, len(actions))
        if ignore_terminations and k < H:
            continue
        assert (info["chunk_length"], terminated, truncated) == (k, t + k == 12 and not ignore_terminations, False)
        assert reward == pytest.approx(sum(0.5**j * r for j, r in enumerate(expected[:k])), rel=1e-6)
        np.testing.assert_array_equal(obs, [seen[episode][t + k - 1], seen[episode][t + k]])
        if terminated:
            assert info["episode_return"] == pytest.approx(sum(expected)) and info["episode_length"] == 12 - t
            assert info["episode"]["l"] == 1 and info["success_once"] and info["start_step"] == t
    assert {t for kind, t in drawn if kind == 0} == {11}  # the last action brings success
    assert {t for kind, t in drawn if kind == 1} <= {6, 7} and {t for kind, t in drawn if kind == 2} <= {2, 3}


def _which(obs: np.ndarray, seen: list[list[np.ndarray]]) -> tuple[int, int]:
    """Episode and step whose frames are seen."""
    found = [
        (e, t)
        for e, frames in enumerate(seen)
        for t in range(FRAMES, len(frames))
        if np.array_equal(obs, [frames[t - 1], frames[t]])
    ]
    assert len(found) == 1
    return found[0]


def test_the_time_limit_is_that_of_the_whole_episode() -> None:
    starts, _, _ = recorded()
    env = chunk_env(starts, ignore_terminations=True)
    for _ in range(10):
        env.reset()
        lengths, truncated = [], False
        while not truncated:
            *_, truncated, info = env.step(np.zeros((H, 2), np.float32))
            lengths.append(info["chunk_length"])
        assert info["start_step"] + info["episode_length"] == LIMIT
        assert sum(lengths) == -(-info["episode_length"] // H) * H and info["episode"]["l"] == len(lengths)


def test_success_before_the_start_does_not_count() -> None:
    starts, _, _ = recorded()
    starts.last_starts = [11, 11]
    env = ActionChunkWrapper(
        TimeLimit(RestorableEnv(episode_lengths=(12,), success_steps=(10, 11)), 13), H, FRAMES, starts=starts
    )
    env.reset(seed=0)  # step 10 and 11 were replayed
    *_, info = env.step(np.zeros((H, 2), np.float32))
    assert info["start_step"] == 11 and not info["success_once"] and info["episode_length"] == 1


# --------------------------------------------------------------------------------------------------------------- curriculum


def test_curriculum_by_hand() -> None:
    starts = StateStarts([[0] * 20], [np.zeros((20, 1))], true_starts=0.0, step=0.1, target=0.75)
    curriculum = StartCurriculum(starts, 2)
    assert curriculum.progress == 0.0
    for success, expected in (
        (True, 0.1),
        (True, 0.2),
        (False, 0.0),
        (False, 0.0),
        *((True, 0.1 * (i + 1)) for i in range(4)),
    ):
        curriculum.draw()
        curriculum.record(success)
        assert curriculum.progress == pytest.approx(expected if expected > 0 else max(0.0, expected))
    for _ in range(20):
        curriculum.draw()
        curriculum.record(True)
    assert curriculum.progress == 1.0
    curriculum.record(False)  # of an episode that was counted already
    assert curriculum.progress == 1.0


def test_true_starts_are_mixed_in_and_do_not_count() -> None:
    starts = StateStarts([list(range(20))], [np.zeros((20, 1))], true_starts=0.25)
    curriculum = StartCurriculum(starts, 2)
    curriculum.seed(0)
    curriculum.progress = 0.5
    drawn = [curriculum.draw() for _ in range(4_000)]
    share = np.mean([recorded is None for recorded in drawn])
    assert share == pytest.approx(0.25, abs=0.03)
    begun = {recorded.elapsed_steps for recorded in drawn if recorded is not None}
    assert begun == {9, 10}  # of 0..17, half way and up to a tenth later
    assert all(recorded.state == recorded.elapsed_steps and len(recorded.actions) == 2 for recorded in drawn if recorded)
    while curriculum.draw() is not None:
        pass
    curriculum.record(False)
    assert curriculum.progress == 0.5


def test_starts_stay_where_the_target_share_succeeds() -> None:
    """Success is likelier near the end: p = 1 - progress. The balance of steps is at p = target."""
    for target in (0.5, 0.8):
        starts = StateStarts([[0] * 50], [np.zeros((50, 1))], true_starts=0.0, step=0.02, target=target)
        curriculum, rng, places = StartCurriculum(starts, 1), np.random.default_rng(0), []
        for _ in range(3_000):
            curriculum.draw()
            curriculum.record(bool(rng.random() < 1 - curriculum.progress))
            places.append(curriculum.progress)
        assert 1 - np.mean(places[500:]) == pytest.approx(target, abs=0.03)


# ----------------------------------------------------------------------------------------------------------- seeds and forms

FORMS: dict[str, Callable[[list[Callable[[], gym.Env]]], VecEnv]] = {
    "one after the other": DummyVecEnv,
    "side by side": LockstepVecEnv,
    "workers": lambda fns: WorkerVecEnv(fns, WorkerSettings(2)),
}


def played(venv: VecEnv, n: int = 25) -> list[Any]:
    rng, steps = np.random.default_rng(0), [venv.reset().tolist()]
    for _ in range(n):
        obs, rewards, dones, infos = venv.step(rng.uniform(-1, 1, (3, H, 2)).astype(np.float32))
        ends = [[info.get(key) for key in ("start_step", "start_progress", "success_once")] for info in infos]
        steps.append([obs.tolist(), rewards.tolist(), dones.tolist(), ends])
    return steps


@pytest.mark.parametrize("form", FORMS)
def test_the_seed_decides_all_starts(form: str) -> None:
    starts, _, _ = recorded()
    starts.true_starts = 0.3
    found = []
    for name, seed in (("one after the other", 3), (form, 3), (form, 4)):
        venv = FORMS[name]([lambda: chunk_env(starts)] * 3)
        venv.seed(seed)
        found.append(played(venv))
        assert len(set(get_progress(venv) or [])) > 1
        venv.close()
    assert found[0] == found[1] != found[2]
    steps = [end[0] for step in found[0][1:] for end, done in zip(step[3], step[2], strict=True) if done]
    assert 0 in steps and len(set(steps)) > 3


def test_evaluation_is_from_true_starts_and_training_goes_on() -> None:
    starts, _, _ = recorded()
    flow = linear_flow(3, 2, H)
    venv = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(raw(), H, starts=starts)] * 2), flow)
    plain = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(raw(), H)] * 2), flow)
    set_progress(venv, [0.4, 0.7])
    found, expected = (evaluate("prior", env, 8, seed=1) for env in (venv, plain))
    assert (found.mean_return, found.mean_length) == (expected.mean_return, expected.mean_length)
    assert get_progress(venv) == [0.4, 0.7] and get_progress(plain) is None
    venv.seed(0)
    venv.reset()
    ends = []
    while len(ends) < 5:
        ends += [info["start_step"] for info in venv.step(np.zeros((2, H, 2), np.float32))[3] if "start_step" in info]
    assert min(ends) > 0
    with pytest.raises(RuntimeError), true_starts(venv):
        raise RuntimeError
    assert all(env.get_wrapper_attr("_curriculum").on for env in venv.unwrapped.envs)  # type: ignore[attr-defined]


def test_a_resumed_run_starts_where_the_other_stopped(tmp_path: Path) -> None:
    starts, _, _ = recorded()
    flow = linear_flow(3, 2, H)

    def env() -> VecLatentSteering:
        return make_latent_env(raw, flow, 1, starts=starts)

    kwargs: dict[str, Any] = dict(n_steps=16, batch_size=16, policy_kwargs=dict(net_arch=[8]), seed=0)
    model = PPO("LatentPolicy", env(), gamma=flow.gamma**H, **kwargs)
    model.learn(64, ResumeCallback(tmp_path / "model.zip"))
    progress = get_progress(model.get_env())
    assert progress is not None and progress[0] > 0
    other = env()
    resumed = resume(PPO, tmp_path / "model.zip", other)
    assert resumed is not None and get_progress(other) == [0.0]
    resumed.set_logger(configure(None, []))
    ResumeCallback(tmp_path / "model.zip").init_callback(resumed)
    assert get_progress(other) == progress


# --------------------------------------------------------------------------------------------------------------- the chain


class Chain(gym.Env):
    """
    At each of 14 places a cue says which way leads on; the other ends the episode. Success, the only reward, is at the end: a
    policy that knows nothing gets there once in 16,384 episodes.
    """

    length = 14

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        right = bool(action[0] * self._cue() > 0)
        self.place += right
        success = self.place == self.length
        return self._obs(), float(success), success or not right, False, {"success": success}

    def get_sim_state(self) -> int:
        return self.place

    def set_sim_state(self, state: int) -> None:
        self.place = state

    def _cue(self) -> float:
        return 1.0 if self.place * 7 % 3 == 1 else -1.0

    def _obs(self) -> np.ndarray:
        return np.array([self.place / self.length, self._cue()], np.float32)


def chain_starts(**kwargs: Any) -> StateStarts:
    env = Chain()
    cues = []
    for env.place in range(Chain.length):
        cues.append([env._cue()])
    return StateStarts([list(range(Chain.length))], [np.array(cues, np.float32)], **kwargs)


def learned(starts: StateStarts | None) -> tuple[float, float]:
    """Success from true starts after 4,000 steps, and share of training steps that were rewarded."""
    flow = linear_flow(2, 1, 1, gamma=0.95)
    fns = [lambda: ActionChunkWrapper(Chain(), 1, gamma=0.95, starts=starts)] * 4
    venv = VecLatentSteering(DummyVecEnv(fns), flow)
    kwargs: dict[str, Any] = dict(n_steps=64, batch_size=128, learning_rate=3e-3, policy_kwargs=dict(net_arch=[16]), seed=0)
    model = PPO("LatentPolicy", venv, gamma=venv.macro_gamma, **kwargs)
    rewards = []

    def look(local: dict[str, Any], _: Any) -> bool:
        rewards.extend(local["rewards"])
        return True

    model.learn(4_000, look)
    return evaluate(model, venv, 20).success_at_end, float(np.mean(rewards))


def test_a_chain_is_solved_with_starts_alone() -> None:
    success, rewarded = learned(chain_starts(step=0.1))
    assert success == 1.0 and rewarded > 0.05
    assert learned(None) == (0.0, 0.0)


# --------------------------------------------------------------------------------------------------------------- bad input


class Silent(Chain):
    """A chain that says nothing of success."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return (*super().step(action)[:4], {})


def silent_episode() -> None:
    env = ActionChunkWrapper(Silent(), 1, starts=chain_starts(true_starts=0.0))
    env.reset()
    env.step(np.array([[env.unwrapped._cue()]], np.float32))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: chain_starts(true_starts=1.0), r"true_starts is a share and must lie in \[0, 1\), found 1.0"),
        (lambda: chain_starts(step=0.0), r"step is a part of an episode and must lie in \(0, 1\], found 0.0"),
        (lambda: chain_starts(target=1.0), r"target is a share of successes and must lie in \(0, 1\), found 1.0"),
        (lambda: StateStarts([], []), "recorded episodes: there is no episode to start from"),
        (
            lambda: StateStarts([[0]], [np.zeros((2, 1))]),
            r"There must be a state for each of \[2\] actions, found \[1\] states",
        ),
        (
            lambda: ActionChunkWrapper(Chain(), 1, 15, starts=chain_starts()),
            r"no episode has a step to start from after the 15 that are replayed \(obs_horizon\)",
        ),
        (
            lambda: ActionChunkWrapper(scripted(), 1, starts=chain_starts()),
            r"ScriptedEnv cannot go back to a state: it needs the methods get_sim_state\(\) and set_sim_state\(state\)",
        ),
        (
            lambda: ActionChunkWrapper(gym.make("Pendulum-v1"), 1, starts=chain_starts(env_id="PickCube-v1")),
            "recorded episodes was recorded with env 'PickCube-v1', but episodes should start in 'Pendulum-v1'",
        ),
        (
            lambda: ActionChunkWrapper(TimeLimit(Chain(), 3), 1, starts=chain_starts(true_starts=0.0)).reset(),
            "20 episodes in a row ended while they were replayed to step 13: is the time limit of Chain shorter than theirs",
        ),
        (
            silent_episode,
            "starts move as success allows, but the env reports none: it needs 'success' or 'is_success' in its info",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
