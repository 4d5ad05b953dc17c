"""Actions in the units of the network: statistics, decoding and losses by hand, files with and without them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dsrl import FlowPolicy, VelocityMLP, create_flow, demo_transitions, train_flow
from sb3_dsrl.policies.action_normalizer import ActionNormalizer
from sb3_dsrl.policies.decoding import integrate
from sb3_dsrl.policies.diffusion import DiffusionPolicy
from sb3_dsrl.policies.losses import shortcut_loss
from sb3_dsrl.stage0.windows import FeatureWindows
from tests.envs import tiny_flow
from tests.stage0 import SMALL, make_demos, random_demos

ACTIONS = th.tensor([[0.1, -0.5, 1.0], [0.3, 0.5, 1.0], [0.1, 0.5, 1.0], [0.3, 0.7, 1.0]])


def test_moments_and_range_by_hand() -> None:
    moments, span = ActionNormalizer(3), ActionNormalizer(3)
    moments.fit_moments(ACTIONS)
    span.fit_range(ACTIONS)
    for normalizer, offset, scale in (
        (moments, [0.2, 0.3, 1.0], [0.1, 0.22**0.5, 0.01]),  # a constant dimension has the floor
        (span, [0.2, 0.1, 1.0], [0.1, 0.6, 0.01]),
    ):
        th.testing.assert_close(normalizer.offset, th.tensor(offset))
        th.testing.assert_close(normalizer.scale, th.tensor(scale))
        th.testing.assert_close(normalizer(ACTIONS), (ACTIONS - th.tensor(offset)) / th.tensor(scale))
        th.testing.assert_close(normalizer.undo(normalizer(ACTIONS)), ACTIONS)
    assert span(ACTIONS).abs().max() <= 1 + 1e-6


def test_it_is_the_identity_until_it_is_fitted() -> None:
    normalizer, x = ActionNormalizer(3), th.randn(5, 4, 3)
    assert normalizer.needs_fit and th.equal(normalizer(x), x) and th.equal(normalizer.undo(x), x)
    normalizer.fit_moments(ACTIONS)
    assert not normalizer.needs_fit


def fitted(policy_class: type[FlowPolicy] = FlowPolicy, **kwargs: Any) -> FlowPolicy:
    flow = tiny_flow(action_dim=3, policy_class=policy_class, **kwargs)
    flow.fit_action_normalizer(ACTIONS)
    return flow


def test_decode_undoes_it_before_the_clip() -> None:
    flow = fitted()
    cond, w = th.randn(5, flow.cond_dim), th.randn(5, 6, 4, 3)
    x = integrate(flow.net, cond, w, 2)
    expected = (th.tensor([0.2, 0.3, 1.0]) + th.tensor([0.1, 0.22**0.5, 0.01]) * x).clamp(-1, 1)
    th.testing.assert_close(flow.decode(cond, w), expected)
    th.testing.assert_close(flow.decode(cond, w[:, 2]), expected[:, 2])
    assert (expected[..., 0] < 1).all() and (x.abs() > 1).any()  # in the network's units the box is no bound
    th.testing.assert_close(flow.accelerate(None, None).decode(cond, w), expected)
    noise = w.clone().requires_grad_(True)
    (gradient,) = th.autograd.grad(flow.decode(cond, noise)[..., 0].sum(), noise)
    of_net = th.autograd.grad(integrate(flow.net, cond, noise, 2)[..., 0].sum(), noise)[0]
    th.testing.assert_close(gradient, 0.1 * of_net)


def test_decode_of_ddim_undoes_it_too() -> None:
    policy, cond, w = fitted(DiffusionPolicy), th.randn(5, 6), th.randn(5, 4, 3)
    found = policy.decode(cond, w)
    policy.action_normalizer = None
    expected = th.tensor([0.2, 0.1, 1.0]) + th.tensor([0.1, 0.6, 0.01]) * policy.decode(cond, w)
    th.testing.assert_close(found, expected.clamp(-1, 1))


def test_loss_is_that_of_normalised_targets() -> None:
    flow = fitted()
    cond, chunk = th.randn(40, flow.cond_dim), th.rand(40, 4, 3)
    th.manual_seed(0)
    found = list(flow.imitation_loss(flow.net, cond, chunk).values())
    th.manual_seed(0)
    target = (chunk - th.tensor([0.2, 0.3, 1.0])) / th.tensor([0.1, 0.22**0.5, 0.01])
    th.testing.assert_close(found, list(shortcut_loss(flow.net, flow.net, cond, target)))


def test_training_fits_it_and_windows_and_critic_keep_the_actions() -> None:
    demos = random_demos()
    flow = create_flow(demos, pred_horizon=2, act_horizon=1, **SMALL)
    assert flow.action_normalizer is not None
    actions = np.concatenate([episode.actions for episode in demos.episodes])
    np.testing.assert_allclose(flow.action_normalizer.offset, actions.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(flow.action_normalizer.scale, actions.std(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(FeatureWindows(flow, demos).chunk[0, 0], actions[0])
    np.testing.assert_array_equal(demo_transitions(flow, demos).chunk[:, 0], actions)
    elsewhere = FlowPolicy.create(3, 2, pred_horizon=2, act_horizon=1, **SMALL)
    before = elsewhere.fingerprint()
    train_flow(demos, elsewhere, n_iterations=1)
    assert elsewhere.action_normalizer is not None
    assert th.equal(elsewhere.action_normalizer.offset, flow.action_normalizer.offset)
    assert elsewhere.fingerprint() != before
    other = make_demos(0.5 * actions.reshape(6, 5, 2), np.stack([episode.obs for episode in demos.episodes]))
    train_flow(other, elsewhere, n_iterations=1)  # what was fitted stays as it is
    assert th.equal(elsewhere.action_normalizer.offset, flow.action_normalizer.offset)


def test_small_actions_beside_a_constant_one_are_learned_to_scale() -> None:
    """Without normalisation the error of the network is several times the size of these actions."""
    rng = np.random.default_rng(0)
    actions = 0.02 * rng.choice([-1, 1], (60, 6, 2))
    actions[..., 1] = 1.0
    demos = make_demos(actions, rng.standard_normal((60, 7, 2)))
    flow = train_flow(
        demos, n_iterations=300, learning_rate=4e-3, ema_decay=0.98, seed=0, pred_horizon=1, act_horizon=1, **SMALL
    )
    chunk = flow.sample(th.randn(500, 1, 2))
    assert (chunk[..., 0].abs() - 0.02).abs().median() < 0.01
    assert (chunk[..., 1] - 1).abs().max() < 0.03
    assert 0.2 < (chunk[..., 0] > 0).double().mean() < 0.8


@pytest.mark.parametrize("policy_class", [FlowPolicy, DiffusionPolicy])
def test_it_travels_with_the_flow_and_makes_another_one(tmp_path: Path, policy_class: type[FlowPolicy]) -> None:
    flow = fitted(policy_class)
    flow.save_pretrained(tmp_path)
    loaded = FlowPolicy.from_pretrained(tmp_path)
    cond, w = th.randn(5, flow.cond_dim), th.randn(5, 4, 3)
    assert th.equal(loaded.decode(cond, w), flow.decode(cond, w)) and loaded.fingerprint() == flow.fingerprint()
    assert loaded.action_normalizer is not None and flow.action_normalizer is not None
    for statistic in ("offset", "scale"):
        before = loaded.fingerprint()
        getattr(loaded.action_normalizer, statistic)[0] += 1e-3
        assert loaded.fingerprint() != before


def test_folders_of_before_are_what_they_were(tmp_path: Path) -> None:
    """Neither their config.json nor their weights know of a normaliser."""
    flow = tiny_flow(normalize_actions=False)
    flow.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("action_normalizer") is None
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = FlowPolicy.from_pretrained(tmp_path)
    cond, w = th.randn(5, flow.cond_dim), 2 * th.randn(5, 4, 2)
    assert loaded.action_normalizer is None
    assert th.equal(loaded.decode(cond, w), integrate(flow.net, cond, w[:, None], 2)[:, 0].clamp(-1, 1))
    train_flow(make_demos(np.zeros((2, 5, 2)), np.zeros((2, 6, 3))), _of_no_task(loaded), n_iterations=1)
    assert loaded.action_normalizer is None  # and training goes on in the same units


def _of_no_task(flow: FlowPolicy) -> FlowPolicy:
    flow.env_id = flow.control_mode = None
    return flow


def test_old_keys_are_all_that_a_flow_without_one_has() -> None:
    flow = FlowPolicy.create(3, 2, pred_horizon=4, act_horizon=2, net_class=VelocityMLP, normalize_actions=False)
    assert {key.partition(".")[0] for key in flow.state_dict()} == {"encoder", "net", "critic"}
