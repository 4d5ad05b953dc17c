"""Executed noises: their advantages against a loop, and a bandit whose best noise is known."""

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from torch import nn

from sb3_dsrl import Rollouts, pretrain_latent
from sb3_dsrl.stage1.executed import executed_advantages
from tests.bandit import BEST, FAST, SMALL, bandit_env, bandit_flow, bandit_rollouts, made_rollouts, mean_noise


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


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return bandit_rollouts()


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
