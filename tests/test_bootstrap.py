"""What follows a macro-step that was cut short: gamma for each env step that was really made."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dsrl import ExactBootstrap, FlowPolicy, LatentSteeringWrapper, VecLatentSteering
from sb3_dsrl.steering.vec_env import find_steering
from tests.envs import FORMS, gym_steered, numbered, scripted

GAMMA, H, N_STEPS, LAMBDA = 0.9, 3, 12, 0.8

#: Env steps of the truncated macro-steps, by the number of the macro-step, of each env.
CUTS = [{2: 0, 5: 1, 9: 2}, {0: 2, 1: 0, 11: 1}, {4: 3}]


class Cut(gym.Wrapper):
    """A steered env whose macro-steps are cut short where it is told so."""

    def __init__(self, env: gym.Env, cuts: dict[int, int]) -> None:
        super().__init__(env)
        self.cuts, self.n = cuts, -1

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        self.n += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.n in self.cuts:
            k = self.cuts[self.n]
            return obs, float(reward) if k else 0.0, False, True, dict(info, chunk_length=k)
        return obs, reward, terminated, truncated, info


def collected(env: VecEnv, exact: bool) -> tuple[PPO, list[dict[str, Any]]]:
    """One rollout of a stock PPO, and what its env gave."""
    gamma = find_steering(env).contract.macro_gamma
    model = PPO("LatentPolicy", env, gamma=gamma, gae_lambda=LAMBDA, n_steps=N_STEPS, batch_size=N_STEPS, seed=0)
    th.nn.init.normal_(model.policy.value_net.bias)  # values that matter
    given: list[dict[str, Any]] = []
    step_wait = model.env.step_wait

    def record() -> Any:
        obs, rewards, dones, infos = step_wait()
        given.append(dict(obs=obs.copy(), rewards=rewards.copy(), dones=dones.copy(), infos=infos))
        return obs, rewards, dones, infos

    model.env.step_wait = record
    _, callback = model._setup_learn(N_STEPS * env.num_envs, ExactBootstrap() if exact else None)
    callback.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    return model, given


def reference(model: PPO, given: list[dict[str, Any]], i: int) -> np.ndarray:
    """Advantages of one env in plain loops, with ``gamma ** k`` after every macro-step."""

    def value(features: np.ndarray) -> float:
        return model.policy.predict_values(th.tensor(features[None])).item()

    deltas = np.zeros(N_STEPS)
    for t, step in enumerate(given):
        k = step["infos"][i]["chunk_length"]
        follows = 0.0
        if not step["dones"][i]:
            follows = value(step["obs"][i])
        elif step["infos"][i]["TimeLimit.truncated"]:
            follows = value(step["infos"][i]["terminal_observation"])
        deltas[t] = step["rewards"][i] + GAMMA**k * follows - model.rollout_buffer.values[t, i]
    advantages = np.zeros(N_STEPS)
    for t in reversed(range(N_STEPS)):
        goes_on = t + 1 < N_STEPS and not given[t]["dones"][i]
        advantages[t] = deltas[t] + (GAMMA**H * LAMBDA * advantages[t + 1] if goes_on else 0.0)
    return advantages


def cut_env(flow: FlowPolicy, cuts: list[dict[int, int]]) -> VecEnv:
    def make(i: int) -> gym.Env:
        inner = scripted(None, episode_lengths=(17, 100), random_start=True)
        return Cut(LatentSteeringWrapper(inner, flow, gamma=GAMMA), cuts[i])

    return DummyVecEnv([lambda i=i: make(i) for i in range(len(cuts))])


@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_equal_a_hand_loop(normalize: bool, flow: FlowPolicy) -> None:
    """Fault b and n: k = 0 and 0 < k < H, beside whole chunks, terminations and whole truncated ones."""
    env = cut_env(flow, CUTS)
    model, given = collected(VecNormalize(env, gamma=GAMMA**H) if normalize else env, exact=True)
    lengths = {step["infos"][i]["chunk_length"] for step in given for i in range(3) if step["dones"][i]}
    assert lengths >= {0, 1, 2, 3}
    for i in range(3):
        np.testing.assert_allclose(model.rollout_buffer.advantages[:, i], reference(model, given, i), atol=1e-4)


def test_without_it_sb3_is_wrong(flow: FlowPolicy) -> None:
    model, given = collected(cut_env(flow, CUTS), exact=False)
    wrong = [not np.allclose(model.rollout_buffer.advantages[:, i], reference(model, given, i), atol=1e-3) for i in range(3)]
    assert wrong == [True, True, False]


def test_it_does_nothing_where_all_chunks_are_whole(flow: FlowPolicy) -> None:
    def env() -> VecEnv:
        envs = [scripted(10, episode_lengths=(7, 100), random_start=True) for _ in range(2)]
        return gym_steered(flow, envs, gamma=GAMMA)

    (plain, _), (exact, given) = (collected(env(), exact=exact) for exact in (False, True))
    assert any(info["TimeLimit.truncated"] for step in given for info in step["infos"])
    for name in ("rewards", "advantages", "returns"):
        np.testing.assert_array_equal(getattr(plain.rollout_buffer, name), getattr(exact.rollout_buffer, name))


@pytest.mark.parametrize("form", FORMS)
def test_time_limits_that_cut_chunks(form: str, flow: FlowPolicy) -> None:
    """The envs for which it is made: 10 env steps are three chunks of 3 and one of 1."""
    envs = [scripted(10, episode_lengths=(7, 100), random_start=True) for _ in range(2)]
    model, given = collected(FORMS[form](flow, envs, gamma=GAMMA, cut_at_time_limit=True), exact=True)
    assert {step["infos"][0]["chunk_length"] for step in given if step["infos"][0]["TimeLimit.truncated"]} == {1}
    for i in range(2):
        np.testing.assert_allclose(model.rollout_buffer.advantages[:, i], reference(model, given, i), atol=1e-4)


def test_a_lost_worker_leaves_no_trace_in_the_advantages(flow: FlowPolicy, tmp_path: Path) -> None:
    """A macro-step of no env steps: its target is the value of the state where it began, so nothing is learned from it."""
    venv = numbered(2, 2, on_failure="restart", fail="raise", fail_at=7, marker=tmp_path / "failed")
    env = VecLatentSteering(venv, flow)
    try:
        with pytest.warns(UserWarning, match="It is started again"):
            model, given = collected(env, exact=True)
    finally:
        env.close()
    (lost,) = [t for t, step in enumerate(given) if step["infos"][1].get("worker_failed")]
    assert model.rollout_buffer.advantages[lost, 1] == pytest.approx(0.0, abs=1e-5)


def test_refusals(flow: FlowPolicy) -> None:
    env = gym_steered(flow, [scripted(10)], gamma=GAMMA)
    with pytest.raises(ValueError, match="ExactBootstrap is for PPO, A2C and TRPO, found SAC"):
        SAC("MlpPolicy", env, gamma=GAMMA**H, buffer_size=10).learn(1, ExactBootstrap())
    with pytest.raises(ValueError, match="is not steered"):
        PPO("MlpPolicy", "Pendulum-v1", n_steps=2, batch_size=2).learn(1, ExactBootstrap())
