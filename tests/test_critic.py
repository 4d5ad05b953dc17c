"""The chunk critic of stage 0: small problems with known values, and the transitions it learns from."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_dsrl import EnsembleChunkCritic, FlowPolicy, StateEncoder, create_flow, demo_transitions, train_critic
from sb3_dsrl.policies.networks import VelocityNet
from sb3_dsrl.stage0.critic import critic_td_loss
from sb3_dsrl.stage0.demos import chunk_transitions
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.stage0.windows import FeatureWindows
from tests.stage0 import SMALL, chain, random_demos, scalars
from tests.toys import linear_flow


def test_critic_reaches_the_smdp_value_of_a_chain() -> None:
    th.manual_seed(0)
    flow, gamma_k = linear_flow(obs_dim=3), 0.8
    critic = train_critic(flow, chain(200, gamma_k), n_iterations=600, learning_rate=2e-3, tau=0.05, seed=0)
    q2 = 2.0
    q1 = 0.5 + gamma_k**2 * q2
    q0 = 1.0 + gamma_k * q1
    with th.no_grad():
        q = critic(th.eye(3).repeat(50, 1), th.rand(150, 1, 2) * 2 - 1).reshape(2, 50, 3)
    for head in q.mean(dim=1):
        np.testing.assert_allclose(head, [q0, q1, q2], atol=0.1)
    assert critic is flow.critic
    assert not any(parameter.requires_grad for parameter in critic.parameters()) and not critic.training


def test_critic_bootstraps_from_chunks_of_the_flow_not_of_the_data() -> None:
    """The last reward is the chunk's mean. The flow sends every noise to about +1, the data are symmetric."""
    th.manual_seed(0)
    n = 500
    chunk = th.rand(2 * n, 1, 2) * 2 - 1
    features, last = th.eye(2).repeat(n, 1), th.tensor([False, True]).repeat(n)
    transitions = FeatureTransitions(
        features, chunk, chunk.mean(dim=(1, 2)) * last, th.where(last, 0.0, 0.9), features.roll(1, 1)
    )
    critic = train_critic(linear_flow(b=4.0), transitions, n_iterations=600, learning_rate=2e-3, tau=0.05, seed=0)
    with th.no_grad():
        q = critic(th.tensor([[1.0, 0.0]]).repeat(200, 1), th.rand(200, 1, 2) * 2 - 1).mean()
    assert q.item() == pytest.approx(0.9, abs=0.1)


def test_td_loss_lets_each_head_follow_its_own_target() -> None:
    th.manual_seed(0)
    batch, next_chunk = chain(4, 0.8), th.randn(12, 1, 2)
    critic, target = (EnsembleChunkCritic(3, 1, 2, n_heads=3, width=8) for _ in range(2))
    expected = 0.0
    for head in range(3):
        q, next_q = critic(batch.cond, batch.chunk)[head], target(batch.next_cond, next_chunk)[head]
        expected += (q - (batch.reward + batch.discount * next_q)).pow(2).mean() / 3
    loss = critic_td_loss(critic, target, batch, next_chunk)
    th.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in target.parameters())


def test_critic_given_by_hand_is_trained_instead() -> None:
    flow = linear_flow(obs_dim=3)
    before = deepcopy(flow.critic.state_dict())
    mine = EnsembleChunkCritic(3, 1, 2, n_heads=2, width=8)
    start = deepcopy(mine.state_dict())
    assert train_critic(flow, chain(5, 0.8), critic=mine, n_iterations=2) is mine
    assert all(th.equal(value, before[key]) for key, value in flow.critic.state_dict().items())
    assert not th.equal(mine.state_dict()["net.0.weight"], start["net.0.weight"])
    flow.critic = None
    with pytest.raises(ValueError, match=r"This flow was built without a critic: pass one as `critic`"):
        train_critic(flow, chain(5, 0.8))


class CountingVelocity(VelocityNet):
    calls = 0

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        self.calls += 1
        return th.zeros_like(x)


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (8, 8)])
def test_targets_come_from_chunks_decoded_as_they_are_played(asked: int | None, expected: int) -> None:
    net = CountingVelocity(2, 1, 3)
    flow = FlowPolicy(StateEncoder(3, 1), net, EnsembleChunkCritic(3, 1, 2, n_heads=2, width=8), act_horizon=1, num_steps=4)
    train_critic(flow, chain(5, 0.8), n_iterations=3, num_steps=asked)
    assert net.calls == 3 * expected


def test_critic_that_scores_another_part_than_what_is_executed_is_refused() -> None:
    critic = EnsembleChunkCritic(3, 1, 2, n_heads=2, width=8, first_action=1)
    with pytest.raises(ValueError, match=r"scores chunks from entry 1 on, but transitions hold .* from entry 0"):
        train_critic(linear_flow(obs_dim=3, horizon=2), chain(5, 0.8), critic=critic)
    same = EnsembleChunkCritic(3, 1, 2, n_heads=2, width=8, first_action=0)
    assert train_critic(linear_flow(obs_dim=3), chain(5, 0.8), critic=same, n_iterations=1) is same


# Data


@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_joint_pos"])
@pytest.mark.parametrize("ends", [(), (4, 5)])
def test_chunks_of_transitions_are_those_of_the_flows_windows(control_mode: str, ends: tuple[int, ...]) -> None:
    """Also past the end of the recording, and past what was executed before a termination."""
    demos = replace(random_demos(length=6), control_mode=control_mode)
    for episode in demos.episodes:
        episode.terminated = np.isin(np.arange(6), ends)
    flow = create_flow(demos, pred_horizon=8, act_horizon=4, **SMALL)
    windows = FeatureWindows(flow, demos)
    rows = [row for row in range(len(windows.chunk)) if not ends or row % 6 <= ends[0]]
    assert th.equal(demo_transitions(flow, demos).chunk, windows.chunk[rows][:, :4])


def test_demo_transitions_are_those_of_the_demos_in_features() -> None:
    demos = random_demos()
    demos.episodes[0].terminated[2] = True
    flow = FlowPolicy.create(3, 2, pred_horizon=4, act_horizon=3, gamma=0.9, reward_scale=5.0, **SMALL)
    flow.encoder.fit(th.from_numpy(demos.frames()))
    for ignore in (False, True):
        found = demo_transitions(flow, demos, ignore_terminations=ignore)
        raw = chunk_transitions(demos, 1, 3, 0.9, ignore, reward_scale=5.0)
        for name in ("chunk", "reward", "discount"):
            np.testing.assert_array_equal(getattr(found, name), getattr(raw, name))
        th.testing.assert_close(found.cond, flow.encode(raw.obs))
        th.testing.assert_close(found.next_cond, flow.encode(raw.next_obs))
        assert (found.discount == 0).any() != ignore


def test_feature_transitions_add_and_index() -> None:
    a, b = chain(2, 0.8), chain(1, 0.5)
    both = a + b
    assert len(both) == 9
    index = th.tensor([7, 0])
    for name, value in vars(both[index]).items():
        expected = th.stack([getattr(b, name)[1], getattr(a, name)[0]])
        assert th.equal(value, expected), name


# The loop


def test_nan_loss_raises() -> None:
    transitions = replace(chain(5, 0.8), reward=th.full((15,), np.inf))
    with pytest.raises(ValueError, match=r"stage 0: critic: critic/td_loss is (nan|inf) at iteration \d+"):
        train_critic(linear_flow(obs_dim=3), transitions, n_iterations=5)


def test_tensorboard(tmp_path: Path) -> None:
    train_critic(linear_flow(obs_dim=3), chain(5, 0.8), n_iterations=3, tensorboard_log=tmp_path / "a")
    assert scalars(tmp_path / "a") == {"critic/td_loss": [0, 2]}


def test_progress_bar_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        train_critic(linear_flow(obs_dim=3), chain(5, 0.8), n_iterations=3, progress_bar=shown)
        assert ("stage 0: critic: 100%" in capsys.readouterr().err) == shown
