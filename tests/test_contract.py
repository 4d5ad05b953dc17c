"""The contract, the action space that carries it, and the defaults that it brings."""

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_dsrl import LatentSteeringWrapper, NoiseSpace
from sb3_dsrl.steering.contract import Contract, check_agreement
from sb3_dsrl.steering.vec_env import find_steering
from tests.envs import FORMS, scripted, tiny_flow


def contract(**change: Any) -> Contract:
    kwargs: dict[str, Any] = dict(flow_hash="hash", act_horizon=4, gamma=0.9, num_steps=2, noise_bound=3.0)
    kwargs |= dict(reward_mode="dense", ignore_terminations=True)
    return Contract(**(kwargs | change))


def test_noise_space_samples_the_clipped_prior():
    space = NoiseSpace((4, 2), contract(noise_bound=1.5), seed=0)
    sample = np.stack([space.sample() for _ in range(2000)])
    assert sample.dtype == np.float32 and space.contains(sample[0])
    # moments of N(0, 1) clipped at 1.5, and not of a uniform or a truncated one
    assert abs(sample.mean()) < 0.02
    assert np.mean(np.abs(sample) == 1.5) == pytest.approx(0.1336, abs=0.01)
    assert np.mean(np.abs(sample) < 0.5) == pytest.approx(0.3829, abs=0.015)
    space.seed(0)
    np.testing.assert_array_equal(space.sample(), sample[0])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda space: pickle.loads(pickle.dumps(space))])
def test_noise_space_round_trip(clone):
    space = NoiseSpace((4, 2), contract(), seed=3)
    twin = clone(space)
    assert twin == space and repr(twin) == repr(space)
    np.testing.assert_array_equal(twin.sample(), space.sample())


CHANGES = [
    dict(noise_bound=2.0),
    dict(flow_hash="other"),
    dict(gamma=0.8),
    dict(steer_mode="act_horizon"),
    dict(act_horizon=3),
    dict(reward_scale=10.0),
    dict(reward_mode="sparse"),
    dict(ignore_terminations=False),
    dict(residual_scale=0.1),
]


@pytest.mark.parametrize("change", CHANGES)
def test_noise_spaces_differ(change: dict):
    assert NoiseSpace((4, 2), contract()) == NoiseSpace((4, 2), contract())
    assert NoiseSpace((4, 2), contract()) != NoiseSpace((4, 2), contract(**change))


def test_noise_spaces_differ_in_shape_and_kind_but_not_in_decoding_steps():
    assert NoiseSpace((4, 2), contract()) != NoiseSpace((3, 2), contract())
    assert NoiseSpace((4, 2), contract()) != spaces.Box(-3, 3, (4, 2), np.float32)
    assert NoiseSpace((4, 2), contract()) == NoiseSpace((4, 2), contract(num_steps=1))
    assert NoiseSpace((4, 2), contract()) == NoiseSpace((4, 2), contract(reward_mode=None, ignore_terminations=None))


@pytest.mark.parametrize("change", [*CHANGES, dict(num_steps=1)])
def test_one_sentence_for_each_difference(change: dict):
    ((name, value),) = change.items()
    shown = "flow" if name == "flow_hash" else name
    expected = re.escape(f"The rollouts have {shown}={value!r}, but the env has {getattr(contract(), name)!r}.") + "$"
    with pytest.raises(ValueError, match=expected):
        check_agreement("rollouts", contract(**change), "env", contract())
    both = contract(**(change | dict(gamma=0.5)))
    assert len(both.differences(contract())) == (1 if name == "gamma" else 2)


@pytest.mark.parametrize("reward_mode", ["dense", "normalized_dense", "sparse", None])
@pytest.mark.parametrize("form", FORMS)
def test_one_default_of_ignore_terminations(form: str, flow, reward_mode: str | None):
    env = scripted()
    env.unwrapped.reward_mode = reward_mode
    found = find_steering(FORMS[form](flow, [env])).contract
    assert found.ignore_terminations == ("dense" in (reward_mode or "")) and found.reward_mode == reward_mode


def test_gamma_and_reward_scale_are_the_flows(flow):
    other = tiny_flow(gamma=0.5, reward_scale=3.0)
    assert find_steering(LatentSteeringWrapper(scripted(), other)).contract == Contract.of(other, ignore_terminations=False)
    told = find_steering(LatentSteeringWrapper(scripted(), other, gamma=0.9, reward_scale=2.0)).contract
    assert (told.gamma, told.reward_scale) == (0.9, 2.0)
