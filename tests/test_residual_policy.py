"""LatentPolicy with a residual: the joint density, what it starts from, what each stage trains, files, and what it reaches."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from scipy.stats import norm
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    Gate,
    LatentPolicy,
    LatentSteeringWrapper,
    ResumeCallback,
    SteeredPolicy,
    VecLatentSteering,
    collect_rollouts,
    evaluate,
    ppo_kwargs,
    pretrain_latent,
    resume,
    without_residual,
)
from sb3_dsrl.stage2.distributions import PriorMixtureDistribution
from tests import stage2
from tests.bandit import BEST, TargetCritic, bandit_demos, bandit_flow
from tests.envs import FORMS, ScriptedEnv, gym_steered, scripted, tiny_flow
from tests.models import N_STEPS, ON_POLICY, features, shaken, small, steered, weights
from tests.toys import BanditEnv

SCALE = 0.3


def residual_model(flow: FlowPolicy, steer_mode: Any = "full", **policy_kwargs: Any) -> PPO:
    return small(steered(flow, residual_scale=SCALE, steer_mode=steer_mode), policy_kwargs=policy_kwargs)


# Density


@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
def test_joint_density_equals_brute_force(eps: float) -> None:
    """Two entries of noise, three of a residual; the prior knows the noise only."""
    rng = np.random.default_rng(0)
    mean, std, action = rng.normal(size=(6, 5)), rng.uniform(0.2, 2.0, (6, 5)), rng.normal(size=(6, 5))
    distribution = PriorMixtureDistribution(5, noise_dim=2)
    distribution.proba_distribution(th.from_numpy(mean), th.from_numpy(np.log(std)), eps)
    pi = norm.pdf(action, mean, std)
    expected = (eps * norm.pdf(action[:, :2]).prod(axis=1) + (1 - eps) * pi[:, :2].prod(axis=1)) * pi[:, 2:].prod(axis=1)
    np.testing.assert_allclose(distribution.log_prob(th.from_numpy(action)).exp(), expected, rtol=1e-6)
    np.testing.assert_allclose(distribution.policy_log_prob(th.from_numpy(action)).exp(), pi.prod(axis=1), rtol=1e-6)
    np.testing.assert_allclose(distribution.entropy(), (0.5 * np.log(2 * np.pi * np.e) + np.log(std)).sum(axis=1), rtol=1e-6)
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std))[:, :2].sum(axis=1)
    np.testing.assert_allclose(distribution.kl_to_prior(), kl, rtol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
def test_joint_density_integrates_to_one(eps: float) -> None:
    axis = th.linspace(-9, 9, 901, dtype=th.float64)
    action = th.cartesian_prod(axis, axis)
    mean, log_std = th.tensor([1.0, -0.5]).double(), th.tensor([0.5, 0.2]).double().log()
    distribution = PriorMixtureDistribution(2, noise_dim=1)
    distribution.proba_distribution(mean.expand(len(action), -1), log_std.expand(len(action), -1), eps)
    density = distribution.log_prob(action).exp().reshape(901, 901)
    assert th.trapezoid(th.trapezoid(density, axis), axis).item() == pytest.approx(1.0, abs=1e-6)


def test_samples_mix_the_prior_into_the_noise_only() -> None:
    """Also where noise is the prior's, its residual is pi's: so the two are independent."""
    th.manual_seed(0)
    n, eps = 20_000, 0.3
    mean, log_std = th.tensor([50.0, 50.0, 3.0]), th.tensor([1.0, 1.0, 0.1]).log()
    distribution = PriorMixtureDistribution(3, noise_dim=2).proba_distribution(mean.expand(n, -1), log_std.expand(n, -1), eps)
    actions = distribution.sample()
    from_prior = actions[:, 0] < 25
    assert th.equal(from_prior, actions[:, 1] < 25)
    assert from_prior.float().mean().item() == pytest.approx(eps, abs=4 * math.sqrt(eps * (1 - eps) / n))
    for rows in (from_prior, ~from_prior):
        assert actions[rows, 2].mean().item() == pytest.approx(3.0, abs=0.01)
        assert actions[rows, 2].std().item() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("steer_mode", ["full", "act_horizon", "shared"])
@pytest.mark.parametrize("prior_mix", [0.0, 0.3, 1.0])
def test_ratio_is_one_before_the_first_update(steer_mode: Any, prior_mix: float, flow: FlowPolicy) -> None:
    model = shaken(residual_model(flow, steer_mode, prior_mix=prior_mix))
    _, callback = model._setup_learn(2 * N_STEPS)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model.policy.set_training_mode(True)  # as train() does
    (batch,) = model.rollout_buffer.get()
    _, log_prob, entropy = model.policy.evaluate_actions(batch.observations, batch.actions)
    np.testing.assert_allclose(th.exp(log_prob - batch.old_log_prob).detach(), 1.0, atol=1e-5)
    # by hand: the noise's mixture times the residual's Gaussian
    normal = model.policy.pi(batch.observations).distribution
    mean, std, action = (x.detach().double().numpy() for x in (normal.mean, normal.stddev, batch.actions))
    n = action.shape[1] - 6  # 3 x 2 of the residual come last
    log_pi, log_prior = norm.logpdf(action, mean, std), norm.logpdf(action[:, :n]).sum(axis=1)
    with np.errstate(divide="ignore"):
        mixture = np.logaddexp(np.log(prior_mix) + log_prior, np.log(1 - prior_mix) + log_pi[:, :n].sum(axis=1))
    np.testing.assert_allclose(batch.old_log_prob, mixture + log_pi[:, n:].sum(axis=1), rtol=1e-4, atol=1e-3)
    th.testing.assert_close(entropy, normal.entropy().sum(dim=1))


def test_log_prob_of_noise_and_of_actions(flow: FlowPolicy) -> None:
    policy = shaken(residual_model(flow)).policy
    obs, action = features(5), th.randn(5, 7, 2)
    normal = policy.pi(obs).distribution
    each = normal.log_prob(action.flatten(1))
    th.testing.assert_close(policy.log_prob(obs, action), each.sum(dim=1))
    th.testing.assert_close(policy.log_prob(obs, action[:, :4]), each[:, :8].sum(dim=1))
    many = th.randn(5, 9, 4, 2)
    th.testing.assert_close(policy.log_prob(obs, many)[:, 3], policy.log_prob(obs, many[:, 3]))
    with pytest.raises(ValueError, match="w must hold the 8 entries of a noise or the 14 of an action, found 10"):
        policy.log_prob(obs, th.zeros(5, 5, 2))


# Step 0


@pytest.mark.parametrize("steer_mode", ["full", "act_horizon", "shared"])
def test_a_new_policy_is_the_steered_one(steer_mode: Any, flow: FlowPolicy) -> None:
    """By its mean, around a centre as well; its residual explores gently."""
    rows = dict(full=4, act_horizon=3, shared=1)[steer_mode]
    centre = np.full((rows, 2), 0.7)
    model = residual_model(flow, steer_mode, centre=centre, log_std_init=-1.0)
    obs = 1e3 * features(50)
    normal = model.policy.pi(obs).distribution
    expected_mean = th.tensor([0.7] * (2 * rows) + [0.0] * 6)
    expected_std = th.tensor([math.exp(-1.0)] * (2 * rows) + [0.1] * 6)
    assert th.equal(normal.mean, expected_mean.expand(50, -1))
    th.testing.assert_close(normal.stddev, expected_std.expand(50, -1))
    ours = collect_rollouts(model, model.get_env(), 4, seed=1, deterministic=True)
    plain = small(steered(flow, steer_mode=steer_mode), policy_kwargs=dict(centre=centre))
    theirs = collect_rollouts(plain, plain.get_env(), 4, seed=1, deterministic=True)
    for name in ("cond", "w", "chunk", "reward"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_a_std_of_its_own(flow: FlowPolicy) -> None:
    policy = residual_model(flow, residual_log_std_init=-2.5).policy
    th.testing.assert_close(policy.log_std.detach(), th.tensor([0.0] * 8 + [-2.5] * 6))
    with pytest.raises(ValueError, match="residual_log_std_init must be finite, found nan: a std is positive"):
        residual_model(flow, residual_log_std_init=math.nan)
    with pytest.raises(ValueError, match=r"residual_log_std_init=-1.0 was given, but the env has no residual"):
        small(steered(flow), policy_kwargs=dict(residual_log_std_init=-1.0))
    with pytest.raises(ValueError, match=r"centre must have the noise's shape \(4, 2\), found \(7, 2\)"):
        residual_model(flow, centre=np.zeros((7, 2)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", ON_POLICY.values())
def test_on_policy_algorithms_learn_both_parts(cls: Any, form: str, flow: FlowPolicy) -> None:
    before = weights(flow)
    model = small(steered(flow, form=form, residual_scale=SCALE), cls).learn(4 * N_STEPS)
    mean, log_std = model.policy.action_net.weight.chunk(2)
    assert all(part.abs().max() > 0 for part in (mean[:8], mean[8:], log_std[:8], log_std[8:]))
    assert weights(flow) == before


# Stage 1


@pytest.mark.parametrize("weighting", ["executed", "candidates"])
def test_stage_1_trains_the_noise_alone(weighting: Any) -> None:
    """It finds the bandit's best noise and leaves the residual as it was."""
    flow = bandit_flow(TargetCritic())
    env = bandit(flow, BEST / 4, residual_scale=SCALE)
    model = PPO("LatentPolicy", env, n_steps=16, batch_size=32, policy_kwargs=SMALL, seed=1, gamma=env.macro_gamma)
    data: dict[str, Any] = dict(demos=bandit_demos())
    if weighting == "executed":
        data = dict(rollouts=collect_rollouts("prior", env, 2_000, seed=0))
    settings = dict(learning_rate=1e-2, n_iterations=200, batch_size=64, seed=0)
    gate = Gate(env, 16) if weighting == "executed" else None
    pretrain_latent(model, **data, weighting=weighting, gate=gate, **settings)
    obs = th.randn(200, 2)
    normal = model.policy.pi(obs).distribution
    mean = normal.mean.detach().mean(dim=0)
    assert np.square(mean[:2].numpy() - BEST).sum() < 0.6 * np.square(BEST).sum()
    assert not normal.mean[:, 2:].any()
    th.testing.assert_close(normal.stddev[:, 2:], th.full((200, 2), 0.1))
    if weighting == "executed":  # a flow gets a policy for the env that its rollouts are from
        policy = pretrain_latent(flow, **data, policy_kwargs=SMALL, n_iterations=2)
        assert policy.action_space == env.action_space
        policy.copy_into(model)


def test_warm_start_of_the_value() -> None:
    flow = bandit_flow(TargetCritic())
    env = bandit(flow, BEST / 4, residual_scale=SCALE)
    model = PPO("LatentPolicy", env, n_steps=16, batch_size=32, policy_kwargs=SMALL, seed=1, gamma=env.macro_gamma)
    pretrain_latent(model, demos=bandit_demos(), n_iterations=20, warm_start_value=True, seed=0)
    assert model.policy.predict_values(th.zeros(1, 2)).item() < 0


def test_rollouts_of_another_scale_are_refused(flow: FlowPolicy) -> None:
    rollouts = collect_rollouts("prior", steered(flow), 2)
    with pytest.raises(ValueError, match=r"The rollouts have residual_scale=0.0, but the model's env has 0.3"):
        pretrain_latent(residual_model(flow), rollouts=rollouts, n_iterations=1)


# Files


def test_save_load_and_go_on(flow: FlowPolicy, tmp_path: Path) -> None:
    model = residual_model(flow, residual_log_std_init=-1.5, prior_mix=0.2).learn(4 * N_STEPS)
    obs = features(5).numpy()
    before = model.predict(obs, deterministic=True)[0]
    assert before.shape == (5, 7, 2) and np.abs(before[:, 4:]).max() > 1e-4
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = PPO.load(tmp_path / "model", env=steered(flow, residual_scale=SCALE))
    policy = LatentPolicy.load(tmp_path / "policy", device="cpu")
    assert policy._get_constructor_parameters()["residual_log_std_init"] == -1.5
    assert policy.action_space == model.action_space and policy.action_space.noise_shape == (4, 2)
    assert weights(policy) == weights(model.policy) == weights(loaded.policy) == weights(policy.copy())
    for each in (loaded, policy):
        np.testing.assert_array_equal(each.predict(obs, deterministic=True)[0], before)
    loaded.learn(2 * N_STEPS, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        PPO.load(tmp_path / "model", env=steered(flow, residual_scale=0.2))
    target = residual_model(flow)
    policy.copy_into(target)
    np.testing.assert_array_equal(target.predict(obs, deterministic=True)[0], before)


class Crash(BaseCallback):
    """In the middle of the last rollout but three."""

    def _on_step(self) -> bool:
        if self.num_timesteps == 72:
            raise KeyboardInterrupt
        return True


def test_a_resumed_run_is_the_uninterrupted_one(flow: FlowPolicy, tmp_path: Path) -> None:
    def run(path: Path, *crash: BaseCallback) -> PPO:
        env = stage2.steered(flow, residual_scale=SCALE)
        model = resume(PPO, path, env) or PPO("LatentPolicy", env, **ppo_kwargs(env, **stage2.KWARGS))
        fresh = model.num_timesteps == 0
        return model.learn(stage2.TOTAL - model.num_timesteps, [ResumeCallback(path, 80), *crash], reset_num_timesteps=fresh)

    expected = run(tmp_path / "whole.zip")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.zip", Crash())
    resumed = run(tmp_path / "cut.zip")
    assert stage2.bits(resumed.policy) == stage2.bits(expected.policy)
    assert resumed.num_timesteps == stage2.TOTAL


@pytest.mark.parametrize("steer_mode", ["full", "act_horizon", "shared"])
def test_a_steered_policy_acts_as_the_model(steer_mode: Any, flow: FlowPolicy, tmp_path: Path) -> None:
    """To the bit, from its folder, with noise and residual that are clipped."""
    kwargs: dict[str, Any] = dict(steer_mode=steer_mode, noise_bound=0.1, residual_scale=0.8)
    model = shaken(small(gym_steered(flow, [scripted()], **kwargs)))
    with th.no_grad():
        model.policy.action_net.bias[: model.policy.action_dist.action_dim] += 0.9  # beyond the bounds in places
    raw = ScriptedEnv(episode_lengths=(100,), random_start=True)
    env = LatentSteeringWrapper(raw, flow, **kwargs)
    obs, _ = env.reset(seed=0)
    for _ in range(4):
        action = model.predict(obs, deterministic=True)[0]
        obs, *_ = env.step(action)
    assert (np.abs(action) == env.action_space.high).any() and (np.abs(action) < env.action_space.high).any()
    SteeredPolicy.of(model).save_pretrained(tmp_path)
    policy = SteeredPolicy.from_pretrained(tmp_path, device="cpu")
    assert policy.contract == model.action_space.contract
    policy.reset(seed=0)
    alone = ScriptedEnv(episode_lengths=(100,), random_start=True)
    frame, _ = alone.reset(seed=0)
    for _ in range(4 * 3):
        frame, *_ = alone.step(policy.select_action(frame))
    np.testing.assert_array_equal(alone.actions, raw.actions)
    played = [evaluate(each, steered(flow, **kwargs), 4, name="") for each in (policy, model)]
    noise_only = [evaluate(without_residual(each), steered(flow, **kwargs), 4, name="") for each in (policy, model)]
    assert played[0] == played[1] != noise_only[0] == noise_only[1]
    chunk, action, log_prob = policy.sample(np.zeros((5, 2, 3), np.float32))
    assert action.shape == (5, *env.action_space.shape) and chunk.abs().max() <= 1
    cond = flow.encode(np.zeros((5, 2, 3), np.float32))
    th.testing.assert_close(log_prob, policy.latent.log_prob(cond, action).detach())


def test_policy_files_of_before_are_read(tmp_path: Path) -> None:
    """They say nothing of residuals."""
    policy = small(steered(tiny_flow())).policy
    config = policy.config()
    del config["residual_log_std_init"], config["action_space"]["contract"]["residual_scale"]
    policy.config = lambda: config  # type: ignore[method-assign]
    policy.save(tmp_path / "policy")
    loaded = LatentPolicy.load(tmp_path / "policy", device="cpu")
    assert loaded.action_space == policy.action_space and weights(loaded) == weights(policy)


# What it is for

SMALL = dict(net_arch=dict(pi=[32], vf=[32]))
#: The flow divides noise by 4, and noise within its bound of 1 becomes actions up to 0.25.
FAR = np.array([0.6, -0.55], np.float32)


def bandit(flow: FlowPolicy, target: np.ndarray, **kwargs: Any) -> VecEnv:
    env = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(target), 1)] * 8), flow, **kwargs)
    env.seed(0)
    return env


def test_a_residual_reaches_what_noise_cannot() -> None:
    nearest = float(np.square(np.abs(FAR) - 0.25).sum())
    returns = {}
    for scale in (0.0, 0.5):
        env = bandit(bandit_flow(), FAR, noise_bound=1.0, residual_scale=scale)
        kwargs = ppo_kwargs(env, n_steps=32, batch_size=64, learning_rate=1e-2, policy_kwargs=SMALL, seed=0, device="cpu")
        model = PPO("LatentPolicy", env, **kwargs)
        start = evaluate(model, env, 16).mean_return
        assert start == pytest.approx(-np.square(FAR).sum(), abs=1e-5)  # w = 0 and residual 0
        model.learn(8 * 32 * 30)
        returns[scale] = evaluate(model, env, 16).mean_return
    assert returns[0.0] <= -nearest + 1e-6  # whatever it learned
    assert returns[0.5] > -0.15 * nearest
    noise_only = evaluate(without_residual(model), env, 16).mean_return
    assert start < noise_only <= -nearest + 1e-6 < returns[0.5]  # the gain in two parts
