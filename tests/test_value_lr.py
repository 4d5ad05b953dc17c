"""The value network's own learning rate, under every schedule and after every load."""

import pathlib
from typing import Any

import pytest
import torch as th
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import configure

from tests.models import N_STEPS, learning_rates, small


@pytest.mark.parametrize(("value_lr", "expected"), [(4e-3, 4e-3), (None, 1e-3), (1e-4, 1e-4)])
def test_value_lr_changes_the_value_networks_steps(value_lr: float | None, expected: float, tmp_path: pathlib.Path, env):
    model = small(env, learning_rate=1e-3, policy_kwargs=dict(value_lr=value_lr))
    assert learning_rates(model) == pytest.approx([1e-3, expected], rel=0.01)
    model._logger = configure(None, [])
    model._update_learning_rate(model.policy.optimizer)
    assert learning_rates(model) == pytest.approx([1e-3, expected], rel=0.01)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=env).learn(2 * N_STEPS)
    assert learning_rates(loaded) == pytest.approx([1e-3, expected], rel=0.01)


@pytest.mark.parametrize("rms_prop", [True, False])
def test_value_lr_works_with_the_optimisers_of_a2c(rms_prop: bool, env):
    model = A2C(
        "LatentPolicy", env, gamma=0.99**3, use_rms_prop=rms_prop, policy_kwargs=dict(value_lr=4e-3), learning_rate=1e-3
    )
    optimizer, steps = model.policy.optimizer, []
    for group in optimizer.param_groups:
        parameter = group["params"][0]
        before, parameter.grad = parameter.detach().clone(), th.ones_like(parameter)
        optimizer.step()
        steps.append(float((parameter - before).abs().mean()))
        optimizer.zero_grad()
    assert steps[1] / steps[0] == pytest.approx(4.0, rel=1e-3)


def test_value_lr_needs_an_optimiser_that_scales(env):
    with pytest.raises(ValueError, match="SGD knows no lr_scale: set value_lr=None"):
        small(env, policy_kwargs=dict(optimizer_class=th.optim.SGD))


def test_value_lr_follows_a_schedule_in_proportion(env):
    model = small(env, learning_rate=lambda progress: 1e-3 * progress, policy_kwargs=dict(value_lr=4e-3))
    model._logger = configure(None, [])
    model._current_progress_remaining = 0.25
    model._update_learning_rate(model.policy.optimizer)
    assert learning_rates(model) == pytest.approx([2.5e-4, 1e-3], rel=0.01)


def trained_at(model: Any, progress: float) -> list[float]:
    """Learning rates of policy and value network at a point of the training."""
    model._logger = configure(None, [])
    model._current_progress_remaining = progress
    model._update_learning_rate(model.policy.optimizer)
    return learning_rates(model)


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_value_lr_under_a_schedule_that_warms_up(start: float, env):
    """Fault e: the scale is the ratio to the schedule's peak, not to its start."""
    model = small(env, learning_rate=lambda progress: max(start, 1e-3 * min(1.0, 2 * (1 - progress))))
    assert trained_at(model, 0.5) == pytest.approx([1e-3, 1e-3], rel=0.01)
    model = small(
        env,
        learning_rate=lambda progress: max(start, 1e-3 * min(1.0, 2 * (1 - progress))),
        policy_kwargs=dict(value_lr=4e-3),
    )
    assert trained_at(model, 0.5) == pytest.approx([1e-3, 4e-3], rel=0.01)
    assert trained_at(model, 0.75) == pytest.approx([5e-4, 2e-3], rel=0.01)
    if start:
        assert trained_at(model, 1.0) == pytest.approx([start, 4 * start], rel=0.01)


def test_value_lr_after_a_load_with_another_learning_rate(tmp_path: pathlib.Path, env):
    """Fault e: the saved ratio belongs to the saved schedule."""
    model = small(env, learning_rate=1e-3, policy_kwargs=dict(value_lr=4e-3)).learn(2 * N_STEPS)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=env, learning_rate=2e-3)
    assert trained_at(loaded, 1.0) == pytest.approx([2e-3, 4e-3], rel=0.01)
    assert trained_at(PPO.load(tmp_path / "model", env=env), 1.0) == pytest.approx([1e-3, 4e-3], rel=0.01)
