"""LatentPolicy: the prior at first, the mixture while it collects, copied and refused."""

import math
import re
import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from torch import nn

from tests.envs import tiny_flow
from tests.models import N_STEPS, Record, features, learning_rates, shaken, small, steered


@pytest.mark.parametrize("prior_mix", [0.0, 0.3, 1.0])
def test_ratio_is_one_before_the_first_update(prior_mix: float, env):
    model = shaken(small(env, policy_kwargs=dict(prior_mix=prior_mix, centre=np.full((4, 2), 0.5))))
    _, callback = model._setup_learn(2 * N_STEPS)
    callback.on_training_start({}, {})
    model.collect_rollouts(env, callback, model.rollout_buffer, N_STEPS)
    model.policy.set_training_mode(True)  # as train() does
    (batch,) = model.rollout_buffer.get()
    _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    ratio = th.exp(log_prob - batch.old_log_prob)
    np.testing.assert_allclose(ratio.detach(), 1.0, atol=1e-5)
    alone = model.policy.log_prob(batch.observations, batch.actions.reshape(-1, 4, 2))
    assert th.allclose(alone, batch.old_log_prob, atol=1e-3) == (prior_mix == 0.0)  # it is the mixture's density


def test_prior_mix_decays_once_between_update_and_rollout(flow):
    env = steered(flow)
    model = small(env, policy_kwargs=dict(prior_mix=0.4, prior_mix_decay=0.5))
    during_update = []
    evaluate_actions = model.policy.evaluate_actions
    model.policy.evaluate_actions = lambda *args: (
        during_update.append(float(model.policy.prior_mix)),
        evaluate_actions(*args),
    )[1]
    record = Record()
    evaluation = EvalCallback(steered(flow), eval_freq=3, n_eval_episodes=1, verbose=0, warn=False)
    model.learn(3 * 2 * N_STEPS, callback=[evaluation, record])
    assert record.prior_mix == [{0.4}, {0.2}, {0.1}]
    assert during_update == [0.4] * 10 + [0.2] * 10 + [0.1] * 10
    for _ in range(3):
        model.predict(features(2).numpy())
    assert float(model.policy.prior_mix) == pytest.approx(0.05)


def test_rollouts_mix_the_prior_and_predict_does_not(env):
    model = small(env, policy_kwargs=dict(prior_mix=0.25, centre=np.full((4, 2), 3.0), log_std_init=-5.0))
    obs = features(4000)
    th.manual_seed(0)
    with th.no_grad():
        collected = model.policy(obs)[0].reshape(4000, 8)
        predicted = model.policy.sample(obs).reshape(4000, 8)
    from_prior = (collected.mean(dim=1) - 3.0).abs() > 0.5
    assert from_prior.float().mean() == pytest.approx(0.25, abs=0.03)
    assert collected[from_prior].mean().abs() < 0.05 and abs(collected[from_prior].std() - 1) < 0.03
    assert (predicted - 3.0).abs().max() < 0.1
    assert th.equal(model.policy.sample(obs[:2], deterministic=True), th.full((2, 4, 2), 3.0))


def test_fresh_policy_is_the_prior_for_any_observation(env):
    policy = small(env).policy
    obs = 1e3 * features(50)
    normal = policy.pi(obs).distribution
    assert th.equal(normal.mean, th.zeros(50, 8)) and th.equal(normal.stddev, th.ones(50, 8))
    assert th.equal(policy.kl_to_prior(obs), th.zeros(50))
    w = th.randn(50, 4, 2)
    expected = -0.5 * (w.pow(2).sum(dim=(1, 2)) + 8 * math.log(2 * math.pi))
    th.testing.assert_close(policy.log_prob(obs, w), expected)
    _, log_prob, entropy = policy.evaluate_actions(obs, w.flatten(1))
    th.testing.assert_close(log_prob, expected)
    th.testing.assert_close(entropy, th.full((50,), 4 * math.log(2 * math.pi * math.e)))


def test_std_depends_on_the_observation(env):
    normal = shaken(small(env)).policy.pi(features(2)).distribution
    assert not th.allclose(normal.stddev[0], normal.stddev[1]) and not th.allclose(normal.mean[0], normal.mean[1])


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(prior_mix=1.5), r"prior_mix must lie in \[0, 1\], found 1.5"),
        (dict(prior_mix_decay=-0.1), r"prior_mix_decay must lie in \[0, 1\], found -0.1"),
        (dict(value_lr=0.0), "value_lr must be positive, found 0.0"),
        (dict(centre=np.zeros((3, 2))), r"centre must have the noise's shape \(4, 2\), found \(3, 2\)"),
    ],
)
def test_policy_refuses(kwargs: dict, sentence: str, env):
    with pytest.raises(ValueError, match=sentence):
        small(env, policy_kwargs=kwargs)


def test_copy_into_copies_the_policy_and_nothing_else(env):
    source = shaken(small(env, policy_kwargs=dict(prior_mix=0.1, value_lr=1e-4, centre=np.full((4, 2), 0.7)))).policy
    target = small(env, policy_kwargs=dict(prior_mix=0.5, value_lr=2e-3), learning_rate=1e-3)
    source.copy_into(target)
    obs = features(5)
    assert th.equal(source.sample(obs, deterministic=True), target.policy.sample(obs, deterministic=True))
    assert float(target.policy.prior_mix) == 0.5
    assert learning_rates(target) == pytest.approx([1e-3, 2e-3], rel=0.01)
    target.learn(2 * N_STEPS)  # the source does not learn with it
    assert not th.equal(source.sample(obs, deterministic=True), target.policy.sample(obs, deterministic=True))


def test_copy_into_refuses(env, flow):
    policy, other = small(env).policy, tiny_flow(seed=1)
    hashes = f"The policy has flow='{flow.fingerprint()}', but the model's env has '{other.fingerprint()}'"
    with pytest.raises(ValueError, match=hashes):
        policy.copy_into(small(steered(other)))
    with pytest.raises(ValueError, match=re.escape("The model's net_arch is [8], but this policy's is [16]")):
        policy.copy_into(small(env, policy_kwargs=dict(net_arch=[8])))
    with pytest.raises(ValueError, match=r"The model's activation_fn is .*ReLU.*, but this policy's is .*Tanh"):
        policy.copy_into(small(env, policy_kwargs=dict(activation_fn=nn.ReLU)))
    with pytest.raises(ValueError, match="The policy has steer_mode='full', but the model's env has 'act_horizon'"):
        policy.copy_into(small(steered(flow, steer_mode="act_horizon")))
    with pytest.raises(ValueError, match="expects a model with 'LatentPolicy', found ActorCriticPolicy"):
        policy.copy_into(PPO("MlpPolicy", env, gamma=0.99**3, n_steps=N_STEPS, batch_size=2 * N_STEPS))


def test_unsteered_envs_are_warned_about():
    """Fault o: nothing would be steered, and nothing would say so."""
    sentence = r"acts in Box\(-2.0, 2.0, \(1,\).*nothing is steered.*LatentSteeringWrapper.*make_latent_env"
    with pytest.warns(UserWarning, match=sentence):
        PPO("LatentPolicy", "Pendulum-v1", n_steps=4, batch_size=4)
    with pytest.raises(ValueError, match=r"needs flow noise, a Box of shape \(T, A\), as action space, found Discrete\(2\)"):
        PPO("LatentPolicy", "CartPole-v1", n_steps=4, batch_size=4)


def test_steered_envs_are_not_warned_about(env, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing is steered")
        model = small(env)
        model.save(tmp_path / "model")
        PPO.load(tmp_path / "model")
