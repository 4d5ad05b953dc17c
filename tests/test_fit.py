"""What the two weightings of stage 1 do with flow, model and data."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_dsrl import FlowPolicy, LatentPolicy, Rollouts, collect_rollouts, pretrain_latent, train_critic
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.steering.vec_env import find_steering
from tests.bandit import (
    BEST,
    FAST,
    QUICK,
    SMALL,
    TargetCritic,
    bandit_demos,
    bandit_env,
    bandit_flow,
    bandit_model,
    bandit_rollouts,
    data_for,
    mean_noise,
)
from tests.envs import FORMS, scripted, tiny_flow
from tests.stage0 import scalars


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return bandit_rollouts()


@pytest.mark.parametrize("weighting", ["candidates", "executed"])
def test_model_in_place(rollouts: Rollouts, weighting: Any) -> None:
    flow = bandit_flow(TargetCritic())
    model = bandit_model(flow)
    model.learn(128)  # so that the optimiser has a state
    optimizer = model.policy.optimizer
    before, weights = deepcopy(optimizer.state_dict()), deepcopy(model.policy.state_dict())
    prior_mix, mean, fingerprint = float(model.policy.prior_mix), mean_noise(model.policy), flow.fingerprint()
    kwargs = {key: value for key, value in FAST.items() if key != "policy_kwargs"}
    found = pretrain_latent(model, **data_for(weighting, rollouts), weighting=weighting, beta=0.3, **kwargs)
    assert found is model.policy and model.policy.optimizer is optimizer and not found.training
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and before["state"]
    for key, state in before["state"].items():
        assert all(th.equal(th.as_tensor(value), th.as_tensor(after["state"][key][name])) for name, value in state.items())
    assert float(model.policy.prior_mix) == prior_mix
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, weights[name]) or "policy_net" in name or "action_net" in name, name
    assert np.linalg.norm(mean_noise(found) - BEST) < 0.5 * np.linalg.norm(mean - BEST)
    assert flow.fingerprint() == fingerprint
    model.learn(64)  # and PPO goes on


def test_fresh_optimiser_stays_fresh() -> None:
    model = bandit_model(bandit_flow(TargetCritic()))
    pretrain_latent(model, bandit_demos(), n_iterations=3)
    assert not model.policy.optimizer.state_dict()["state"]


def test_returned_policy_saves_loads_and_copies(rollouts: Rollouts, tmp_path: Path) -> None:
    flow = bandit_flow()
    stage1 = pretrain_latent(flow, rollouts=rollouts, **QUICK)
    assert isinstance(stage1, LatentPolicy) and not stage1.training
    assert stage1.contract.flow_hash == flow.fingerprint()
    stage1.save(tmp_path / "stage1.pt")
    loaded = LatentPolicy.load(tmp_path / "stage1.pt")
    model = bandit_model(flow, policy_kwargs=SMALL | dict(prior_mix=0.1))
    stage1.copy_into(model)
    obs = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    expected, _ = stage1.predict(obs, deterministic=True)
    assert np.abs(expected).max() > 0.02
    for other in (loaded, model):
        np.testing.assert_array_equal(other.predict(obs, deterministic=True)[0], expected)
    assert float(model.policy.prior_mix) == 0.1


def test_warm_start_brings_values_near_the_critic() -> None:
    critic = TargetCritic(offset=4.0, slope=2.0)
    for warm in (False, True):
        stage1 = pretrain_latent(bandit_flow(critic), bandit_demos(1000), warm_start_value=warm, **QUICK)
        obs = th.randn(300, 2, generator=th.Generator().manual_seed(1)).clamp(-2, 2)
        with th.no_grad():
            repeated = obs.repeat_interleave(100, dim=0)
            expected = critic(repeated, stage1.sample(repeated) / 4).mean(dim=0).reshape(300, 100).mean(dim=1)
            error = (stage1.predict_values(obs)[:, 0] - expected).abs().mean()
        assert (error < 0.4) == warm, error


def test_policy_kwargs_reach_the_policy(rollouts: Rollouts) -> None:
    stage1 = pretrain_latent(
        bandit_flow(),
        rollouts=rollouts,
        **(QUICK | dict(policy_kwargs=dict(net_arch=[16], prior_mix=0.05, log_std_init=-1.0))),
    )
    assert stage1.net_arch == [16] and float(stage1.prior_mix) == pytest.approx(0.05)
    assert (stage1.pi(th.zeros(1, 2)).distribution.stddev - math.exp(-1)).abs().max() < 1e-6


def test_new_policies_start_as_recommended(rollouts: Rollouts) -> None:
    for mode, std, prior_mix in (("full", 0.45, 0.03), ("shared", 0.3, 0.0)):
        rollouts = replace(rollouts, contract=replace(rollouts.contract, steer_mode=mode))
        policy = pretrain_latent(bandit_flow(), rollouts=rollouts, n_iterations=1)
        assert (policy.pi(th.zeros(1, 2)).distribution.stddev - std).abs().max() < 1e-6
        assert float(policy.prior_mix) == pytest.approx(prior_mix)


def test_the_critic_learns_under_the_decode_that_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def watched(*args: Any, critic: Any, num_steps: int | None = None, **kwargs: Any) -> Any:
        asked.append(num_steps)
        return critic

    monkeypatch.setattr("sb3_dsrl.stage1.fit.train_critic", watched)
    flow = tiny_flow()
    env = FORMS["vec form"](flow, [scripted(time_limit=9)], num_steps=5)
    pretrain_latent(flow, rollouts=collect_rollouts("prior", env, 2), weighting="candidates", n_iterations=1)
    assert asked == [5]


def test_same_seed_same_policy(rollouts: Rollouts) -> None:
    states = []
    for global_seed, seed in ((0, 3), (1, 3), (2, 4)):
        th.manual_seed(global_seed)
        stage1 = pretrain_latent(bandit_flow(), rollouts=rollouts, **(QUICK | dict(seed=seed)))
        states.append(stage1.state_dict())
    assert all(th.equal(value, states[1][key]) for key, value in states[0].items())
    assert not th.equal(states[0]["action_net.bias"], states[2]["action_net.bias"])


@pytest.mark.parametrize(
    ("weighting", "logged"),
    [
        ("candidates", {"stage1/effective_candidates", "stage1/q_spread", "stage1/advantage_max"}),
        ("executed", {"stage1/effective_samples"}),
    ],
)
def test_tensorboard_shows_the_effective_number(rollouts: Rollouts, tmp_path: Path, weighting: Any, logged: set[str]) -> None:
    flow = bandit_flow(TargetCritic())
    pretrain_latent(flow, **data_for(weighting, rollouts), weighting=weighting, tensorboard_log=tmp_path, **QUICK)
    assert scalars(tmp_path) == {name: [0, 19] for name in logged | {"stage1/loss"}}


@pytest.mark.parametrize("weighting", ["candidates", "executed"])
def test_steering_the_executed_part_only(weighting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """steer_mode="act_horizon": stage 1 learns the first H of T entries, also from rollouts that steered all T."""
    monkeypatch.setattr("sb3_dsrl.stage1.fit.train_critic", partial(train_critic, n_iterations=5))
    flow = tiny_flow()
    assert flow.critic is not None
    flow.critic.updates += 1

    def venv(**kwargs: Any) -> VecEnv:
        return FORMS["vec form"](flow, [scripted(time_limit=9) for _ in range(2)], **kwargs)

    model = PPO("LatentPolicy", venv(steer_mode="act_horizon"), gamma=0.99**3, n_steps=4, batch_size=8)
    for env in (venv(), model.get_env()):
        rollouts = collect_rollouts("prior", env, episodes=6)
        policy = pretrain_latent(model, rollouts=rollouts, weighting=weighting, n_iterations=3)
        mean = policy.pi(rollouts.cond).mode()
        assert mean.shape == (len(rollouts), 3 * 2) and mean.abs().max() > 1e-3
    new = pretrain_latent(flow, rollouts=rollouts, weighting=weighting, n_iterations=3, policy_kwargs=SMALL)
    assert new.action_space == model.action_space  # a new policy steers what the rollouts steered
    full = PPO("LatentPolicy", venv(), gamma=0.99**3, n_steps=4, batch_size=8)
    with pytest.raises(ValueError, match="The rollouts steer 3 entries of the noise, expected 4: see steer_mode"):
        pretrain_latent(full, rollouts=rollouts)


def test_rollouts_are_not_taken_through_vec_normalize() -> None:
    env = VecNormalize(bandit_env(bandit_flow()))
    with pytest.raises(ValueError, match="needs the flow's own features and rewards: pass the env below VecNormalize"):
        collect_rollouts("prior", env, episodes=2)


@pytest.mark.parametrize("kwargs", [dict(), dict(norm_reward=False)])
def test_normalised_features_are_refused(rollouts: Rollouts, kwargs: dict[str, Any]) -> None:
    """Stage 1 would learn from the flow's features, the policy would be given others."""
    env = VecNormalize(bandit_env(bandit_flow()), **kwargs)
    model = PPO("LatentPolicy", env, gamma=env.macro_gamma, n_steps=4, batch_size=8)
    with pytest.raises(ValueError, match=r"normalises the flow's features, .* use VecNormalize\(..., norm_obs=False\)"):
        pretrain_latent(model, rollouts=rollouts)


def test_normalised_rewards_are_fine(rollouts: Rollouts) -> None:
    env = VecNormalize(bandit_env(bandit_flow()), norm_obs=False, gamma=0.99)
    model = PPO("LatentPolicy", env, gamma=env.macro_gamma, n_steps=4, batch_size=8)
    pretrain_latent(model, rollouts=rollouts, learning_rate=1e-2, n_iterations=50, seed=0)
    assert mean_noise(model.policy)[0] > 0.1


def test_an_error_leaves_the_policy_where_it_was(rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its device and in its mode, though the flow is on another device."""
    model = bandit_model(bandit_flow())
    model.policy.train()
    moves: list[str] = []
    monkeypatch.setattr(LatentPolicy, "to", lambda policy, device: moves.append(str(device)) or policy)
    monkeypatch.setattr(FlowPolicy, "device", th.device("cuda:1"))

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sb3_dsrl.stage1.executed.executed_advantages", fail)
    with pytest.raises(KeyboardInterrupt):
        pretrain_latent(model, rollouts=rollouts)
    assert moves == ["cuda:1", "cpu"] and model.policy.training


# What data, env and critic must agree on


def test_executed_noise_needs_no_agreement_with_the_critic() -> None:
    """The flow's gamma and reward scale are its critic's, which executed noises do not need."""
    flow = bandit_flow()
    env = bandit_env(flow, gamma=0.99, reward_scale=10.0)
    flow.gamma = 0.9
    rollouts = collect_rollouts("prior", env, 20, seed=0)
    model = PPO("LatentPolicy", env, gamma=env.macro_gamma, n_steps=4, batch_size=8)
    for target in (flow, model):
        policy = pretrain_latent(target, rollouts=rollouts, n_iterations=2)
        assert policy.action_space.contract == rollouts.contract


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(gamma=0.9), r"The rollouts have gamma=0.9, but the flow's critic has 0.99"),
        (dict(reward_scale=10.0), r"The rollouts have reward_scale=10.0, but the flow's critic has 1.0"),
    ],
)
@pytest.mark.parametrize("with_demos", [True, False])
def test_a_critic_learns_one_kind_of_reward(kwargs: dict[str, Any], sentence: str, with_demos: bool) -> None:
    flow = bandit_flow(TargetCritic())
    env = bandit_env(flow, **kwargs)
    rollouts = collect_rollouts("prior", env, 8)
    demos = bandit_demos() if with_demos else None
    for target in (flow, PPO("LatentPolicy", env, gamma=env.macro_gamma, n_steps=4, batch_size=8)):
        with pytest.raises(ValueError, match=sentence):
            pretrain_latent(target, demos, rollouts, weighting="candidates")


def test_demos_and_rollouts_have_one_reward_mode() -> None:
    flow, demos = bandit_flow(TargetCritic()), bandit_demos()
    rollouts = collect_rollouts("prior", bandit_env(flow), 8)
    rollouts.contract = replace(rollouts.contract, reward_mode="sparse")
    demos.reward_mode = "dense"
    with pytest.raises(ValueError, match="The rollouts have reward_mode='sparse', but the demo file has 'dense'"):
        pretrain_latent(flow, demos, rollouts, weighting="candidates")


@pytest.mark.parametrize("ignore_terminations", [False, True])
def test_demos_end_as_the_env_does(ignore_terminations: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[FeatureTransitions] = []

    def watched(flow: FlowPolicy, transitions: FeatureTransitions, *, critic: Any, **kwargs: Any) -> Any:
        learned.append(transitions)
        return critic

    monkeypatch.setattr("sb3_dsrl.stage1.fit.train_critic", watched)
    flow = bandit_flow(TargetCritic())
    env = bandit_env(flow, ignore_terminations=ignore_terminations)
    demos = bandit_demos()
    rollouts = collect_rollouts("prior", bandit_env(flow), 8)
    rollouts.contract = find_steering(env).contract
    pretrain_latent(flow, demos, rollouts, weighting="candidates", n_iterations=1)
    discount = learned[0].discount[: len(demos.episodes)]
    assert (discount == (0.99 if ignore_terminations else 0.0)).all()
