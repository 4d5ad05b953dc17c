"""What may lie below a steered env, what may not, and what the policy itself gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dsrl import ActionChunkWrapper, FlowPolicy, LatentSteeringWrapper, SteerablePolicy, ppo_kwargs
from tests.envs import FORMS, ScriptedEnv, scripted, tiny_flow

W = np.zeros((4, 2), np.float32)


def episode(env: gym.Env) -> tuple[list[float], dict[str, Any]]:
    """Macro rewards of an episode, and its last info."""
    env.reset(seed=0)
    rewards, done = [], False
    while not done:
        _, reward, terminated, truncated, info = env.step(W)
        rewards.append(float(reward))
        done = terminated or truncated
    return rewards, info


@pytest.mark.parametrize("ignore_terminations", [False, True])
def test_make_vec_env_puts_monitor_below(tmp_path: Path, flow: FlowPolicy, ignore_terminations: bool) -> None:
    """SB3's make_vec_env wraps Monitor(env) in wrapper_class; time limit and terminations fall inside of chunks."""
    expected = episode(LatentSteeringWrapper(scripted(7), flow, ignore_terminations=ignore_terminations))
    venv = make_vec_env(
        lambda: scripted(7),
        n_envs=2,
        seed=0,
        wrapper_class=LatentSteeringWrapper,
        wrapper_kwargs=dict(flow=flow, ignore_terminations=ignore_terminations),
        monitor_dir=str(tmp_path),
    )
    venv.reset()
    seen: list[list[float]] = [[]]
    while len(seen) < 3:
        _, rewards, dones, infos = venv.step(np.stack([W] * 2))
        seen[-1].append(float(rewards[0]))
        if dones[0]:
            assert infos[0]["episode"]["l"] == len(seen[-1])
            assert infos[0]["episode"]["r"] == pytest.approx(sum(seen[-1]), abs=1e-5)
            seen.append([])
    assert seen[0] == pytest.approx(expected[0])
    venv.close()
    rows = pd.read_csv(tmp_path / "0.monitor.csv", skiprows=1)
    assert rows["l"].tolist() == [len(part) for part in seen[:2]]
    assert rows["r"].tolist() == pytest.approx([sum(part) for part in seen[:2]], abs=1e-5)


def test_make_vec_env_trains_and_evaluates(flow: FlowPolicy) -> None:
    venv = make_vec_env(lambda: scripted(7), n_envs=2, wrapper_class=LatentSteeringWrapper, wrapper_kwargs=dict(flow=flow))
    model = PPO("LatentPolicy", venv, **ppo_kwargs(venv, n_steps=8, n_epochs=1)).learn(32)
    assert len(evaluate_policy(model, venv, 3, return_episode_rewards=True, warn=True)[0]) == 3


@pytest.mark.parametrize("form", FORMS)
def test_ep_rew_mean_means_the_same_in_both_forms(form: str, flow: FlowPolicy) -> None:
    """What SB3 logs: sum of macro rewards, number of macro-steps; with SB3's Monitor above the env as well."""
    kwargs: dict[str, Any] = dict(gamma=0.5, reward_scale=2.0, ignore_terminations=True)
    rewards, info = episode(Monitor(LatentSteeringWrapper(scripted(7), flow, **kwargs)))
    venv = FORMS[form](flow, [scripted(7)], **kwargs)
    venv.reset()
    for _ in rewards:
        *_, dones, infos = venv.step(W[None])
    assert dones[0]
    for key in ("r", "l"):
        assert infos[0]["episode"][key] == pytest.approx(info["episode"][key], abs=1e-5)
    assert infos[0]["episode_length"] == 7 and infos[0]["episode"]["l"] == 3


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (gym.wrappers.Autoreset, "Autoreset resets the env by itself.*pass the env below it"),
        (
            lambda env: gym.wrappers.RecordEpisodeStatistics(Monitor(env)),
            r"Monitor below a chunk env.*Monitor\(Latent",
        ),
    ],
)
def test_what_would_cut_a_chunk_is_refused_at_construction(
    wrap: Callable[[gym.Env], gym.Env], sentence: str, flow: FlowPolicy
) -> None:
    with pytest.raises(ValueError, match=sentence):
        LatentSteeringWrapper(wrap(scripted(7)), flow)
    with pytest.raises(ValueError, match=sentence):
        ActionChunkWrapper(wrap(scripted(7)), 3)


class NoFurther(ScriptedEnv):
    """Ends by a time limit of its own and cannot be stepped past it."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.t < 7, "stepped past the time limit"
        obs, reward, _, _, info = super().step(action)
        return obs, reward, False, self.t == 7, info


def test_time_limit_that_cannot_be_run_past_cuts_the_chunk(flow: FlowPolicy) -> None:
    with pytest.raises(AssertionError, match="past the time limit"):
        episode(LatentSteeringWrapper(NoFurther(episode_lengths=(99,)), flow))
    raw = NoFurther(episode_lengths=(99,))
    env = LatentSteeringWrapper(raw, flow, gamma=0.5, cut_at_time_limit=True)
    rewards, info = episode(env)
    assert (len(rewards), info["chunk_length"], info["episode_length"]) == (3, 1, 7)
    assert rewards[-1] == pytest.approx(raw.rewards[6])


class Broken(SteerablePolicy):
    """A user's policy whose encode and decode give what they are told to."""

    def __init__(self, features: Any, chunks: Any = None) -> None:
        flow = tiny_flow()
        super().__init__(
            obs_shapes=flow.obs_shapes,
            obs_horizon=2,
            noise_shape=flow.noise_shape,
            cond_dim=flow.cond_dim,
            act_horizon=3,
        )
        self.features, self.chunks, self.scale = features, chunks, th.nn.Parameter(th.ones(1))

    def encode(self, obs: Any) -> Any:
        return self.features

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> Any:
        return w if self.chunks is None else self.chunks


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Broken(th.zeros(1, 5)), r"Broken.encode must give features of shape \(N, C\) = \(1, 6\), found \(1, 5\)"),
        (Broken(th.zeros(1, 1, 6)), r"encode must give features .* found \(1, 1, 6\)"),
        (
            Broken(th.zeros(1, 6), th.zeros(1, 4, 3)),
            r"decode must give chunks of shape .*\(1, 4, 2\), found \(1, 4, 3\)",
        ),
    ],
)
def test_what_the_policy_gives_is_checked(policy: SteerablePolicy, sentence: str) -> None:
    env = LatentSteeringWrapper(scripted(7), policy)
    with pytest.raises(ValueError, match=sentence):
        env.reset()
        env.step(W)


def test_numpy_out_of_a_users_policy_is_fine() -> None:
    env = LatentSteeringWrapper(scripted(7), Broken(np.zeros((1, 6)), np.full((1, 4, 2), 0.5)))
    obs, _ = env.reset()
    assert obs.dtype == np.float32
    np.testing.assert_array_equal(env.step(W)[4]["action_chunk"], np.full((3, 2), 0.5, np.float32))
