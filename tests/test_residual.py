"""Envs with a residual beside the noise: the layout of their actions, what is executed, who plays residual 0."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC
from stable_baselines3 import SAC
from stable_baselines3.common.env_checker import check_env

from sb3_dsrl import (
    BestOfM,
    FlowPolicy,
    LatentSteeringWrapper,
    NoiseSpace,
    collect_rollouts,
    evaluate,
    find_ticket,
    make_latent_env,
    steerability,
    without_residual,
)
from sb3_dsrl.evaluation import video
from sb3_dsrl.evaluation.play import play
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.steering.vec_env import find_steering
from tests.envs import FORMS, ScriptedEnv, scripted, tiny_flow
from tests.models import Record, shaken, small, steered

STEER_MODES = {"full": 4, "act_horizon": 3, "shared": 1}
SCALE = 0.3


def space(scale: float = SCALE, seed: int | None = None) -> NoiseSpace:
    return NoiseSpace((4, 2), Contract("hash", 3, 0.9, noise_bound=1.5, residual_scale=scale), seed)


# Layout


@pytest.mark.parametrize("convert", [np.asarray, th.from_numpy])
@pytest.mark.parametrize("batch", [(), (5,), (5, 2)])
def test_noise_comes_first(convert: Callable[[np.ndarray], Any], batch: tuple[int, ...]) -> None:
    action = convert(np.random.default_rng(0).standard_normal((*batch, 7, 2)).astype(np.float32))
    noise, residual = space().split(action)
    assert noise.shape == (*batch, 4, 2) and residual.shape == (*batch, 3, 2)
    flat = action.reshape(*batch, 14)
    np.testing.assert_array_equal(flat[..., :8], noise.reshape(*batch, 8))
    np.testing.assert_array_equal(flat[..., 8:], residual.reshape(*batch, 6))
    joined, alone = space().join(noise, residual), space().join(noise)
    assert type(joined) is type(alone) is type(action) and joined.dtype == alone.dtype == action.dtype
    np.testing.assert_array_equal(joined, action)
    np.testing.assert_array_equal(space().split(alone)[0], noise)
    assert not np.asarray(space().split(alone)[1]).any() and alone.shape == action.shape
    clipped = space().clip(10 * action)
    np.testing.assert_array_equal(clipped, np.clip(10 * np.asarray(action), space().low, space().high))


@pytest.mark.parametrize("convert", [np.asarray, th.from_numpy])
def test_without_a_residual_an_action_is_noise(convert: Callable[[np.ndarray], Any]) -> None:
    action = convert(np.ones((5, 4, 2), np.float32))
    noise, residual = space(0.0).split(action)
    assert noise.shape == (5, 4, 2) and residual.shape == (5, 0, 2)
    for joined in (space(0.0).join(noise), space(0.0).join(noise, residual), space(0.0).clip(action)):
        np.testing.assert_array_equal(joined, action)
    assert space(0.0).shape == space(0.0).noise_shape == space().noise_shape == (4, 2)


def test_bounds_and_samples() -> None:
    assert space().shape == (7, 2) and space().residual_rows == 3
    np.testing.assert_array_equal(space().high, np.repeat([1.5, 1.0], [4, 3])[:, None] * np.ones(2))
    np.testing.assert_array_equal(space().low, -space().high)
    own, other = space(seed=3), space(0.0, seed=3)
    for _ in range(5):
        sample = own.sample()
        assert own.contains(sample) and not sample[4:].any()
        np.testing.assert_array_equal(sample[:4], other.sample())  # the base policy's, draw for draw


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda space: pickle.loads(pickle.dumps(space))])
def test_space_round_trip(clone: Callable[[NoiseSpace], NoiseSpace]) -> None:
    assert clone(space()) == space() != space(0.2) and clone(space()).noise_shape == (4, 2)


def test_spaces_of_before_have_no_residual() -> None:
    old = space(0.0)
    del vars(old.contract)["residual_scale"]  # as in a file that was written by an older version
    old = pickle.loads(pickle.dumps(old))
    assert old == space(0.0) and old.residual_rows == 0 and old.contract.as_dict()["residual_scale"] == 0.0


# What is executed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steer_mode", STEER_MODES)
def test_chunk_is_decoded_noise_plus_scaled_residual(form: str, steer_mode: Any, flow: FlowPolicy) -> None:
    """Clipped as the action space is, and scaled to the env's own bounds after that; with the same unsteered tail."""
    rows, rng = STEER_MODES[steer_mode], np.random.default_rng(0)
    limits = dict(action_low=[-2.0, -1.0], action_high=[1.0, 3.0], episode_lengths=(100,))
    raw = [ScriptedEnv(**limits) for _ in range(2)]
    plain = FORMS[form](flow, [ScriptedEnv(**limits) for _ in range(2)], steer_mode=steer_mode)
    env = FORMS[form](flow, raw, steer_mode=steer_mode, residual_scale=0.8)
    assert env.action_space.shape == (rows + 3, 2) and env.action_space.noise_shape == plain.action_space.shape == (rows, 2)
    for each in (plain, env):
        each.seed(7)
        each.reset()
    noise, residual = rng.standard_normal((2, rows, 2)).astype(np.float32), rng.uniform(-1, 1, (2, 3, 2)).astype(np.float32)
    *_, plain_infos = plain.step(noise)
    *_, infos = env.step(np.concatenate([noise, residual], axis=1))
    clipped = 0
    for i, (with_it, without) in enumerate(zip(infos, plain_infos, strict=True)):
        free = without["action_chunk"] + 0.8 * residual[i]
        expected = np.clip(free, -1, 1)
        clipped += int((free != expected).sum())
        np.testing.assert_allclose(with_it["action_chunk"], expected, atol=1e-6)
        low, high = np.array(limits["action_low"]), np.array(limits["action_high"])
        np.testing.assert_allclose(raw[i].actions, low + (expected + 1) / 2 * (high - low), atol=1e-5)
    assert clipped


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [None, 0, 0.0])
def test_no_scale_is_the_env_of_before(form: str, scale: float | None, flow: FlowPolicy) -> None:
    env, plain = (FORMS[form](flow, [scripted(10)], **kwargs) for kwargs in (dict(residual_scale=scale), {}))
    assert env.action_space == plain.action_space and env.action_space.shape == (4, 2)


@pytest.mark.parametrize("actor", ["prior", "zero", "ticket"])
def test_controls_play_residual_0(actor: Any, flow: FlowPolicy) -> None:
    """To the bit what they play in an env without one."""
    if actor == "ticket":
        actor = np.random.default_rng(1).standard_normal((4, 2))
    rollouts = [collect_rollouts(actor, steered(flow, residual_scale=scale), 6, seed=3) for scale in (SCALE, 0.0)]
    for name in ("cond", "w", "chunk", "reward"):
        np.testing.assert_array_equal(*(getattr(each, name) for each in rollouts))
    assert rollouts[0].w.shape[1:] == (4, 2)
    assert evaluate(actor, steered(flow, residual_scale=SCALE), 6, name="") == evaluate(actor, steered(flow), 6, name="")
    if isinstance(actor, str):
        (step, *_) = play(actor, steered(flow, residual_scale=SCALE), 2)
        assert step.w.shape == (2, 7, 2) and not step.w[:, 4:].any()


def test_ticket_steerability_and_best_of_m(flow: FlowPolicy) -> None:
    """They search noise, and find what they find without a residual."""
    envs = [steered(flow, residual_scale=scale) for scale in (SCALE, 0.0)]
    tickets = [find_ticket(env, rounds=((5, 2), (2, 2)), seed=2) for env in envs]
    assert tickets[0].w.shape == (4, 2)
    np.testing.assert_array_equal(tickets[0].w, tickets[1].w)
    np.testing.assert_array_equal(tickets[0].first_round, tickets[1].first_round)
    trained = tiny_flow()
    assert trained.critic is not None
    trained.critic.updates += 1
    envs = [steered(trained, residual_scale=scale) for scale in (SCALE, 0.0)]
    best = [evaluate(BestOfM(env, n_candidates=3), env, 4, name="") for env in envs]
    assert best[0] == best[1]
    reports = [steerability(trained, env, episodes=60, n_tickets=2) for env in envs]
    assert str(reports[0]) == str(reports[1])


def test_noise_only(flow: FlowPolicy) -> None:
    """The noise of a policy with residual 0 is what an env without one would play; the policy itself is something else."""
    env = steered(flow, residual_scale=SCALE)
    model = shaken(small(env))
    rollouts = collect_rollouts(without_residual(model), env, 4, deterministic=True)
    both = collect_rollouts(model, env, 4, deterministic=True)
    np.testing.assert_allclose(rollouts.chunk, flow.executed(flow.decode(rollouts.cond, rollouts.w)), atol=1e-5)
    assert not np.allclose(both.chunk, flow.executed(flow.decode(both.cond, both.w)), atol=1e-2)
    for each in (rollouts, both):  # the noise is the policy's in either case
        wanted = model.predict(each.cond.numpy(), deterministic=True)[0]
        np.testing.assert_allclose(each.w, find_steering(env).action_space.split(wanted)[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"The model has residual_scale=0.3, but the env has 0.2"):
        evaluate(without_residual(model), steered(flow, residual_scale=0.2), 1)
    with pytest.raises(ValueError, match=r"LatentPolicy has no residual, it acts in NoiseSpace.*residual_scale="):
        without_residual(small(steered(flow)).policy)


def test_noise_only_leaves_the_models_own_env_behind(flow: FlowPolicy) -> None:
    """As after any evaluation in the training env, learning goes on from a reset."""
    model = small(steered(flow, residual_scale=SCALE)).learn(16)
    evaluate(without_residual(model), model.get_env(), 2)
    assert model._last_obs is None
    model.learn(16, reset_num_timesteps=False)


# Faults


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_scale_is_checked(form: str, scale: float, flow: FlowPolicy) -> None:
    with pytest.raises(ValueError, match=f"residual_scale must be 0 or positive, and finite, found {scale}"):
        FORMS[form](flow, [scripted()], residual_scale=scale)


@pytest.mark.parametrize("form", FORMS)
def test_bad_actions(form: str, flow: FlowPolicy) -> None:
    env = FORMS[form](flow, [scripted()], residual_scale=SCALE)
    env.reset()
    action = np.zeros((1, 7, 2), np.float32)
    action[0, 5] = np.nan
    with pytest.raises(ValueError, match="The residual is NaN or infinite: the policy that chose it has diverged"):
        env.step(action)
    action[0, 0] = np.inf
    with pytest.raises(ValueError, match="The noise to decode is NaN or infinite"):
        env.step(action)
    with pytest.raises(ValueError, match=r"Noise and residual must have shape \(N, ...\) = \(1, 7, 2\), found \(1, 4, 2\)"):
        find_steering(env).chunk(np.zeros((1, flow.cond_dim), np.float32), np.zeros((1, 4, 2), np.float32))


def test_other_scales_do_not_fit(flow: FlowPolicy) -> None:
    model = small(steered(flow, residual_scale=SCALE))
    for scale in (0.2, 0.0):
        other = steered(flow, residual_scale=scale)
        with pytest.raises(ValueError, match=rf"The model has residual_scale=0.3, but the env has {scale}"):
            evaluate(model, other, 1)
        with pytest.raises(ValueError, match=rf"The policy has residual_scale=0.3, but the model's env has {scale}"):
            model.policy.copy_into(small(other))
        with pytest.raises(ValueError, match="Action spaces do not match"):
            model.set_env(other)
    assert replace(model.policy.contract, residual_scale=SCALE * (1 + 1e-9)) != model.policy.contract
    assert not model.policy.contract.differences(replace(model.policy.contract, residual_scale=SCALE * (1 + 1e-9)))


# The rest of SB3, and ManiSkill


@pytest.mark.filterwarnings("ignore:(Your observation|We recommend you to use a symmetric)")
def test_check_env(flow: FlowPolicy) -> None:
    check_env(LatentSteeringWrapper(scripted(10), flow, residual_scale=SCALE))


@pytest.mark.parametrize("cls", [SAC, TQC])
def test_off_policy_algorithms_see_one_box(cls: Any, flow: FlowPolicy) -> None:
    """Their warm-up is the base policy, and afterwards they use the residual."""
    env, record = steered(flow, residual_scale=SCALE), Record()
    kwargs = dict(learning_starts=10, batch_size=4, seed=3, policy_kwargs=dict(net_arch=[16]), gamma=0.99**3)
    model = cls("MlpPolicy", env, **kwargs).learn(20, callback=record)
    residuals = np.abs(np.stack(record.actions)[..., 4:, :])
    assert residuals[:5].max() < 1e-6 and residuals[5:].min(axis=(1, 2, 3)).max() > 0.01
    assert model.predict(np.zeros((2, flow.cond_dim), np.float32))[0].shape == (2, 7, 2)
    evaluate(model, env, 2)


def test_maniskill() -> None:
    """make_latent_env passes the scale on, and a film is made with it."""
    flow = tiny_flow(35, 8, env_id="PushCube-v1", control_mode="pd_joint_delta_pos")
    env = make_latent_env("PushCube-v1", flow, max_episode_steps=6, residual_scale=SCALE, steer_mode="act_horizon", seed=0)
    assert env.action_space.shape == (3 + 3, 8) and env.steering.contract.residual_scale == SCALE
    camera = video._camera_env(env, 32, {})
    assert video._steered_alike(camera, env).action_space == env.action_space
    camera.close()
    model = shaken(small(env))
    assert evaluate(model, env, 1).episodes == 1
    env.close()
