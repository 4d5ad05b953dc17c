"""Stage 1: the AW-MLE weights and loss against brute force, and a bandit whose best noise is known, for stages 1 and 2."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    LatentPolicy,
    LatentSteeringWrapper,
    Rollouts,
    VecLatentSteering,
    aw_mle_loss,
    collect_rollouts,
    pretrain_latent,
    train_critic,
)
from sb3_dsrl.stage0.demos import Demos, Episode
from sb3_dsrl.stage1.candidates import candidate_weights, effective_number, soft_baseline
from sb3_dsrl.stage1.executed import executed_advantages
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.steering.steering import Steering
from tests.envs import FORMS, scripted, tiny_flow
from tests.test_offline import scalars
from tests.toys import BanditEnv, linear_flow

#: The bandit's best noise. The flow divides noise by 4, so that no noise within the bounds is clipped.
BEST = np.array([0.7, -0.5], np.float32)
SMALL = dict(net_arch=dict(pi=[32], vf=[32]))
#: Stage 1 in about a second
FAST: dict[str, Any] = dict(policy_kwargs=SMALL, learning_rate=1e-2, n_iterations=200, batch_size=64, seed=0)


# Weights of candidates


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


# The loss


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


# Advantages of executed noise


def made_rollouts(lengths: tuple[int, ...] = (3, 1, 4, 2), terminated: tuple[int, ...] = (0, 3), **kwargs: Any) -> Rollouts:
    """Random whole episodes; the first feature is the number of the episode."""
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    n, last = len(episode), np.cumsum(lengths) - 1
    discount = 0.9 ** rng.integers(1, 4, n)  # chunks of different lengths
    discount[last[list(terminated)]] = 0.0
    cond = rng.standard_normal((n, 2)).astype(np.float32)
    cond[:, 0] = episode
    columns = [cond, rng.standard_normal((n, 1, 2)), rng.uniform(-1, 1, (n, 1, 2)), rng.standard_normal(n), discount, cond]
    tensors = [th.from_numpy(np.asarray(column, np.float32)) for column in columns]
    rest = dict(episode=episode, success_at_end=np.zeros(len(lengths), bool), env_steps=n, contract=Contract("none", 1, 0.9))
    return Rollouts(*tensors, **(rest | kwargs))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_gae_against_a_loop(monkeypatch: pytest.MonkeyPatch, gae_lambda: float) -> None:
    rollouts = made_rollouts()
    value = th.randn(len(rollouts), generator=th.Generator().manual_seed(0))
    asked: dict[str, Any] = {}

    def fixed_value(inputs: th.Tensor, targets: th.Tensor, episode: np.ndarray, *args: Any) -> th.Tensor:
        asked.update(inputs=inputs, targets=targets, episode=episode)
        return value

    monkeypatch.setattr("sb3_dsrl.stage1.executed._cross_fitted_value", fixed_value)
    found = executed_advantages(rollouts, gae_lambda)
    reward, discount = rollouts.reward.tolist(), rollouts.discount.tolist()
    for i in range(len(rollouts)):
        same = [j for j in range(i, len(rollouts)) if rollouts.episode[j] == rollouts.episode[i]]
        advantage, target, factor, power = 0.0, 0.0, 1.0, 1.0
        for j in same:
            next_value = value[j + 1].item() if j != same[-1] else 0.0
            advantage += factor * (reward[j] + discount[j] * next_value - value[j].item())
            target += power * reward[j]
            factor *= gae_lambda * discount[j]
            power *= discount[j]
        assert found[i].item() == pytest.approx(advantage, rel=1e-5, abs=1e-5)
        assert asked["targets"][i].item() == pytest.approx(target, rel=1e-5, abs=1e-5)
    assert th.equal(asked["inputs"][:, :2], rollouts.cond)
    np.testing.assert_allclose(asked["inputs"][:, 2], np.array([0, 1, 2, 0, 0, 1, 2, 3, 0, 1]) / 4)
    np.testing.assert_array_equal(asked["episode"], rollouts.episode)


def test_value_of_an_episode_never_trained_on_it() -> None:
    """Watches what each value network sees while it learns and while it is used."""
    rollouts = made_rollouts(lengths=(2, 3, 1, 2, 4, 1), terminated=())
    learned: dict[int, set[int]] = {}
    used: dict[int, set[int]] = {}
    nets: list[nn.Module] = []  # kept alive, so that no id comes twice

    def watch(module: nn.Module, args: tuple[th.Tensor]) -> None:
        if isinstance(module, nn.Sequential):
            nets.append(module)
            seen = learned if th.is_grad_enabled() else used
            seen.setdefault(id(module), set()).update(args[0][:, 0].int().tolist())

    handle = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        executed_advantages(rollouts, n_folds=4, n_iterations=5)
    finally:
        handle.remove()
    assert len(used) == 4 and used.keys() == learned.keys()
    assert set().union(*used.values()) == set(range(6))
    for key, episodes in used.items():
        assert learned[key] == set(range(6)) - episodes


def test_value_explains_what_time_and_features_explain() -> None:
    """Reward is the feature, plus luck: the advantage is the luck."""
    th.manual_seed(0)
    rollouts = made_rollouts(lengths=(1,) * 600, terminated=())
    luck = rollouts.w.mean(dim=(1, 2))
    rollouts.cond[:, 0] = 0.0
    rollouts.reward[:] = 3.0 + rollouts.cond[:, 1] + luck
    advantage = executed_advantages(rollouts)
    assert np.corrcoef(advantage, luck)[0, 1] > 0.95
    assert (advantage - luck).abs().mean() < 0.25


# A bandit with a known optimum: the reward is -||w - BEST||^2 / 16, whatever the observation


class TargetCritic(nn.Module):
    """Knows the bandit's reward, up to an offset and a slope in the first feature. Its two heads disagree."""

    updates = 1  # hand-made, hence as good as trained

    def __init__(self, offset: float = 0.0, slope: float = 0.0) -> None:
        super().__init__()
        self.offset, self.slope = offset, slope

    def forward(self, cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
        of_cond = (self.offset + self.slope * cond[:, 0]).reshape(-1, *[1] * (chunk.dim() - 3))
        q = of_cond - (chunk[..., 0, :] - th.from_numpy(BEST / 4)).pow(2).sum(dim=-1)
        return th.stack([q - 0.1, q + 0.1])

    def get_ucb_q(self, cond: th.Tensor, chunk: th.Tensor, kappa: float) -> th.Tensor:
        return self(cond, chunk).mean(dim=0) - 0.1 * kappa


def bandit_flow(critic: nn.Module | None = None) -> FlowPolicy:
    th.manual_seed(0)
    flow = linear_flow(a=-0.75, num_steps=1)
    if critic is not None:
        flow.critic = critic  # type: ignore[assignment]
    return flow


def bandit_env(flow: FlowPolicy, n_envs: int = 8) -> VecEnv:
    env = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(BEST / 4), 1)] * n_envs), flow)
    env.seed(0)
    return env


def bandit_demos(n: int = 100) -> Demos:
    """Actions that say nothing, with their rewards."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(n):
        obs, action = rng.standard_normal((2, 2)).astype(np.float32), rng.uniform(-1, 1, (1, 2)).astype(np.float32)
        reward = -np.square(action - BEST / 4).sum(axis=1)
        episodes.append(Episode(obs, action, reward, np.ones(1, bool), None))
    return Demos(Path("bandit.h5"), episodes, "Bandit", "state", "none", None)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    flow = bandit_flow()
    return collect_rollouts(flow, bandit_env(flow), 2_000, seed=0)


def mean_noise(policy: LatentPolicy) -> np.ndarray:
    """Mean over states of pi's mean, (A,)."""
    obs = th.randn(500, 2, generator=th.Generator().manual_seed(0))
    with th.no_grad():
        return policy.sample(obs, deterministic=True).mean(dim=(0, 1)).numpy()


def candidates_optimum(beta: float, kl_coef: float) -> np.ndarray:
    """Optimum of AW-MLE on the bandit for a std of 1: mu (1 + kl_coef) = E[sum weights * w], 16 candidates of the prior."""
    w = np.random.default_rng(0).standard_normal((50_000, 16, 2))
    q = -np.square(w - BEST).sum(axis=2)
    raw = np.exp((q - q.mean(axis=1, keepdims=True)) / q.std(axis=1, ddof=1, keepdims=True) / beta)
    return ((raw / raw.sum(axis=1, keepdims=True))[..., None] * w).sum(axis=1).mean(axis=0) / (1 + kl_coef)


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


@pytest.mark.parametrize(("beta", "max_weight", "kl_coef"), [(0.3, 20.0, 1e-2), (0.3, 20.0, 1.0), (0.1, 1e4, 1e-2)])
def test_bandit_executed(rollouts: Rollouts, beta: float, max_weight: float, kl_coef: float) -> None:
    kwargs = FAST | dict(beta=beta, max_weight=max_weight, kl_coef=kl_coef, batch_size=512)
    stage1 = pretrain_latent(bandit_flow(), rollouts=rollouts, **kwargs)
    # With the std held at 1 the optimum is the weighted mean of the noises, pulled to 0 by the KL. All states have the same
    # value here, so the reward is the advantage but for a shift.
    reward, w = rollouts.reward.numpy(), rollouts.w[:, 0].numpy()
    raw = np.minimum(np.exp((reward - reward.mean()) / reward.std() / beta), max_weight)
    optimum = (raw[:, None] * w).sum(axis=0) / raw.sum() / (1 + kl_coef)
    np.testing.assert_allclose(mean_noise(stage1), optimum, atol=0.08)
    if beta < 0.3:  # sharp weights, little KL: the optimum of AW-MLE is near the bandit's
        np.testing.assert_allclose(mean_noise(stage1), BEST, atol=0.15)


def test_bandit_stage2() -> None:
    flow = bandit_flow()
    env = bandit_env(flow)
    model = PPO(
        "LatentPolicy",
        env,
        gamma=env.macro_gamma,
        n_steps=64,
        batch_size=128,
        n_epochs=5,
        learning_rate=5e-3,
        policy_kwargs=SMALL,
        seed=0,
        device="cpu",
    )
    np.testing.assert_array_equal(mean_noise(model.policy), np.zeros(2))
    model.learn(12_000)
    np.testing.assert_allclose(mean_noise(model.policy), BEST, atol=0.12)


def test_rollouts_are_the_prior_on_the_bandit(rollouts: Rollouts) -> None:
    """What the tests above rest on."""
    assert len(rollouts) == rollouts.env_steps == 2_000
    assert abs(float(rollouts.w.mean())) < 0.05 and float(rollouts.w.std()) == pytest.approx(1.0, abs=0.05)
    th.testing.assert_close(rollouts.chunk, rollouts.w / 4)
    np.testing.assert_allclose(rollouts.reward, -np.square(rollouts.chunk[:, 0] - BEST / 4).sum(axis=1), rtol=1e-5, atol=1e-6)
    assert (rollouts.discount == 0).all()


# What stage 1 leaves alone


QUICK: dict[str, Any] = dict(FAST, n_iterations=20)


@pytest.mark.parametrize("weighting", ["candidates", "executed"])
def test_std_is_held_unless_asked(rollouts: Rollouts, weighting: Any) -> None:
    obs = th.randn(50, 2)
    for learn_std in (False, True):
        stage1 = pretrain_latent(
            bandit_flow(TargetCritic()),
            bandit_demos(),
            None if weighting == "candidates" else rollouts,
            weighting=weighting,
            learn_std=learn_std,
            **QUICK,
        )
        std = stage1.pi(obs).distribution.stddev
        assert th.equal(std, th.ones_like(std)) != learn_std
        assert mean_noise(stage1)[0] > 0.02  # the mean is learned in any case


def bandit_model(flow: FlowPolicy, **kwargs: Any) -> PPO:
    env = bandit_env(flow, n_envs=4)
    defaults = dict(gamma=env.macro_gamma, n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=SMALL, seed=1, device="cpu")
    return PPO("LatentPolicy", env, **(defaults | kwargs))


@pytest.mark.parametrize("weighting", ["candidates", "executed"])
def test_model_in_place(rollouts: Rollouts, weighting: Any) -> None:
    flow = bandit_flow(TargetCritic())
    model = bandit_model(flow)
    model.learn(128)  # so that the optimiser has a state
    optimizer = model.policy.optimizer
    before, weights = deepcopy(optimizer.state_dict()), deepcopy(model.policy.state_dict())
    prior_mix, mean, fingerprint = float(model.policy.prior_mix), mean_noise(model.policy), flow.fingerprint()
    data = rollouts if weighting == "executed" else None
    kwargs = {key: value for key, value in FAST.items() if key != "policy_kwargs"}
    found = pretrain_latent(model, bandit_demos(), data, weighting=weighting, beta=0.3, **kwargs)
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


# What stage 1 returns


def test_returned_policy_saves_loads_and_copies(rollouts: Rollouts, tmp_path: Path) -> None:
    flow = bandit_flow()
    stage1 = pretrain_latent(flow, rollouts=rollouts, **QUICK)
    assert isinstance(stage1, LatentPolicy) and not stage1.training
    assert stage1.flow_hash == flow.fingerprint()
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
    data = rollouts if weighting == "executed" else None
    flow = bandit_flow(TargetCritic())
    pretrain_latent(flow, bandit_demos(), data, weighting=weighting, tensorboard_log=tmp_path, **QUICK)
    assert scalars(tmp_path) == {name: [0, 19] for name in logged | {"stage1/loss"}}


# Refusals


def model_without_env() -> PPO:
    model = bandit_model(bandit_flow())
    model.env = None
    return model


def mlp_model() -> PPO:
    return PPO("MlpPolicy", LatentSteeringWrapper(BanditEnv(BEST / 4), bandit_flow()), device="cpu")


def flow_without_critic() -> FlowPolicy:
    flow = bandit_flow()
    flow.critic = None
    return flow


@pytest.mark.parametrize(
    ("target", "kwargs", "error", "sentence"),
    [
        (bandit_flow, dict(), ValueError, r"pretrain_latent needs demos, rollouts, or both"),
        (
            bandit_flow,
            dict(demos=bandit_demos(), weighting="best"),
            ValueError,
            r"weighting must be 'auto', 'candidates' or 'executed', found 'best'",
        ),
        (bandit_flow, dict(demos=bandit_demos(), n_candidates=1), ValueError, r"n_candidates must be at least 2, found 1"),
        (
            bandit_flow,
            dict(demos=bandit_demos(), weighting="executed"),
            ValueError,
            r"weighting='executed' weighs the noises of rollouts, but no rollouts were given",
        ),
        (
            bandit_flow,
            dict(rollouts=made_rollouts()),
            ValueError,
            r"The rollouts have flow='none', but the env has '[0-9a-f]{16}'",
        ),
        (
            bandit_flow,
            dict(rollouts=made_rollouts(contract=Contract.of(bandit_flow(), gamma=0.5))),
            ValueError,
            r"The rollouts have gamma=0.5, but the env has 0.9",
        ),
        (
            bandit_flow,
            dict(demos=bandit_demos(), beta=0.0),
            ValueError,
            r"beta is a temperature and must be positive, found 0.0",
        ),
        (bandit_flow, dict(demos=bandit_demos(), n_iterations=0), ValueError, r"n_iterations must be at least 1, found 0"),
        (bandit_flow, dict(demos=bandit_demos(), batch_size=0), ValueError, r"batch_size must be at least 1, found 0"),
        (bandit_flow, dict(demos=bandit_demos(), kl_coef=-1.0), ValueError, r"kl_coef must not be negative, found -1.0"),
        (bandit_flow, dict(demos=bandit_demos(), max_weight=0.0), ValueError, r"max_weight must be positive, found 0.0"),
        (bandit_flow, dict(demos=bandit_demos(), gae_lambda=2.0), ValueError, r"gae_lambda must lie in \[0, 1\], found 2.0"),
        (
            bandit_flow,
            dict(demos=bandit_demos()),
            ValueError,
            r"This flow's critic is untrained: call train_critic\(flow, demo_transitions\(flow, demos\)\) first",
        ),
        (
            flow_without_critic,
            dict(demos=bandit_demos()),
            ValueError,
            r"This flow has no critic to score candidates with: use weighting='executed' with rollouts",
        ),
        (
            lambda: linear_flow(obs_dim=5),
            dict(demos=bandit_demos()),
            ValueError,
            r"bandit.h5 does not fit the flow: the shape of an observation is \(2,\) in the demos, \(5,\) in the flow",
        ),
        (bandit_flow, dict(demos="none.h5"), FileNotFoundError, r"none.h5 does not exist; expected the demo file"),
        (
            lambda: "flow",
            dict(demos=bandit_demos()),
            TypeError,
            r"pretrain_latent expects a FlowPolicy or a model with 'LatentPolicy', found str",
        ),
        (
            mlp_model,
            dict(demos=bandit_demos()),
            ValueError,
            r"pretrain_latent expects a model with 'LatentPolicy', found ActorCriticPolicy",
        ),
        (
            model_without_env,
            dict(demos=bandit_demos()),
            ValueError,
            r"pretrain_latent needs the model's env to find the flow: call model.set_env\(env\) first",
        ),
    ],
)
def test_refusals(target: Callable[[], Any], kwargs: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        pretrain_latent(target(), **kwargs)


@pytest.mark.parametrize("weighting", ["candidates", "executed"])
def test_steering_the_executed_part_only(weighting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """steer_mode="act_horizon": stage 1 learns the first H of T entries, also from rollouts that steered all T."""
    monkeypatch.setattr("sb3_dsrl.stage1.pretrain.train_critic", partial(train_critic, n_iterations=5))
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
    with pytest.raises(ValueError, match="The rollouts steer 3 entries of the noise, expected 4: see steer_mode"):
        pretrain_latent(flow, rollouts=rollouts)


@pytest.mark.parametrize("pool_size", [None, 20])
def test_candidates_of_shared_noise(pool_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """steer_mode="shared": candidates are single entries of the noise, scored by what they become when repeated."""
    monkeypatch.setattr("sb3_dsrl.stage1.pretrain.train_critic", partial(train_critic, n_iterations=5))
    flow = tiny_flow()
    assert flow.critic is not None
    flow.critic.updates += 1
    env = FORMS["vec form"](flow, [scripted(time_limit=9) for _ in range(2)], steer_mode="shared")
    model = PPO("LatentPolicy", env, gamma=0.99**3, n_steps=4, batch_size=8)
    rollouts = collect_rollouts("prior", env, episodes=4)
    policy = pretrain_latent(model, rollouts=rollouts, weighting="candidates", n_iterations=3, pool_size=pool_size)
    assert policy.pi(th.zeros(5, flow.cond_dim)).mode().shape == (5, 2)
    noise = Steering(flow, steer_mode="shared").prior(3, 5)
    assert noise.shape == (3, 5, 4, 2) and th.equal(noise, noise[:, :, :1].expand_as(noise)) and noise.std() > 0.5
    full = FORMS["vec form"](flow, [scripted(time_limit=9)])
    with pytest.raises(ValueError, match="The rollouts steer 4 entries of the noise, expected 1: see steer_mode"):
        pretrain_latent(model, rollouts=collect_rollouts("prior", full, episodes=2))


def test_rollouts_are_not_taken_through_vec_normalize() -> None:
    env = VecNormalize(bandit_env(bandit_flow()))
    with pytest.raises(ValueError, match="needs the flow's own features and rewards: pass the env below VecNormalize"):
        collect_rollouts("prior", env, episodes=2)
