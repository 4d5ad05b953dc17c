"""Candidates: their weights against brute force, where they come from, and what a pool of them takes."""

import math
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_dsrl import Rollouts, collect_rollouts, pretrain_latent, train_critic
from sb3_dsrl.stage1 import candidates
from sb3_dsrl.stage1.candidates import PooledCandidates, Scorer, candidate_weights, effective_number, soft_baseline
from sb3_dsrl.steering.contract import Contract, SteerMode
from sb3_dsrl.steering.steering import Steering
from tests.bandit import BEST, FAST, TargetCritic, bandit_demos, bandit_flow, bandit_rollouts, mean_noise
from tests.envs import FORMS, scripted, tiny_flow
from tests.toys import linear_flow


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_candidate_weights_against_a_loop(normalize: bool, beta: float, tau: float) -> None:
    q = th.randn(6, 5, generator=th.Generator().manual_seed(0)).double() * th.tensor([0.05, 1, 1, 3, 10, 0.5])[:, None]
    weights, advantages = candidate_weights(q, beta, tau, normalize)
    for i, row in enumerate(q.tolist()):
        baseline = tau * math.log(sum(math.exp(x / tau) for x in row) / 5)
        advantage = [x - baseline for x in row]
        mean = sum(row) / 5
        scale = math.sqrt(sum((x - mean) ** 2 for x in row) / 4) if normalize else 1.0
        raw = [math.exp(x / scale / beta) for x in advantage]
        np.testing.assert_allclose(advantages[i], advantage, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(weights[i], [x / sum(raw) for x in raw], rtol=1e-6)
    th.testing.assert_close(soft_baseline(q, tau), (q - advantages)[:, 0])


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_ignore_shifts_of_q_and_tau(normalize: bool) -> None:
    q = th.randn(6, 16, generator=th.Generator().manual_seed(0)).double()
    weights, advantages = candidate_weights(q, 0.5, 5.0, normalize)
    shift = th.linspace(-50, 50, 6).double()[:, None]
    shifted, same_advantages = candidate_weights(q + shift, 0.5, 5.0, normalize)
    th.testing.assert_close(shifted, weights)
    th.testing.assert_close(same_advantages, advantages)
    other_tau, other_advantages = candidate_weights(q, 0.5, 0.2, normalize)
    th.testing.assert_close(other_tau, weights)
    assert not th.allclose(other_advantages, advantages)
    assert not th.allclose(candidate_weights(q, 1.0, 5.0, normalize)[0], weights)  # beta counts


def test_normalisation_is_per_state() -> None:
    q = th.randn(4, 16, generator=th.Generator().manual_seed(0)).double()
    scale = th.tensor([1e-3, 1.0, 30.0, 1e3]).double()[:, None]
    th.testing.assert_close(candidate_weights(q * scale, normalize=True)[0], candidate_weights(q, normalize=True)[0])
    raw, _ = candidate_weights(q * scale, normalize=False)
    assert effective_number(raw[:1]) > 15.9 and effective_number(raw[3:]) < 1.1  # without it, the scale decides
    equal, _ = candidate_weights(th.full((1, 8), 100.0), normalize=True)
    th.testing.assert_close(equal, th.full((1, 8), 1 / 8))  # no spread, no preference


def test_soft_baseline_lies_between_mean_and_maximum() -> None:
    q = th.randn(4, 16, generator=th.Generator().manual_seed(0))
    th.testing.assert_close(soft_baseline(q, 1e4), q.mean(dim=1), atol=1e-2, rtol=0)
    th.testing.assert_close(soft_baseline(q, 1e-3), q.amax(dim=1), atol=1e-2, rtol=0)


def test_effective_number_bounds() -> None:
    uniform, single = th.full((1, 16), 1 / 16), th.eye(16)[:1]
    half = th.cat([th.full((1, 8), 1 / 8), th.zeros(1, 8)], dim=1)
    for weights, expected in ((uniform, 16), (single, 1), (half, 8), (th.cat([uniform, single]), 8.5)):
        assert effective_number(weights).item() == pytest.approx(expected)
    random, _ = candidate_weights(th.randn(100, 16))
    assert 1 < effective_number(random) < 16


def candidates_optimum(beta: float, kl_coef: float) -> np.ndarray:
    """Optimum of AW-MLE on the bandit for a std of 1: mu (1 + kl_coef) = E[sum weights * w], 16 candidates of the prior."""
    w = np.random.default_rng(0).standard_normal((50_000, 16, 2))
    q = -np.square(w - BEST).sum(axis=2)
    raw = np.exp((q - q.mean(axis=1, keepdims=True)) / q.std(axis=1, ddof=1, keepdims=True) / beta)
    return ((raw / raw.sum(axis=1, keepdims=True))[..., None] * w).sum(axis=1).mean(axis=0) / (1 + kl_coef)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return bandit_rollouts()


@pytest.mark.parametrize(("beta", "kl_coef"), [(0.1, 1e-3), (1.0, 0.5)])
def test_bandit_candidates(beta: float, kl_coef: float) -> None:
    flow = bandit_flow(TargetCritic())
    stage1 = pretrain_latent(flow, bandit_demos(), weighting="candidates", beta=beta, kl_coef=kl_coef, **FAST)
    np.testing.assert_allclose(mean_noise(stage1), candidates_optimum(beta, kl_coef), atol=0.06)
    if beta < 1:  # sharp weights, little KL: the optimum of AW-MLE is near the bandit's
        np.testing.assert_allclose(mean_noise(stage1), BEST, atol=0.12)


@pytest.mark.parametrize("pool_size", [64, 16])
def test_bandit_candidates_from_a_pool(pool_size: int) -> None:
    """
    Decoded and scored once. All candidates come from the prior, so the fixed point is the weighted mean of 16 of them; a pool
    of 16 a state is a little noisier, since each state's candidates are always the same.
    """
    decoded = []
    flow = bandit_flow(TargetCritic())
    flow.decode = lambda cond, w, *args, decode=flow.decode: decoded.append(w[..., 0, 0].numel()) or decode(cond, w, *args)
    demos = bandit_demos()
    stage1 = pretrain_latent(flow, demos, weighting="candidates", beta=0.3, kl_coef=1e-3, pool_size=pool_size, **FAST)
    assert sum(decoded) == 100 * pool_size
    np.testing.assert_allclose(mean_noise(stage1), candidates_optimum(0.3, 1e-3), atol=0.06 if pool_size == 64 else 0.15)
    with pytest.raises(ValueError, match="pool_size must be at least 16, found 8"):
        pretrain_latent(flow, demos, weighting="candidates", pool_size=8)


def test_bandit_candidates_with_a_critic_learned_from_rollouts(rollouts: Rollouts) -> None:
    flow = bandit_flow()
    before = deepcopy(flow.state_dict())
    stage1 = pretrain_latent(flow, rollouts=rollouts, weighting="candidates", beta=0.2, kappa=0.0, **FAST)
    np.testing.assert_allclose(mean_noise(stage1), BEST, atol=0.2)
    assert all(th.equal(value, before[key]) for key, value in flow.state_dict().items())  # a copy of the critic was trained


@pytest.mark.parametrize("pool_size", [None, 20])
def test_candidates_of_shared_noise(pool_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """steer_mode="shared": candidates are single entries of the noise, scored by what they become when repeated."""
    monkeypatch.setattr("sb3_dsrl.stage1.fit.train_critic", partial(train_critic, n_iterations=5))
    flow = tiny_flow()
    assert flow.critic is not None
    flow.critic.updates += 1
    env = FORMS["vec form"](flow, [scripted(time_limit=9) for _ in range(2)], steer_mode="shared")
    model = PPO("LatentPolicy", env, gamma=0.99**3, n_steps=4, batch_size=8)
    rollouts = collect_rollouts("prior", env, episodes=4)
    policy = pretrain_latent(model, rollouts=rollouts, weighting="candidates", n_iterations=3, pool_size=pool_size)
    assert policy.pi(th.zeros(5, flow.cond_dim)).mode().shape == (5, 2)
    noise = Steering(flow, Contract.of(flow, steer_mode="shared")).prior(3, 5)
    assert noise.shape == (3, 5, 4, 2) and th.equal(noise, noise[:, :, :1].expand_as(noise)) and noise.std() > 0.5
    full = FORMS["vec form"](flow, [scripted(time_limit=9)])
    with pytest.raises(ValueError, match="The rollouts steer 4 entries of the noise, expected 1: see steer_mode"):
        pretrain_latent(model, rollouts=collect_rollouts("prior", full, episodes=2))


# Where candidates come from


@pytest.mark.parametrize("pool_size", [None, 20])
@pytest.mark.parametrize("steer_mode", ["full", "act_horizon", "shared"])
def test_candidates_are_noises_that_rl_could_choose(
    steer_mode: SteerMode, pool_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bounds, and alike within a state in what is not steered: else the luck of tails would be weighed."""
    monkeypatch.setattr("sb3_dsrl.stage1.fit.train_critic", lambda flow, *args, critic, **kwargs: critic)
    flow = tiny_flow()
    env = FORMS["vec form"](flow, [scripted(time_limit=9)], steer_mode=steer_mode, noise_bound=0.5)
    model = PPO("LatentPolicy", env, gamma=0.99**3, n_steps=4, batch_size=4)
    rollouts = collect_rollouts("prior", env, episodes=2)
    decoded: list[th.Tensor] = []
    decode = flow.decode
    flow.decode = lambda cond, w, *args: decoded.append(w) or decode(cond, w, *args)  # type: ignore[method-assign, func-returns-value]
    pretrain_latent(model, rollouts=rollouts, weighting="candidates", n_iterations=2, pool_size=pool_size)
    several = [w for w in decoded if w.dim() == 4]
    assert several
    rows = Steering(flow, Contract.of(flow, steer_mode=steer_mode)).rows
    for w in several:
        steered, luck = w[:, :, rows], w.clone()
        assert steered.abs().max() <= 0.5 and steered.std(dim=1).min() > 0.01
        if steer_mode == "shared":
            assert th.equal(w, steered.expand_as(w))
        luck[:, :, rows] = 0.0
        assert th.equal(luck, luck[:, :1].expand_as(luck)) or steer_mode == "shared"
        assert len(w) < 2 or not th.equal(w[0], w[1])


# What a pool takes


def pooled(n: int, horizon: int = 1, pool_size: int = 16) -> PooledCandidates:
    steering = Steering(linear_flow(horizon=horizon))
    critic = steering.flow.critic
    assert critic is not None
    return PooledCandidates.build(Scorer(steering, critic, 1.0), th.randn(n, 2), pool_size, 4)


def per_state_bytes(pool: PooledCandidates) -> int:
    kept = [x for x in vars(pool).values() if isinstance(x, th.Tensor)]
    assert all(x.device.type == "cpu" for x in kept)
    return sum(x.untyped_storage().nbytes() for x in kept) - pool.bank.untyped_storage().nbytes()


def test_a_pool_takes_8_bytes_a_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a noise is: 100,000 states of 64 take 51 MB, beside features and bank."""
    monkeypatch.setattr(candidates, "BANK_SIZE", 512)
    for n in (100, 200):
        for horizon in (1, 8):
            pool = pooled(n, horizon)
            assert per_state_bytes(pool) == n * (16 * (4 + 4) + 2 * 4)
            assert pool.bank.untyped_storage().nbytes() == 512 * horizon * 2 * 4
    assert 100_000 * 64 * 8 < 52e6


@pytest.mark.parametrize("pool_size", [16, 100])
def test_no_block_exceeds_its_limit(pool_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the blocks change a score: pools of more noises than a block are cut, too."""
    monkeypatch.setattr(candidates, "MAX_NOISES", 48)
    sizes: list[int] = []
    score = candidates.score_noises

    def watched(steering: Steering, critic: Any, cond: th.Tensor, w: th.Tensor, kappa: float) -> th.Tensor:
        sizes.append(w.shape[0] * w.shape[1])
        return score(steering, critic, cond, w, kappa)

    monkeypatch.setattr(candidates, "score_noises", watched)
    steering = Steering(linear_flow())
    critic = steering.flow.critic
    assert critic is not None
    pool = PooledCandidates.build(Scorer(steering, critic, 1.0), th.randn(25, 2), pool_size, 4)
    assert max(sizes) <= 48 and sum(sizes) == 25 * pool_size
    expected = score(steering, critic, pool.cond, pool.bank[pool.index.long()], 1.0)
    th.testing.assert_close(pool.q, expected)
    cond, w, q = pool.sample(7)
    assert (cond.shape, w.shape, q.shape) == ((7, 2), (7, 4, 1, 2), (7, 4))
    th.testing.assert_close(q, score(steering, critic, cond, w, 1.0))
