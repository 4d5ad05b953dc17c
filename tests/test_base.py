"""What every policy that can be steered has: checked arguments, a device, a sample, the part that a critic scores."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dsrl import EnsembleChunkCritic, SteerablePolicy
from tests.envs import tiny_flow

ABOUT: dict[str, Any] = dict(obs_shapes=(3,), obs_horizon=2, noise_shape=(4, 2), cond_dim=6, act_horizon=3)


class NumpyPolicy(SteerablePolicy):
    """A policy without weights that computes in NumPy."""

    def __init__(self, gain: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**(ABOUT | kwargs))
        self.gain = gain

    def encode(self, obs: Any) -> Any:
        return np.asarray(obs, np.float32).reshape(len(obs), -1)

    def decode(self, cond: Any, w: Any, num_steps: int | None = None) -> Any:
        return np.clip(self.gain * np.asarray(w), -1, 1)


def test_arguments_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        NumpyPolicy.__base__.__init__(NumpyPolicy.__new__(NumpyPolicy), (3,), 2, (4, 2), 6, 3)  # type: ignore[misc]


@pytest.mark.parametrize("shapes", [3, None, "state", {}, {"state": 3}, (3.5,)])
def test_obs_shapes_that_are_no_shapes(shapes: Any) -> None:
    with pytest.raises(TypeError, match=r"obs_shapes must be the shape of one frame, such as \(3,\), or a dict .* found"):
        NumpyPolicy(obs_shapes=shapes)


@pytest.mark.parametrize("shape", [8, (4,), (4, 2, 1)])
def test_noise_shape_that_is_no_shape(shape: Any) -> None:
    with pytest.raises(TypeError, match=r"noise_shape must be the shape \(T, A\) of one noise, found"):
        NumpyPolicy(noise_shape=shape)


def test_decoder_without_steps_has_no_number_of_them() -> None:
    assert NumpyPolicy().num_steps is None and tiny_flow().num_steps == 2


def test_device_of_a_policy_without_parameters() -> None:
    policy = NumpyPolicy()
    assert policy.device == th.device("cpu")
    policy.register_buffer("mean", th.zeros(1, device="meta"))
    assert policy.device == th.device("meta")


def test_sample_takes_numpy_from_encode_and_decode() -> None:
    th.manual_seed(0)
    chunk = NumpyPolicy().sample(np.zeros((5, 2, 3)))
    th.manual_seed(0)
    assert th.equal(chunk, (0.5 * th.randn(5, 4, 2)).clamp(-1, 1))


@pytest.mark.parametrize("first_action", [None, 0, 1])
@pytest.mark.parametrize("batch", [(5,), (5, 3)])
def test_scored_part_begins_where_the_critic_says(first_action: int | None, batch: tuple[int, ...]) -> None:
    flow = tiny_flow(pred_horizon=4, act_horizon=2, action_offset=2)
    critic = EnsembleChunkCritic(6, 2, 2, n_heads=2, width=8, first_action=first_action)
    chunk = th.randn(*batch, 4, 2)
    begin = 2 if first_action is None else first_action
    assert th.equal(flow.scored(chunk, critic), chunk[..., begin : begin + 2, :])


def test_first_action_is_an_index() -> None:
    with pytest.raises(ValueError, match=r"first_action must be >= 0 or None, found -1"):
        EnsembleChunkCritic(6, 2, 2, first_action=-1)
