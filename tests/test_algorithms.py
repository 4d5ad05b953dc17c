"""The steered envs among Stable-Baselines3's own algorithms, callbacks and wrappers."""

import copy
import pathlib
import warnings

import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_dsrl import ActionChunkWrapper, LatentPolicy, LatentSteeringWrapper
from tests.envs import FORMS, gym_steered, scripted
from tests.models import N_STEPS, ON_POLICY, Record, features, small, steered, weights


def test_check_env(flow):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Your observation|We recommend you to use a symmetric)")  # 2-D Boxes
        check_env(ActionChunkWrapper(scripted(10), act_horizon=3, obs_horizon=2))
        check_env(LatentSteeringWrapper(scripted(10), flow))
        check_env(LatentSteeringWrapper(scripted(10), flow, steer_mode="act_horizon"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", ON_POLICY.values())
def test_on_policy_algorithms_learn(cls, form: str, flow):
    before = weights(flow)
    model = small(steered(flow, form=form), cls)
    assert isinstance(model.policy, LatentPolicy)
    start = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(4 * N_STEPS)
    assert model.num_timesteps == 4 * N_STEPS
    for part in ("action_net", "value_net"):
        assert any(part in name and not th.equal(value, start[name]) for name, value in model.policy.named_parameters()), part
    assert all(value.isfinite().all() for value in model.policy.parameters())
    assert weights(flow) == before and not flow.training
    assert all(not p.requires_grad and p.grad is None for p in flow.parameters())
    assert flow.fingerprint() == model.policy.contract.flow_hash


@pytest.mark.parametrize("cls", [SAC, TQC])
def test_off_policy_warm_up_is_the_prior(cls, flow):
    env = gym_steered(flow, [scripted(10)])
    model = cls("MlpPolicy", env, learning_starts=10, batch_size=4, seed=3, policy_kwargs=dict(net_arch=[16]), gamma=0.99**3)
    space = copy.deepcopy(env.action_space)
    space.seed(3)
    record = Record()
    model.learn(14, callback=record)
    prior = np.stack([space.sample() for _ in range(14)])
    executed = np.stack(record.actions)[:, 0]
    np.testing.assert_allclose(executed[:10], prior[:10], atol=1e-5)
    assert not np.allclose(executed[10:], prior[10:])


@pytest.mark.parametrize("form", FORMS)
def test_seeds(form: str, flow):
    def rollout(seed: int) -> tuple[np.ndarray, np.ndarray]:
        record = Record()
        small(steered(flow, form=form, steer_mode="act_horizon"), seed=seed).learn(4 * N_STEPS, callback=record)
        return np.stack(record.obs), np.stack(record.actions)

    first, again, other = rollout(0), rollout(0), rollout(1)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.allclose(first[0], other[0]) and not np.allclose(first[1], other[1])


def test_callbacks_monitor_progress_bar_and_tensorboard(tmp_path: pathlib.Path, flow):
    env = VecMonitor(steered(flow), str(tmp_path / "train"))
    eval_env = VecMonitor(steered(flow))
    callbacks = [
        EvalCallback(
            eval_env, eval_freq=4, n_eval_episodes=2, best_model_save_path=str(tmp_path), log_path=str(tmp_path), verbose=0
        ),
        CheckpointCallback(save_freq=N_STEPS, save_path=str(tmp_path), name_prefix="step"),
    ]
    model = small(env, tensorboard_log=str(tmp_path / "tb"))
    model.learn(4 * N_STEPS, callback=callbacks, progress_bar=True)
    assert (tmp_path / "best_model.zip").exists() and (tmp_path / "train.monitor.csv").stat().st_size > 50
    assert {path.name for path in tmp_path.glob("step*")} == {"step_16_steps.zip", "step_32_steps.zip"}
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["results"].shape == (4, 2) and evaluations["successes"].shape == (4, 2)
    assert PPO.load(tmp_path / "best_model", env=env).policy.contract.flow_hash == flow.fingerprint()
    assert list((tmp_path / "tb").glob("PPO_1/events*"))


def test_success_rate_is_logged(tmp_path: pathlib.Path, flow):
    model = small(steered(flow))  # the first env succeeds in every episode, the second in none
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(2 * N_STEPS)
    header, row = (tmp_path / "progress.csv").read_text().splitlines()[:2]
    logged = dict(zip(header.split(","), row.split(","), strict=True))
    buffer = model.rollout_buffer
    ended = [int(buffer.episode_starts[1:, i].sum() + model._last_episode_starts[i]) for i in range(2)]
    assert float(logged["rollout/success_rate"]) == pytest.approx(ended[0] / sum(ended))
    assert 1 <= float(logged["rollout/ep_len_mean"]) <= 4  # macro-steps: episodes of up to 11 env steps, H = 3


@pytest.mark.parametrize("form", FORMS)
def test_vec_normalize(form: str, tmp_path: pathlib.Path, flow):
    env = VecNormalize(steered(flow, form=form), gamma=0.99**3)
    model = small(env).learn(4 * N_STEPS)
    assert not np.allclose(env.obs_rms.mean, 0) and model.policy.contract.flow_hash == flow.fingerprint()
    env.save(tmp_path / "stats.pkl")
    model.save(tmp_path / "model")
    again = VecNormalize.load(tmp_path / "stats.pkl", steered(flow, form=form))
    obs = features(3).numpy()
    np.testing.assert_array_equal(again.normalize_obs(obs), env.normalize_obs(obs))
    PPO.load(tmp_path / "model", env=again).learn(2 * N_STEPS)


def test_evaluate_policy(flow):
    model = small(steered(flow))
    returns, lengths = evaluate_policy(model, VecMonitor(steered(flow)), n_eval_episodes=4, return_episode_rewards=True)
    assert len(returns) == len(lengths) == 4
