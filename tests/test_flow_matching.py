"""Stage 0: the losses against brute force, and small learning problems with known answers."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dsrl import (
    AdvantageWeighting,
    FlowPolicy,
    ImageTraining,
    StateEncoder,
    VelocityMLP,
    create_flow,
    demo_transitions,
    train_critic,
    train_flow,
)
from sb3_dsrl.policies.losses import shortcut_loss
from sb3_dsrl.policies.networks import VelocityNet
from sb3_dsrl.stage0.features import check_demos_fit
from sb3_dsrl.stage0.flow_matching import _demo_advantages
from sb3_dsrl.stage0.weights import exp_weights
from tests.stage0 import SMALL, make_demos, random_demos, scalars
from tests.toys import linear_flow

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
    act_horizon, first_action = 1, None

    def get_ucb_q(self, cond: th.Tensor, chunk: th.Tensor, kappa: float = 1.0) -> th.Tensor:
        return 3.0 * chunk[:, 0, 0] + 7.0


def share_of_upper_mode(advantage: AdvantageWeighting | None, critic: nn.Module | None = None) -> float:
    """Trains on two modes of equal mass, +0.6 and -0.6, in every state."""
    rng = np.random.default_rng(0)
    modes = rng.permuted(np.repeat([-0.6, 0.6], 150)).reshape(300, 1, 1)
    demos = make_demos(modes + 0.05 * rng.standard_normal((300, 4, 1)), rng.standard_normal((300, 5, 2)))
    th.manual_seed(0)
    net = VelocityMLP(1, 1, 2, width=48, n_blocks=1, embed_dim=16)
    encoder = StateEncoder(2, 1, normalize=False)
    flow = FlowPolicy(encoder, net, critic, act_horizon=1, num_steps=8)  # type: ignore[arg-type]
    train_flow(demos, flow, n_iterations=500, learning_rate=4e-3, ema_decay=0.98, advantage=advantage, seed=0)
    chunk = flow.sample(th.randn(3000, 1, 2))
    assert (chunk.abs() - 0.6).abs().median() < 0.15  # the modes stay where they are
    return float((chunk > 0).double().mean())


def test_advantage_weights_shift_the_flow_to_the_better_mode() -> None:
    plain, weak, strong = (
        share_of_upper_mode(None),
        share_of_upper_mode(AdvantageWeighting(0.5), PrefersUp()),
        share_of_upper_mode(AdvantageWeighting(2.0), PrefersUp()),
    )
    # z-scored advantages of two equal modes are +1 and -1, so the better one gets e^(2 beta) times the weight
    assert plain == pytest.approx(0.5, abs=0.08)
    assert weak == pytest.approx(1 / (1 + np.exp(-2 * 0.5)), abs=0.08)
    assert strong > 0.93


def test_advantage_needs_a_critic() -> None:
    with pytest.raises(ValueError, match=r"advantage weights the demos by the critic's advantages: train one first"):
        share_of_upper_mode(AdvantageWeighting(), critic=None)


# Data


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


# The loop


def test_nan_loss_raises() -> None:
    demos = random_demos()
    demos.episodes[2].actions[:] = np.nan  # past load_demos, which refuses it
    with pytest.raises(
        ValueError, match=r"stage 0: flow: flow/matching_loss is nan at iteration \d+; check the data or lower"
    ):
        train_flow(demos, n_iterations=5, pred_horizon=2, act_horizon=1, **SMALL)


def test_tensorboard(tmp_path: Path) -> None:
    train_flow(random_demos(), n_iterations=103, tensorboard_log=tmp_path / "a", pred_horizon=2, act_horizon=1, **SMALL)
    assert scalars(tmp_path / "a") == {name: [0, 100, 102] for name in ("flow/matching_loss", "flow/consistency_loss")}


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
        kwargs: dict[str, Any] = dict(loss_kwargs=dict(consistency_fraction=0.0), n_iterations=3, seed=0)
        kwargs |= dict(pred_horizon=2, act_horizon=1, **SMALL)
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
    flow = create_flow(demos, pred_horizon=2, act_horizon=1, **SMALL).freeze()
    before = deepcopy(flow.state_dict())
    assert train_flow(demos, flow, n_iterations=3) is flow
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    for key, value in flow.state_dict().items():  # the encoder stays as it was fitted, the critic has its own training
        assert th.equal(value, before[key]) == (not key.startswith("net.")), key


# Creating, fitting, moving


def test_create_flow_has_the_sizes_and_statistics_of_the_demos() -> None:
    demos = random_demos()
    flow = create_flow(demos, pred_horizon=2, act_horizon=1, **SMALL)
    assert (flow.obs_shapes, flow.action_dim, flow.env_id, flow.control_mode) == ((3,), 2, "PushCube-v1", "pd_joint_pos")
    np.testing.assert_allclose(flow.encoder.mean, demos.frames().mean(axis=0), rtol=1e-5)
    assert not flow.encoder.needs_fit and flow.net.training


@pytest.mark.parametrize("fitted", ["never", "before", "not normalised"])
def test_statistics_of_a_flow_created_elsewhere_are_fitted_unless_they_were(fitted: str) -> None:
    demos = random_demos()
    flow = FlowPolicy.create(3, 2, pred_horizon=2, act_horizon=1, **SMALL)
    if fitted == "before":
        flow.encoder.fit(th.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]]))
    elif fitted == "not normalised":
        flow = FlowPolicy(StateEncoder(3, 1, normalize=False), flow.net, act_horizon=1)
    mean = flow.encoder.mean.clone()
    train_flow(demos, flow, n_iterations=1)
    expected = demos.frames().mean(axis=0) if fitted == "never" else mean
    np.testing.assert_allclose(flow.encoder.mean, expected, rtol=1e-5)


def test_statistics_are_not_fitted_under_a_trained_critic() -> None:
    demos = random_demos()
    flow = FlowPolicy.create(3, 2, pred_horizon=2, act_horizon=1, **SMALL)
    train_critic(flow, demo_transitions(flow, demos), n_iterations=1)
    with pytest.raises(ValueError, match=r"critic was trained on observations that are not normalised.*create_flow\(demos\)"):
        train_flow(demos, flow, n_iterations=1)


def test_flow_goes_to_the_device_that_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, moved = [], []
    monkeypatch.setattr("sb3_dsrl.stage0.flow_matching.get_device", lambda device: asked.append(device) or th.device("cpu"))
    monkeypatch.setattr(FlowPolicy, "to", lambda flow, device: moved.append(device) or flow)
    train_flow(random_demos(), n_iterations=1, pred_horizon=2, act_horizon=1, **SMALL)
    assert asked == ["auto"] and moved == [th.device("cpu")]


class Watched(VelocityNet):
    """Remembers the largest batch."""

    largest = 0

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        Watched.largest = max(Watched.largest, len(x))
        return -x + cond[:, :1, None]


class WatchedCritic(PrefersUp):
    largest = 0

    def get_ucb_q(self, cond: th.Tensor, chunk: th.Tensor, kappa: float = 1.0) -> th.Tensor:
        WatchedCritic.largest = max(WatchedCritic.largest, len(chunk))
        return super().get_ucb_q(cond, chunk, kappa)


def test_advantages_of_many_demos_are_computed_in_blocks() -> None:
    net = Watched(1, 1, 2)
    flow = FlowPolicy(StateEncoder(2, 1), net, WatchedCritic(), act_horizon=1, num_steps=1)  # type: ignore[arg-type]
    cond, chunk = th.randn(5000, 2), th.rand(5000, 1, 1)
    found = _demo_advantages(flow, cond, chunk)
    expected = 3 * (chunk[:, 0, 0] - cond[:, 0].clamp(-1, 1))  # every noise decodes to the first feature
    th.testing.assert_close(found, (expected - expected.mean()) / expected.std(), atol=1e-4, rtol=1e-4)
    assert 0 < Watched.largest <= 1024 and 0 < WatchedCritic.largest <= 1024


# What cannot apply is refused


def test_settings_that_cannot_apply_are_refused() -> None:
    demos, flow = random_demos(), create_flow(random_demos(), pred_horizon=2, act_horizon=1, **SMALL)
    offset = FlowPolicy(StateEncoder(3, 1), VelocityMLP(2, 2, 3, width=8), act_horizon=1, action_offset=1)
    for kwargs, sentence in (
        (dict(images=ImageTraining()), "images was given, but made.h5 holds no images"),
        (dict(flow=flow, policy_class=FlowPolicy), r"\['policy_class'\] describe a new flow, but a flow was given"),
        (dict(flow=flow, pred_horizon=4), r"\['pred_horizon'\] describe a new flow, but a flow was given"),
        (
            dict(flow=flow, loss_kwargs=dict(n_levels=2)),
            r"loss_kwargs holds \['n_levels'\], but FlowPolicy.imitation_loss takes \['consistency_fraction'\]",
        ),
        (dict(flow=flow, loss_kwargs=dict(consistency_fraction=1.0)), r"must lie in \[0, 1\), found 1.0"),
        (dict(flow=offset), "entry 0 is the action for now, but the flow's action_offset is 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train_flow(demos, n_iterations=1, **kwargs)  # type: ignore[arg-type]
    for make, sentence in (
        (lambda: AdvantageWeighting(beta=0.0), "beta must be positive, found 0.0"),
        (lambda: AdvantageWeighting(max_weight=-1.0), "max_weight must be positive, found -1.0"),
        (lambda: ImageTraining(random_shift_pad=-1), "random_shift_pad must be >= 0, found -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
