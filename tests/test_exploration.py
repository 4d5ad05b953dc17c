"""Exploration that holds: where stage 2 starts, what learns first, how far it may fall; tickets by the first observation."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import (
    KeepBest,
    SuccessEvalCallback,
    ValueWarmup,
    choose_policy,
    collect_rollouts,
    evaluate,
    find_ticket_bandit,
    ppo_kwargs,
    start_around,
    steerability,
)
from sb3_dsrl.evaluation.ticket_bandit import _judge
from tests.bandit import BEST, SMALL, bandit_env, bandit_flow, bandit_model
from tests.envs import FORMS, vec_steered
from tests.toys import linear_flow


def weights(model: PPO, value: bool) -> list[th.Tensor]:
    return [p.detach().clone() for p in model.policy.optimizer.param_groups[int(value)]["params"]]


def changed(before: list[th.Tensor], after: list[th.Tensor]) -> bool:
    return any(not th.equal(a, b) for a, b in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------------------------------ start


class NearZero(gym.Env):
    """Success if the action lies within 0.2 of a target."""

    def __init__(self, target: float) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.target = target

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.standard_normal(2).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        good = bool(abs(action[0] - self.target) < 0.2)
        return np.zeros(2, np.float32), float(good), True, False, {"success": good}


@pytest.mark.parametrize("target", [0.0, 0.7])
def test_start_around_what_a_report_found(target: float) -> None:
    flow = linear_flow(action_dim=1)
    env = vec_steered(flow, [NearZero(target) for _ in range(4)])
    report = steerability(flow, env)
    kwargs = start_around(report, std=0.1)
    assert kwargs["log_std_init"] == pytest.approx(np.log(0.1)) and kwargs["prior_mix"] == 0.0
    assert ("centre" in kwargs) == (target != 0.0)
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=kwargs, seed=0))
    assert evaluate(model, env, 16).success_at_end == 1.0
    w = np.array([model.policy.sample(th.zeros(500, 2)).detach().numpy()])
    assert w.std() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_allclose(w.mean(), report.search.w.item() if target else 0.0, atol=0.02)


def test_start_around_other_finds() -> None:
    env = vec_steered(flow := linear_flow(action_dim=1), [NearZero(0.7) for _ in range(4)])
    ticket = np.full((1, 1), 0.7, np.float32)
    choice = choose_policy({"prior": "prior", "ticket": ticket}, env)
    assert choice.name == "ticket" and start_around(choice)["centre"] is ticket
    assert start_around("zero", 0.3) == dict(log_std_init=pytest.approx(np.log(0.3)), prior_mix=0.0)
    assert start_around(flow) == start_around("prior") == dict(log_std_init=0.0, prior_mix=0.0)
    with pytest.raises(ValueError, match="std must be positive and finite, found 0"):
        start_around("zero", 0)
    with pytest.raises(ValueError, match="starts from a free control, found 'best'"):
        start_around("best")
    with pytest.raises(ValueError, match="starts from a free control, found LatentPolicy"):
        start_around(bandit_model(bandit_flow()).policy)


# ---------------------------------------------------------------------------------------------------------- value warm-up


def test_the_value_function_learns_first() -> None:
    model = bandit_model(bandit_flow())
    seen: list[tuple[bool, bool]] = []

    class Watches(BaseCallback):
        def _on_rollout_start(self) -> None:
            if hasattr(self, "before"):
                now = [weights(self.model, value) for value in (False, True)]  # type: ignore[arg-type]
                seen.append(tuple(changed(a, b) for a, b in zip(self.before, now, strict=True)))  # type: ignore[arg-type]
            self.before = [weights(self.model, value) for value in (False, True)]  # type: ignore[arg-type]

        def _on_step(self) -> bool:
            return True

    model.learn(64 * 5, [ValueWarmup(2), Watches()])
    assert seen == [(False, True), (False, True), (True, True), (True, True)]
    assert model.policy.optimizer.param_groups[0]["lr_scale"] == 1.0


def test_the_value_of_the_start_is_what_is_learned() -> None:
    """One-step episodes whose value is the mean reward of N(0, I), -(2/16 + |best/4|^2), up to clipping."""
    model = bandit_model(bandit_flow(), n_steps=128, batch_size=64, n_epochs=10)
    model.learn(4 * 128 * 8, ValueWarmup(8))
    with th.no_grad():
        values = model.policy.predict_values(th.randn(256, 2, generator=th.Generator().manual_seed(0)))
    assert values.mean().item() == pytest.approx(-(2 / 16 + np.square(BEST / 4).sum()), abs=0.03)


def test_warm_up_goes_on_after_a_resume_and_refuses_others() -> None:
    warmup = ValueWarmup(3)
    warmup.load_state_dict(dict(done=2))
    model = bandit_model(bandit_flow())
    before = weights(model, False)
    model.learn(64, warmup)
    assert not changed(before, weights(model, False)) and warmup.state_dict() == dict(done=3)
    model.learn(64, warmup)
    assert changed(before, weights(model, False))
    with pytest.raises(ValueError, match="n_rollouts must be at least 1, found 0"):
        ValueWarmup(0)
    other = PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8)
    with pytest.raises(ValueError, match=r"ValueWarmup needs 'LatentPolicy' with an optimiser of .* found ActorCriticPolicy"):
        other.learn(8, ValueWarmup())


# -------------------------------------------------------------------------------------------------------------- keep best


class Ruins(BaseCallback):
    """Moves the policy's mean far away, after the second update."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts = 0

    def _on_rollout_start(self) -> None:
        self.rollouts += 1
        if self.rollouts == 3:
            with th.no_grad():
                self.model.policy.action_net.bias[:2] = 3.0  # type: ignore[union-attr]

    def _on_step(self) -> bool:
        return True


def good_model(**kwargs: Any) -> PPO:
    env = bandit_env(bandit_flow(), n_envs=4)
    own = SMALL | start_around(BEST[None], 0.1)
    return PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=16, policy_kwargs=own, learning_rate=1e-5, seed=0, **kwargs))


def test_a_policy_that_falls_gets_its_best_weights_back() -> None:
    model = good_model()
    curve = SuccessEvalCallback(bandit_env(bandit_flow(), n_envs=4), eval_freq=64, n_eval_episodes=8)
    best = KeepBest(curve)
    model.learn(64 * 6, [Ruins(), curve, best])
    success = [point[1].success_at_end for point in curve.history]
    assert success[:4] == [1.0, 1.0, 1.0, 0.0] and success[4:] == [1.0] * len(success[4:])
    assert best.restored == [64 * 3] and best.best_success == 1.0
    assert evaluate(model, curve.eval_env, 8).success_at_end == 1.0


def test_at_the_end_the_best_stays_even_within_the_bound() -> None:
    model = good_model()
    curve = SuccessEvalCallback(bandit_env(bandit_flow(), n_envs=4), eval_freq=64, n_eval_episodes=8)
    best = KeepBest(curve, max_drop=2.0)
    model.learn(64 * 4, [Ruins(), curve, best])
    assert best.restored == [] and curve.history[-1][1].success_at_end == 0.0
    assert evaluate(model, curve.eval_env, 8).success_at_end == 1.0
    again = KeepBest(curve)
    again.load_state_dict(best.state_dict())
    assert again.best_success == 1.0


def test_keep_best_needs_a_curve_before_it() -> None:
    curve = SuccessEvalCallback(bandit_env(bandit_flow(), n_envs=4), n_eval_episodes=4)
    with pytest.raises(ValueError, match=r"pass callback=\[curve, KeepBest\(curve\)\], in this order"):
        good_model().learn(64, [KeepBest(curve), curve])
    with pytest.raises(ValueError, match="max_drop must be 0 or positive, found -1"):
        KeepBest(curve, -1)


# --------------------------------------------------------------------------------------------------------- ticket bandit


class TwoSides(gym.Env):
    """
    Three steps; the first observation says on which side the action must lie all the time, the others say nothing. With
    ``blind`` it must always be positive.
    """

    def __init__(self, blind: bool = False) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.blind = blind

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        self.side, self.good, self.t = 1.0 if self.blind or obs[0] > 0 else -1.0, True, 0
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.good &= bool(action[0] * self.side > 0)
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return obs, 0.0, self.t == 3, False, {"success": self.good and self.t == 3}


def two_sides(form: str = "vec form", blind: bool = False, n_envs: int = 4) -> VecEnv:
    return FORMS[form](linear_flow(obs_dim=3, action_dim=1), [TwoSides(blind) for _ in range(n_envs)])


SIDES = np.array([[[-0.5]], [[0.5]], [[0.0]]], np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_the_best_ticket_depends_on_the_first_observation(form: str) -> None:
    env = two_sides(form)
    bandit = find_ticket_bandit(env, episodes=64, noises=SIDES)
    assert np.isfinite(bandit.ridge) and bandit.best_single < 0.7 < 0.9 < bandit.success_at_end
    assert bandit.env_steps == 3 * 64 * 3
    assert bandit.choose(np.array([[-0.8, 0, 0], [0.8, 0, 0]])).tolist() == [0, 1]
    fresh = {name: evaluate(actor, env, 100).success_at_end for name, actor in dict(both=bandit, one=SIDES[1]).items()}
    assert fresh["both"] > 0.9 and fresh["one"] < 0.65
    rollouts = collect_rollouts(bandit, env, 8)
    assert all(len(np.unique(rollouts.w[rollouts.episode == i])) == 1 for i in range(8))  # held to the end
    choice = choose_policy({"one": SIDES[1], "bandit": bandit}, env)
    assert choice.name == "bandit"


def test_where_the_start_says_nothing_one_ticket_is_chosen() -> None:
    bandit = find_ticket_bandit(two_sides(blind=True), n_tickets=6, episodes=32)
    assert bandit.ridge == np.inf and bandit.success_at_end == bandit.best_single == 1.0
    obs = np.random.default_rng(0).standard_normal((50, 3))
    assert len(np.unique(bandit.choose(obs))) == 1 and bandit.noises[bandit.choose(obs)[0]].item() > 0


def test_leaving_one_out_is_exact() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((12, 3))
    z -= z.mean(axis=0)
    success = rng.integers(0, 2, (12, 4)).astype(float)
    for ridge in (0.7, 20.0):
        picked = []
        for i in range(12):
            rest = np.arange(12) != i
            x = np.column_stack([z[rest], np.ones(11)])
            w = np.linalg.solve(x.T @ x + np.diag([ridge] * 3 + [0]), x.T @ success[rest])
            picked.append(success[i, (np.append(z[i], 1) @ w).argmax()])
        value, weights = _judge(z, success, ridge)
        assert value == pytest.approx(np.mean(picked))
        x = np.column_stack([z, np.ones(12)])
        np.testing.assert_allclose(weights, np.linalg.solve(x.T @ x + np.diag([ridge] * 3 + [0]), x.T @ success), atol=1e-9)


def test_ticket_bandit_refuses() -> None:
    env = two_sides()
    for kwargs, message in (
        (dict(episodes=3), "episodes must be at least 4, found 3"),
        (dict(n_tickets=1), "A choice needs at least 2 tickets, found 1"),
        (dict(noises=np.zeros((4, 2, 1))), r"tickets of shape \(1, 1\), found \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            find_ticket_bandit(env, **kwargs)  # type: ignore[arg-type]
    bandit = find_ticket_bandit(env, episodes=8, noises=SIDES)
    with pytest.raises(ValueError, match="call begin"):
        bandit.predict(np.zeros((7, 3), np.float32))
