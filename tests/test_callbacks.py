"""The learning curve that SuccessEvalCallback keeps, and the models that it saves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from sb3_dsrl import LatentSteeringWrapper, SuccessEvalCallback, evaluate, ppo_kwargs
from tests.envs import scripted, tiny_flow, vec_steered


def steered() -> VecEnv:
    envs = [scripted(20, episode_lengths=(100,), success_steps=range(15, 30), random_start=True) for _ in range(2)]
    return vec_steered(tiny_flow(), envs, ignore_terminations=True)


@pytest.mark.parametrize("stochastic", [False, True])
def test_learning_curve(tmp_path: Path, stochastic: bool) -> None:
    env, eval_env = steered(), steered()
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=8, n_epochs=1, seed=0))
    callback = SuccessEvalCallback(
        eval_env, eval_freq=90, n_eval_episodes=4, stochastic=stochastic, save_path=tmp_path, env_steps=1000
    )
    model.learn(8 * 2 * 5, callback)
    # a rollout is 8 macro-steps of 3 env steps in 2 envs: 48; measured at the start, after every second one, at the end
    assert [steps for steps, *_ in callback.history] == [1000, 1096, 1192, 1240]
    assert callback.env_steps == 1240 and callback.env_steps_per_second > 0
    for _, mean, sampled in callback.history:
        assert mean.episodes == 4 and mean.success_at_end == 1.0
        assert (sampled is not None) == stochastic
    assert {path.name for path in tmp_path.iterdir()} == {"latest.zip", "best_success_at_end.zip", "best_success_once.zip"}
    latest = PPO.load(tmp_path / "latest.zip", env=eval_env)
    for ours, theirs in zip(latest.policy.parameters(), model.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


def test_evaluation_uses_the_statistics_of_training() -> None:
    env, eval_env = VecNormalize(steered()), VecNormalize(steered(), training=False, norm_reward=False)
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=8, n_epochs=1, seed=0))
    model.learn(16, SuccessEvalCallback(eval_env, n_eval_episodes=2))
    assert env.obs_rms.count > 16
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
    with pytest.raises(ValueError, match="The training env is wrapped in VecNormalize, eval_env is not"):
        model.learn(16, SuccessEvalCallback(steered(), n_eval_episodes=2))


def test_best_model_is_the_first_of_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = steered()
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=8, n_epochs=1, seed=0))
    scores = iter([0.25, 0.75, 0.75, 0.5])
    saved: list[Any] = []

    def scored(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        result.success_at_end = next(scores)
        return result

    monkeypatch.setattr("sb3_dsrl.stage2.callbacks.evaluate", scored)
    monkeypatch.setattr(SuccessEvalCallback, "_save", lambda self, name: saved.append((model.num_timesteps, name)))
    model.learn(8 * 2 * 2, SuccessEvalCallback(steered(), eval_freq=1, n_eval_episodes=2, save_path=tmp_path))
    assert [steps for steps, name in saved if name == "best_success_at_end"] == [0, 16]
    assert [steps for steps, name in saved if name == "latest"] == [0, 16, 32, 32]


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_the_training_env_is_refused(wrap: Any) -> None:
    env = steered()
    model = PPO("LatentPolicy", wrap(env), **ppo_kwargs(env, n_steps=8))
    with pytest.raises(ValueError, match="eval_env is the training env: "):
        model.learn(16, SuccessEvalCallback(VecMonitor(env), n_eval_episodes=2))


def test_the_training_env_in_gym_form_is_refused() -> None:
    env = LatentSteeringWrapper(scripted(20), tiny_flow())
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8))
    with pytest.raises(ValueError, match="eval_env is the training env: "):
        model.learn(16, SuccessEvalCallback(env, n_eval_episodes=2))


def test_a_finished_run_is_not_measured_again() -> None:
    env = steered()
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8))
    callback = SuccessEvalCallback(steered(), n_eval_episodes=2)
    model.learn(16, callback)
    before = list(callback.history)
    model.learn(0, callback, reset_num_timesteps=False)
    assert callback.history == before
