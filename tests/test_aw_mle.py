"""The AW-MLE loss against brute force, and the loop around it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal, kl_divergence

from sb3_dsrl import LatentPolicy, Rollouts, aw_mle_loss, pretrain_latent
from sb3_dsrl.steering.steering import Steering
from tests.bandit import QUICK, SMALL, TargetCritic, bandit_flow, bandit_model, bandit_rollouts, data_for, mean_noise
from tests.toys import linear_flow


@pytest.fixture
def policy() -> LatentPolicy:
    """For 3 features and noise (2, 2), with random weights in float64."""
    steering = Steering(linear_flow(obs_dim=3, horizon=2))
    th.manual_seed(0)
    policy = LatentPolicy(steering.observation_space, steering.action_space, lambda _: 1e-3, **SMALL, centre=np.ones((2, 2)))
    with th.no_grad():
        for parameter in (*policy.action_net.parameters(), policy.log_std):
            parameter.normal_(0.0, 0.3)
    policy.pi_features_extractor.register_forward_hook(lambda module, args, out: out.double())  # SB3 casts to float32
    return policy.double()


@pytest.fixture
def batch() -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    th.manual_seed(1)
    return th.randn(5, 3).double(), th.randn(5, 4, 2, 2).double(), th.rand(5, 4).double()


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_loss_against_brute_force(policy: LatentPolicy, batch: tuple[th.Tensor, ...], kl_coef: float) -> None:
    obs, w, weights = batch
    expected = 0.0
    for i in range(5):
        mean, log_std = policy.action_net(policy.mlp_extractor.forward_actor(obs[i : i + 1]))[0].chunk(2)
        pi = Independent(Normal(1.0 + mean, (policy.log_std + log_std).exp()), 1)  # 1 is the centre
        for m in range(4):
            expected -= weights[i, m] * pi.log_prob(w[i, m].flatten()) / 5
        prior = Independent(Normal(th.zeros(4).double(), 1.0), 1)
        expected += kl_coef * kl_divergence(pi, prior) / 5
    assert float(policy.prior_mix) == 0.3  # of which nothing may be seen here
    th.testing.assert_close(aw_mle_loss(policy, obs, w, weights, kl_coef), expected)


@pytest.mark.parametrize("name", ["action_net.weight", "action_net.bias", "log_std", "mlp_extractor.policy_net.0.weight"])
def test_gradient_matches_finite_differences(policy: LatentPolicy, batch: tuple[th.Tensor, ...], name: str) -> None:
    aw_mle_loss(policy, *batch, kl_coef=0.1).backward()
    parameter = dict(policy.named_parameters())[name]
    assert parameter.grad is not None
    flat = parameter.data.view(-1)
    for i in range(0, len(flat), max(1, len(flat) // 5)):
        losses = []
        for delta in (1e-5, -2e-5):
            flat[i] += delta
            losses.append(aw_mle_loss(policy, *batch, kl_coef=0.1).item())
        flat[i] += 1e-5
        assert parameter.grad.view(-1)[i].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-7)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return bandit_rollouts()


@pytest.mark.parametrize("weighting", ["candidates", "executed"])
def test_std_is_held_unless_asked(rollouts: Rollouts, weighting: Any) -> None:
    obs = th.randn(50, 2)
    for learn_std in (False, True):
        stage1 = pretrain_latent(
            bandit_flow(TargetCritic()),
            **data_for(weighting, rollouts),
            weighting=weighting,
            learn_std=learn_std,
            **QUICK,
        )
        std = stage1.pi(obs).distribution.stddev
        assert th.equal(std, th.ones_like(std)) != learn_std
        assert mean_noise(stage1)[0] > 0.02  # the mean is learned in any case


def test_callback_does_not_touch_the_training(rollouts: Rollouts) -> None:
    """It may draw random numbers and even change the policy: the training goes on bit for bit as without it."""
    seen: list[tuple[int, bool, float]] = []

    def callback(done: int, policy: LatentPolicy) -> None:
        seen.append((done, policy.training, mean_noise(policy)[0]))
        th.randn(5), np.random.rand(), policy.predict(np.zeros((3, 2), np.float32))
        policy.action_net.bias.data.zero_()
        policy.prior_mix.zero_()

    plain = pretrain_latent(bandit_flow(), rollouts=rollouts, **QUICK)
    watched = pretrain_latent(bandit_flow(), rollouts=rollouts, callback=callback, callback_freq=8, **QUICK)
    assert [(done, training) for done, training, _ in seen] == [(8, False), (16, False)]
    assert 0 < seen[0][2] < seen[1][2]  # it sees what has been learned so far
    for key, value in plain.state_dict().items():
        assert th.equal(value, watched.state_dict()[key]), key
    with pytest.raises(ValueError, match="callback_freq must be at least 1, found 0"):
        pretrain_latent(bandit_flow(), rollouts=rollouts, callback=callback, callback_freq=0)


def test_records_of_the_log_interval(rollouts: Rollouts, tmp_path: Path) -> None:
    pretrain_latent(bandit_flow(), rollouts=rollouts, tensorboard_log=tmp_path, log_interval=6, **QUICK)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    last = QUICK["n_iterations"] - 1
    assert [event.step for event in log.Scalars("stage1/loss")] == [*range(0, last, 6), last]
    with pytest.raises(ValueError, match="log_interval must be at least 1, found 0"):
        pretrain_latent(bandit_flow(), rollouts=rollouts, log_interval=0)


def test_policy_trains_in_the_mode_that_it_was_in(rollouts: Rollouts) -> None:
    """The callback's evaluation mode is for the callback alone: dropout, say, goes on afterwards."""
    model = bandit_model(bandit_flow())
    modes: list[bool] = []
    model.policy.train()
    model.policy.action_net.register_forward_hook(lambda *_: modes.append(model.policy.training))
    kwargs = {key: value for key, value in QUICK.items() if key != "policy_kwargs"}
    pretrain_latent(model, rollouts=rollouts, callback=lambda done, policy: None, callback_freq=5, **kwargs)
    assert modes and all(modes) and not model.policy.training
