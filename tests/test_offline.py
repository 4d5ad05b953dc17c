"""Stage 0: the losses against brute force, and small learning problems with known answers."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sb3_dsrl import EnsembleChunkCritic, FlowPolicy, StateEncoder, VelocityMLP, demo_transitions, train_critic, train_flow
from sb3_dsrl.policies.losses import shortcut_loss
from sb3_dsrl.stage0.critic import critic_td_loss
from sb3_dsrl.stage0.demos import Demos, Episode, chunk_transitions
from sb3_dsrl.stage0.features import FeatureTransitions, check_demos_fit
from sb3_dsrl.stage0.weights import exp_weights
from tests.toys import linear_flow

SMALL = dict(net_class=VelocityMLP, net_kwargs=dict(width=48, n_blocks=1, embed_dim=16), obs_horizon=1)


def make_demos(actions: np.ndarray, obs: np.ndarray, rewards: np.ndarray | None = None) -> Demos:
    """Episodes of equal length; actions (n, L, A), obs (n, L + 1, D)."""
    done = np.zeros(actions.shape[1], bool)
    episodes = [
        Episode(o.astype(np.float32), a.astype(np.float32), np.ones(len(a), np.float32) if rewards is None else r, done, None)
        for o, a, r in zip(obs, actions, actions[..., 0] if rewards is None else rewards, strict=True)
    ]
    return Demos(Path("made.h5"), episodes, "PushCube-v1", "state", "pd_joint_pos", "sparse")


def random_demos(n: int = 6, length: int = 5) -> Demos:
    rng = np.random.default_rng(0)
    return make_demos(rng.uniform(-1, 1, (n, length, 2)), rng.standard_normal((n, length + 1, 3)))


# Weights


@pytest.mark.parametrize("max_weight", [1.5, 10.0, 1e6])
def test_exp_weights(max_weight: float) -> None:
    scores = th.tensor([-3.0, -1.0, 0.0, 0.2, 2.0, 4.0, 5.0])
    weights = exp_weights(scores, max_weight)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-6)
    assert (weights.diff() >= 0).all()
    raw = np.minimum(np.exp(scores.numpy()), max_weight)
    np.testing.assert_allclose(weights, raw / raw.mean(), rtol=1e-5)


def test_exp_weights_do_not_overflow() -> None:
    weights = exp_weights(th.tensor([0.0, 1000.0]), 20.0)
    th.testing.assert_close(weights, th.tensor([2 / 21, 40 / 21]))


# The shortcut loss, from what the networks were asked


class Spy(nn.Module):
    """A smooth field with known values; remembers its inputs."""

    def __init__(self, phase: float) -> None:
        super().__init__()
        self.phase = nn.Parameter(th.tensor(phase))
        self.calls: list[tuple[th.Tensor, ...]] = []

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        self.calls.append((x, t, d, cond))
        return self.field(x, t, d, cond)

    def field(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        return th.sin(x + (2 * t + 3 * d + cond.sum(dim=1))[:, None, None] + self.phase)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.75])
@pytest.mark.parametrize("n_levels", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_shortcut_loss_against_brute_force(fraction: float, n_levels: int, weighted: bool) -> None:
    th.manual_seed(0)
    velocity, teacher = Spy(0.0), Spy(1.0)
    batch = 400
    cond, chunk = th.randn(batch, 2), th.rand(batch, 3, 2)
    weights = th.rand(batch) if weighted else None
    matching, consistency = shortcut_loss(velocity, teacher, cond, chunk, weights, fraction, n_levels)

    ((x, t, d, seen),) = velocity.calls
    assert th.equal(seen, cond)
    is_matching = d == 0
    assert (~is_matching).sum() == fraction * batch
    sizes = {2.0**-i for i in range(n_levels)}
    assert set(d[~is_matching].tolist()) == (sizes if fraction else set())
    assert (t + d).max() <= 1 and t.min() >= 0
    assert len(set(t[d < 1].tolist())) == (d < 1).sum()  # continuous, not on a grid
    noise = (x - t[:, None, None] * chunk) / (1 - t[:, None, None])
    assert noise.mean().abs() < 0.1 and (noise.std() - 1).abs() < 0.1

    losses: dict[bool, list[float]] = {True: [], False: []}
    for i in range(batch):
        xi, ti, di, ci = x[i : i + 1], t[i : i + 1], d[i : i + 1], cond[i : i + 1]
        if di == 0:
            target = chunk[i] - noise[i]
        else:
            half = di / 2
            told = half if half > 2.0**-n_levels else 0 * half
            first = teacher.field(xi, ti, told, ci)
            second = teacher.field(xi + half * first, ti + half, told, ci)
            target = (first + second)[0] / 2
        error = (velocity.field(xi, ti, di, ci)[0] - target).pow(2).mean().item()
        losses[bool(di == 0)].append(error * (weights[i].item() if weighted and di == 0 else 1.0))
    for loss, expected in ((matching, losses[True]), (consistency, losses[False])):
        if expected:
            assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)
    if fraction == 0:
        assert consistency == 0 and not teacher.calls
    if fraction:
        consistency.backward()
        assert velocity.phase.grad is not None and teacher.phase.grad is None


# Learning the flow


def test_flow_matching_learns_the_conditional_mean() -> None:
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (100, 5, 3))
    obs[..., 2] *= 50  # the encoder has to normalise
    mean = np.stack([0.6 * obs[:, :-1, 0], 0.3 - 0.4 * obs[:, :-1, 2] / 50], axis=-1)
    demos = make_demos(mean + 0.1 * rng.standard_normal(mean.shape), obs)
    flow = train_flow(
        demos,
        n_iterations=600,
        learning_rate=4e-3,
        ema_decay=0.98,
        seed=0,
        pred_horizon=1,
        act_horizon=1,
        num_steps=8,
        **SMALL,
    )
    test_obs = th.tensor([[[-0.8, 0.0, 30.0]], [[0.7, 0.5, -40.0]], [[0.0, -0.9, 0.0]]])
    samples = flow.sample(test_obs.repeat_interleave(500, dim=0)).reshape(3, 500, 2)
    expected = th.stack([0.6 * test_obs[:, 0, 0], 0.3 - 0.4 * test_obs[:, 0, 2] / 50], dim=1)
    assert (samples.mean(dim=1) - expected).abs().max() < 0.08
    assert samples.std(dim=1).max() < 0.25  # of 0.1 in the data; far from the prior's


class PrefersUp(nn.Module):
    """A critic that likes chunks with large first actions."""

    updates = 1  # hand-made, hence as good as trained

    def get_ucb_q(self, cond: th.Tensor, chunk: th.Tensor, kappa: float = 1.0) -> th.Tensor:
        return 3.0 * chunk[:, 0, 0] + 7.0


def share_of_upper_mode(beta: float, critic: nn.Module | None = None) -> float:
    """Trains on two modes of equal mass, +0.6 and -0.6, in every state."""
    rng = np.random.default_rng(0)
    modes = rng.permuted(np.repeat([-0.6, 0.6], 150)).reshape(300, 1, 1)
    demos = make_demos(modes + 0.05 * rng.standard_normal((300, 4, 1)), rng.standard_normal((300, 5, 2)))
    th.manual_seed(0)
    net = VelocityMLP(1, 1, 2, width=48, n_blocks=1, embed_dim=16)
    flow = FlowPolicy(StateEncoder(2, 1), net, critic, act_horizon=1, num_steps=8)  # type: ignore[arg-type]
    train_flow(demos, flow, n_iterations=500, learning_rate=4e-3, ema_decay=0.98, beta=beta, seed=0)
    chunk = flow.sample(th.randn(3000, 1, 2))
    assert (chunk.abs() - 0.6).abs().median() < 0.15  # the modes stay where they are
    return float((chunk > 0).double().mean())


def test_advantage_weights_shift_the_flow_to_the_better_mode() -> None:
    plain, weak, strong = (
        share_of_upper_mode(0.0),
        share_of_upper_mode(0.5, PrefersUp()),
        share_of_upper_mode(2.0, PrefersUp()),
    )
    # z-scored advantages of two equal modes are +1 and -1, so the better one gets e^(2 beta) times the weight
    assert plain == pytest.approx(0.5, abs=0.08)
    assert weak == pytest.approx(1 / (1 + np.exp(-2 * 0.5)), abs=0.08)
    assert strong > 0.93


def test_beta_needs_a_critic() -> None:
    with pytest.raises(ValueError, match=r"beta > 0 weights the demos by the critic's advantages: train one first"):
        share_of_upper_mode(1.0, critic=None)


# The critic


def chain(n: int, gamma_k: float) -> FeatureTransitions:
    """0 -> 1 -> 2 -> end, with rewards 1, 0.5 and 2; what comes after the end looks like 0. Chunks do not matter."""
    at = th.arange(3).repeat(n)
    features = th.eye(3)
    return FeatureTransitions(
        cond=features[at],
        chunk=th.rand(3 * n, 1, 2) * 2 - 1,
        reward=th.tensor([1.0, 0.5, 2.0])[at],
        discount=th.tensor([gamma_k, gamma_k**2, 0.0])[at],  # the second chunk lasts twice as long
        next_cond=features[(at + 1) % 3],
    )


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


# Data


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


@pytest.mark.parametrize(
    ("flow_kwargs", "sentence"),
    [
        (dict(obs_dim=4), r"the shape of an observation is \(3,\) in the demos, \(4,\) in the flow"),
        (dict(action_dim=5), r"action dimensions is 2 in the demos, 5 in the flow"),
        (dict(control_mode="pd_ee_pose"), r"control_mode is 'pd_joint_pos' in the demos, 'pd_ee_pose' in the flow"),
        (dict(env_id="PickCube-v1"), r"env_id is 'PushCube-v1' in the demos, 'PickCube-v1' in the flow"),
    ],
)
def test_demos_must_fit_the_flow(flow_kwargs: dict[str, Any], sentence: str) -> None:
    flow = linear_flow(**(dict(obs_dim=3) | flow_kwargs))
    for refuse in (check_demos_fit, demo_transitions, lambda flow, demos: train_flow(demos, flow)):
        with pytest.raises(ValueError, match=rf"made.h5 does not fit the flow: {sentence}"):
            refuse(flow, random_demos())
    check_demos_fit(linear_flow(obs_dim=3), random_demos())  # a flow that does not say is for anything


# The loops


def test_nan_loss_raises() -> None:
    demos = random_demos()
    demos.episodes[2].actions[:] = np.nan  # past load_demos, which refuses it
    with pytest.raises(
        ValueError, match=r"stage 0: flow: flow/matching_loss is nan at iteration \d+; check the data or lower"
    ):
        train_flow(demos, n_iterations=5, pred_horizon=2, act_horizon=1, **SMALL)
    transitions = replace(chain(5, 0.8), reward=th.full((15,), np.inf))
    with pytest.raises(ValueError, match=r"stage 0: critic: critic/td_loss is (nan|inf) at iteration \d+"):
        train_critic(linear_flow(obs_dim=3), transitions, n_iterations=5)


def scalars(folder: Path) -> dict[str, list[int]]:
    """Name -> steps of all scalars in a TensorBoard folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path: Path) -> None:
    train_flow(random_demos(), n_iterations=103, tensorboard_log=tmp_path / "a", pred_horizon=2, act_horizon=1, **SMALL)
    assert scalars(tmp_path / "a") == {name: [0, 100, 102] for name in ("flow/matching_loss", "flow/consistency_loss")}
    train_critic(linear_flow(obs_dim=3), chain(5, 0.8), n_iterations=3, tensorboard_log=tmp_path / "b")
    assert scalars(tmp_path / "b") == {"critic/td_loss": [0, 2]}


def test_progress_bar_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        train_critic(linear_flow(obs_dim=3), chain(5, 0.8), n_iterations=3, progress_bar=shown)
        assert ("stage 0: critic: 100%" in capsys.readouterr().err) == shown


def trained_state(seed: int | None) -> dict[str, th.Tensor]:
    demos = random_demos()
    flow = train_flow(demos, n_iterations=4, seed=seed, pred_horizon=2, act_horizon=1, **SMALL)
    train_critic(flow, demo_transitions(flow, demos), n_iterations=3, seed=seed)
    return flow.state_dict()


def test_same_seed_same_weights() -> None:
    th.manual_seed(0)
    first = trained_state(seed=7)
    th.manual_seed(1)
    second, other = trained_state(seed=7), trained_state(seed=8)
    assert all(th.equal(first[key], second[key]) for key in first)
    assert not th.equal(first["net.inlet.weight"], other["net.inlet.weight"])
    assert not th.equal(first["critic.net.0.weight"], other["critic.net.0.weight"])


def test_without_seed_the_global_generator_decides() -> None:
    states = []
    for seed in (5, 5, 6):
        th.manual_seed(seed)
        states.append(trained_state(seed=None)["net.inlet.weight"])
    assert th.equal(states[0], states[1]) and not th.equal(states[0], states[2])


def test_result_is_the_moving_average() -> None:
    def trained(ema_decay: float) -> th.Tensor:
        kwargs = dict(n_iterations=3, consistency_fraction=0.0, seed=0, pred_horizon=2, act_horizon=1, **SMALL)
        return train_flow(random_demos(), ema_decay=ema_decay, **kwargs).net.outlet[2].weight.double()

    first, third = trained(1.0), trained(0.0)  # the weights after the first and the last iteration
    assert (first - third).abs().max() > 1e-4
    second = 4 * trained(0.5) - first - 2 * third
    th.testing.assert_close(trained(0.25), first / 16 + 3 * second / 16 + 3 * third / 4, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_iterations", [1, 2, 20])
def test_short_trainings_work(n_iterations: int) -> None:
    flow = train_flow(random_demos(), n_iterations=n_iterations, pred_horizon=2, act_horizon=1, **SMALL)
    assert all(parameter.isfinite().all() for parameter in flow.parameters())


def test_training_goes_on_with_the_flow_that_is_given() -> None:
    demos = random_demos()
    flow = FlowPolicy.create(3, 2, pred_horizon=2, act_horizon=1, **SMALL).freeze()
    before = deepcopy(flow.state_dict())
    assert train_flow(demos, flow, n_iterations=3) is flow
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    for (
        key,
        value,
    ) in flow.state_dict().items():  # the encoder is part of what it learned before, the critic has its own training
        assert th.equal(value, before[key]) == (not key.startswith("net.")), key
