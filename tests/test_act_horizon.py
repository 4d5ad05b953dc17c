"""H as a choice after training: a view of the flow, the envs that steer it, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dsrl import (
    ActionChunkWrapper,
    BestOfM,
    FlowPolicy,
    LatentSteeringWrapper,
    VecLatentSteering,
    collect_rollouts,
    evaluate,
    pretrain_latent,
    steerability,
    train_critic,
)
from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.steering.vec_env import find_steering
from tests.envs import scripted, tiny_flow


def steered(flow: FlowPolicy, act_horizon: int | None = None) -> LatentSteeringWrapper:
    return LatentSteeringWrapper(scripted(time_limit=6), flow, act_horizon=act_horizon)


def with_trained_critic(flow: FlowPolicy) -> FlowPolicy:
    assert flow.critic is not None
    flow.critic.updates += 1
    return flow


def test_view_shares_everything_but_its_horizon() -> None:
    flow = tiny_flow(act_horizon=3)
    view = flow.with_act_horizon(2)
    assert (flow.act_horizon, view.act_horizon) == (3, 2) and type(view) is FlowPolicy
    assert view.net is flow.net and view.encoder is flow.encoder and view.critic is flow.critic
    chunk = th.randn(5, 4, 2)
    assert th.equal(view.executed(chunk), chunk[:, :2]) and th.equal(flow.executed(chunk), chunk[:, :3])
    assert view.fingerprint() == tiny_flow(act_horizon=2).fingerprint() != flow.fingerprint()
    assert flow.with_act_horizon(3).fingerprint() == flow.fingerprint() == tiny_flow(act_horizon=3).fingerprint()
    view.critic = None
    assert flow.critic is not None
    with th.no_grad():
        flow.net.inlet.bias += 1
    assert view.fingerprint() == view.with_act_horizon(2).fingerprint() != tiny_flow(act_horizon=2).fingerprint()


@pytest.mark.parametrize(("offset", "longest"), [(0, 4), (1, 3)])
def test_horizon_must_lie_within_the_chunk(offset: int, longest: int) -> None:
    flow = tiny_flow(action_offset=offset)
    flow.with_act_horizon(longest)
    for found in (0, longest + 1):
        with pytest.raises(ValueError, match=rf"act_horizon must lie in 1..{longest} .*, found {found}"):
            flow.with_act_horizon(found)


def test_view_is_saved_with_its_horizon(tmp_path: Path) -> None:
    view = tiny_flow(act_horizon=3).with_act_horizon(2)
    view.save_pretrained(tmp_path)
    loaded = FlowPolicy.from_pretrained(tmp_path)
    assert loaded.act_horizon == 2 and loaded.fingerprint() == view.fingerprint()
    assert loaded.critic is not None and loaded.critic.act_horizon == 3


def test_env_executes_so_many_steps() -> None:
    flow = tiny_flow(act_horizon=3, gamma=0.9)
    env = steered(flow, 2)
    venv = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(scripted(), 2, 2)]), flow.with_act_horizon(2))
    w = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    features, _ = env.reset(seed=0)
    *_, info = env.step(w)
    with th.no_grad():
        expected = flow.decode(th.as_tensor(features)[None], th.as_tensor(w)[None])[0, :2]
    np.testing.assert_array_equal(info["action_chunk"], expected)
    assert info["chunk_length"] == 2 and flow.act_horizon == 3
    for contract in (find_steering(env).contract, find_steering(venv).contract):
        assert contract.act_horizon == 2 and contract.macro_gamma == pytest.approx(0.9**contract.act_horizon, abs=0.2)
    assert env.macro_gamma == pytest.approx(0.81) and steered(flow).macro_gamma == pytest.approx(0.729)
    assert env.action_space != steered(flow).action_space


def test_latent_policy_of_another_horizon_is_refused() -> None:
    flow = tiny_flow(act_horizon=3)
    short, long = (PPO("LatentPolicy", steered(flow, h), n_steps=8, batch_size=8, device="cpu") for h in (2, 3))
    with pytest.raises(ValueError, match=r"The policy has act_horizon=2, but the model's env has 3"):
        short.policy.copy_into(long)
    with pytest.raises(ValueError, match=r"The model has act_horizon=2, but the env has 3"):
        evaluate(short, steered(flow), 1)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        short.set_env(steered(flow))


def refuse_to_play(flow: FlowPolicy) -> Any:
    return collect_rollouts(flow, steered(flow, 2), 1)


def refuse_to_judge(flow: FlowPolicy) -> Any:
    return steerability(flow, steered(flow, 2))


@pytest.mark.parametrize("use", [refuse_to_play, refuse_to_judge])
def test_flow_with_its_own_horizon_is_not_the_one_that_is_steered(use: Callable[[FlowPolicy], Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"The env executes 2 steps of each chunk \(act_horizon\), but the flow 3: pass flow.with_act_horizon\(2\)",
    ):
        use(tiny_flow(act_horizon=3))


def test_rollouts_of_another_horizon_are_refused() -> None:
    flow = tiny_flow(act_horizon=3)
    rollouts = collect_rollouts(flow.with_act_horizon(2), steered(flow, 2), 2)
    with pytest.raises(ValueError, match=r"The rollouts have act_horizon=2, but the flow has 3"):
        pretrain_latent(flow, rollouts=rollouts)
    assert pretrain_latent(flow.with_act_horizon(2), rollouts=rollouts, n_iterations=2).action_space.shape == (4, 2)


def train(flow: FlowPolicy) -> Any:
    n, features = 4, th.zeros(4, flow.cond_dim)
    return train_critic(
        flow, FeatureTransitions(features, th.zeros(n, 2, 2), th.zeros(n), th.ones(n), features), n_iterations=1
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda flow: BestOfM(steered(flow), n_candidates=2),
        train,
        lambda flow: flow.scored(th.zeros(1, 4, 2), flow.critic),
    ],
    ids=["best of M", "train_critic", "scored"],
)
def test_critic_for_another_horizon_is_refused(use: Callable[[FlowPolicy], Any]) -> None:
    flow = with_trained_critic(tiny_flow(act_horizon=3))
    with pytest.raises(
        ValueError, match="The critic scores chunks of 3 actions, but 2 of each chunk are executed: train one for"
    ):
        use(flow.with_act_horizon(2))
    flow.critic = EnsembleChunkCritic(flow.cond_dim, 2, 2, n_heads=2, width=8)
    use(with_trained_critic(flow).with_act_horizon(2))


def test_steerability_says_the_horizon_and_leaves_the_critic_out() -> None:
    flow = with_trained_critic(tiny_flow(act_horizon=3)).with_act_horizon(2)
    report = steerability(flow, steered(flow), episodes=24, n_tickets=2)
    assert report.best_of is None and report.act_horizon == report.as_dict()["act_horizon"] == 2
    assert "no trained critic for this act_horizon" in report.text() and "2 of each chunk" in report.text()
