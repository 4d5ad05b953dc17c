"""AR(1) noise: what is drawn, its exact density, and a chain that nothing else explores."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch.distributions import MultivariateNormal, Normal

from sb3_dsrl import CorrelatedRolloutBuffer, LatentPolicy, evaluate, ppo_kwargs
from sb3_dsrl.stage2.correlation import Previous, carried
from tests.envs import vec_steered
from tests.toys import linear_flow

RHO = 0.8


class Chain(gym.Env):
    """Position x moves by the action, 24 steps long; success is x >= 4 at the end, and nothing else is rewarded."""

    def __init__(self, length: int = 24, goal: float = 4.0) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.length, self.goal = length, goal

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.x = 0, 0.0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.x += float(action[0])
        ended = self.t == self.length
        success = ended and self.x >= self.goal
        return self._obs(), float(success), ended, False, {"success": success}

    def _obs(self) -> np.ndarray:
        return np.array([self.x / 3, self.t / self.length], np.float32)


def chain_model(rho: float, n_envs: int = 16, algorithm: type = PPO, **kwargs: Any) -> Any:
    env = vec_steered(linear_flow(action_dim=1), [Chain() for _ in range(n_envs)])
    own: dict[str, Any] = dict(n_steps=48, policy_kwargs=dict(log_std_init=float(np.log(0.15)), net_arch=[32], prior_mix=0.0))
    own = ppo_kwargs(env, noise_correlation=rho, **(dict(seed=0) | own | kwargs))
    if algorithm is A2C:
        for name in ("n_epochs", "batch_size", "clip_range"):
            del own[name]
    return algorithm("LatentPolicy", env, **own)


class Ratios(BaseCallback):
    """PPO's ratios between a rollout and its update, and the actions of the rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.ratios: list[th.Tensor] = []
        self.actions: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer
        self.actions.append(buffer.actions.copy())
        with th.no_grad():
            for batch in buffer.get(100):
                _, log_prob, _ = self.model.policy.evaluate_actions(batch.observations, batch.actions)
                self.ratios.append((log_prob - batch.old_log_prob).exp())


def shaken(model: Any) -> Any:
    """Mean and std depend on the state."""
    with th.no_grad():
        for weights in (model.policy.action_net.weight, model.policy.action_net.bias):
            weights += 0.3 * th.randn(weights.shape, generator=th.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_ratio_is_one_before_every_update(algorithm: type) -> None:
    """In the first rollout and, after weights have changed and episodes have ended inside, in those that follow."""
    model, ratios = shaken(chain_model(RHO, n_envs=3, n_steps=40, algorithm=algorithm)), Ratios()
    model.learn(3 * 120, ratios)
    assert len(ratios.ratios) == 6 and isinstance(model.rollout_buffer, CorrelatedRolloutBuffer)
    np.testing.assert_allclose(th.cat(ratios.ratios).numpy(), 1.0, atol=2e-4)


def test_an_evaluation_inside_a_rollout_changes_nothing() -> None:
    class Evaluates(Ratios):
        def _on_step(self) -> bool:
            if self.n_calls % 7 == 0:
                self.model.predict(np.zeros((5, 2), np.float32))
            return True

    model, ratios = shaken(chain_model(RHO, n_envs=3, n_steps=40)), Evaluates()
    model.learn(2 * 120, ratios)
    np.testing.assert_allclose(th.cat(ratios.ratios).numpy(), 1.0, atol=2e-4)


def test_density_is_that_of_the_whole_trajectory() -> None:
    """The product of the conditional densities is the joint normal density of all noises, with covariance rho^|i - j|."""
    generator = th.Generator().manual_seed(0)
    mean, std = th.randn(6, generator=generator), th.rand(6, generator=generator) + 0.2
    w = th.randn(6, generator=generator)
    total = Normal(mean[0], std[0]).log_prob(w[0])
    for t in range(1, 6):
        now, before = Normal(mean[t].view(1, 1), std[t].view(1, 1)), Normal(mean[t - 1].view(1, 1), std[t - 1].view(1, 1))
        previous = Previous(th.zeros(1, 2), w[t - 1].view(1, 1), th.ones(1, 1, dtype=th.bool))
        given_mean, given_log_std = carried(now, before, previous, RHO)
        total = total + Normal(given_mean, given_log_std.exp()).log_prob(w[t]).sum()
    lag = (th.arange(6)[:, None] - th.arange(6)).abs()
    joint = MultivariateNormal(mean, std[:, None] * RHO**lag * std)
    assert total.item() == pytest.approx(joint.log_prob(w).item(), abs=1e-4)


def test_noise_has_its_std_and_its_correlation() -> None:
    model, seen = chain_model(RHO, n_envs=64, n_steps=64, n_epochs=1), Ratios()
    model.learn(64 * 64, seen)
    z = seen.actions[0][..., 0] / 0.15  # (steps, N), before any update
    assert z.std() == pytest.approx(1.0, abs=0.05)
    for lag in (1, 2, 5):
        assert (z[lag:] * z[:-lag]).mean() == pytest.approx(RHO**lag, abs=0.08)
    first = seen.actions[0][0, :, 0] / 0.15
    assert first.std() == pytest.approx(1.0, abs=0.3)


def test_only_correlated_noise_explores_a_chain() -> None:
    """A random walk of std 0.15 is 0.73 from where it started after 24 steps; the goal is 4 away."""
    found = {}
    for rho in (0.0, 0.95):
        model = chain_model(rho)
        model.learn(9_000)
        found[rho] = evaluate(model, model.get_env(), 16).success_at_end
    assert found == {0.0: 0.0, 0.95: 1.0}


def test_a_policy_on_disk_keeps_it(tmp_path: Any) -> None:
    model = chain_model(RHO, n_envs=2)
    model.learn(96)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=model.get_env())
    assert loaded.policy.noise_correlation == RHO and loaded.rollout_buffer_class is CorrelatedRolloutBuffer
    loaded.learn(96, ratios := Ratios())
    np.testing.assert_allclose(th.cat(ratios.ratios).numpy(), 1.0, atol=2e-4)
    model.policy.save(tmp_path / "policy")
    assert LatentPolicy.load(tmp_path / "policy").noise_correlation == RHO


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"noise_correlation must lie in \[0, 1\), found 1.0"):
        chain_model(1.0)
    with pytest.raises(ValueError, match=r"noise_correlation needs prior_mix=0, found 0\.1"):
        chain_model(RHO, policy_kwargs=dict(prior_mix=0.1))
    model = chain_model(RHO, n_envs=2, rollout_buffer_class=None)
    with pytest.raises(ValueError, match="needs rollout_buffer_class=CorrelatedRolloutBuffer"):
        model.learn(96)
