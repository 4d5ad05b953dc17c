"""SmolVLA, pi0 and pi0.5, tiny and with random weights, against what LeRobot itself makes of the same noise."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO

from sb3_dsrl import LeRobotPolicy, make_latent_env, ppo_kwargs
from tests.lerobot.vla_models import SIDE, STATE, TOP, WRIST, A, D, H, T, pi, smolvla

KEYS = {STATE: "state", TOP: "rgb", WRIST: "rgb"}
BOUNDS = (-50.0, 50.0)
NAMES = ("smolvla", "pi0", "pi05")
Maker = Any


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Makes a policy of a name, and its processors."""
    return lambda name, **kwargs: smolvla(tmp_path, **kwargs) if name == "smolvla" else pi(name, monkeypatch, **kwargs)


def observed(n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (n, 1, SIDE, SIDE, 6), dtype=np.uint8)
    return dict(state=rng.random((n, 1, D), dtype=np.float32), rgb=rgb)


def chunk_of_lerobot(policy: Any, processors: Any, obs: dict[str, Any], noise: th.Tensor, task: str) -> th.Tensor:
    """Its own predict_action_chunk, in the env's units, clipped to the bounds."""
    preprocess, postprocess = processors
    top, wrist = (th.from_numpy(obs["rgb"][:, 0, ..., i : i + 3]).permute(0, 3, 1, 2) / 255 for i in (0, 3))
    batch = {STATE: th.from_numpy(obs["state"][:, 0]), TOP: top, WRIST: wrist, "task": [task] * len(top)}
    policy.reset()
    return postprocess(policy.predict_action_chunk(preprocess(batch), noise=noise)).clamp(*BOUNDS)


@pytest.mark.parametrize("name", NAMES)
def test_decode_is_what_lerobot_makes_of_that_noise(name: str, make: Maker) -> None:
    policy, processors = make(name)
    flow = LeRobotPolicy(policy, processors, obs_keys=KEYS, action_bounds=BOUNDS, task="push the T").freeze()
    assert flow.obs_shapes == dict(state=(D,), rgb=(SIDE, SIDE, 6))
    assert (flow.noise_shape, flow.act_horizon, flow.num_steps, flow.obs_horizon) == ((T, A), H, 5, 1)
    obs, w = observed(3), th.randn(3, 2, T, A)
    with th.no_grad():
        cond = flow.encode(obs)
        chunks = flow.decode(cond, w)
        for j in range(2):
            expected = chunk_of_lerobot(policy, processors, obs, w[:, j], "push the T")
            th.testing.assert_close(50 * chunks[:, j], expected, atol=1e-3, rtol=0)
        assert expected.std() > 1 and (expected.abs() < 50).float().mean() > 0.3
        assert (flow.decode(cond, w) == chunks).all()
        other = LeRobotPolicy(policy, processors, obs_keys=KEYS, action_bounds=BOUNDS, task="push push T").freeze()
        assert not th.allclose(other.decode(other.encode(obs), w), chunks)
        assert not th.allclose(flow.decode(flow.encode(observed(3, seed=1)), w), chunks)
        steps = [flow.decode(cond, w, num_steps=n) for n in (2, 5)]
        assert not th.allclose(*steps) and (steps[1] == chunks).all()


@pytest.mark.parametrize("name", NAMES)
def test_noise_that_this_robot_has_no_action_for_is_always_the_same(name: str, make: Maker) -> None:
    policy, processors = make(name, max_action_dim=A + 3)
    flow = LeRobotPolicy(policy, processors, obs_keys=KEYS, action_bounds=BOUNDS, task="push the T").freeze()
    assert flow.noise_shape == (T, A)
    obs, w = observed(2), th.randn(2, T, A)
    idle = th.randn(T, 3, generator=th.Generator().manual_seed(0)).expand(2, -1, -1)
    with th.no_grad():
        expected = chunk_of_lerobot(policy, processors, obs, th.cat([w, idle], dim=-1), "push the T")
        th.testing.assert_close(50 * flow.decode(flow.encode(obs), w), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_camera_may_be_missing(name: str, make: Maker) -> None:
    policy, processors = make(name, empty_cameras=1)
    flow = LeRobotPolicy(policy, processors, obs_keys={STATE: "state", TOP: "rgb"}, action_bounds=BOUNDS, task="push the T")
    assert flow.obs_shapes == dict(state=(D,), rgb=(SIDE, SIDE, 3))
    obs, w = observed(2), th.randn(2, T, A)
    obs["rgb"] = obs["rgb"][..., :3]
    with th.no_grad():
        assert flow.decode(flow.encode(obs), w).abs().max() <= 1


def test_the_sentence_is_asked_for(make: Maker) -> None:
    policy, processors = make("smolvla")
    with pytest.raises(ValueError, match=r"The policy, smolvla, reads a sentence: pass task="):
        LeRobotPolicy(policy, processors, obs_keys=KEYS)
    with pytest.raises(ValueError, match=r"The policy, smolvla, needs its processors, which make tokens of the task"):
        LeRobotPolicy(policy, obs_keys=KEYS, task="push the T")


class Robot(gym.Env):
    """Cameras that show noise, and a reward for small actions."""

    observation_space = spaces.Dict(state=spaces.Box(0, 1, (D,)), rgb=spaces.Box(0, 255, (SIDE, SIDE, 6), np.uint8))
    action_space = spaces.Box(-50, 50, (A,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> Any:
        return self.observation_space.sample(), -float(np.abs(action).mean()), False, False, {}


@pytest.mark.parametrize("name", NAMES)
def test_ppo_that_looks_at_the_env(name: str, make: Maker) -> None:
    policy, processors = make(name)
    flow = LeRobotPolicy(policy, processors, obs_keys=KEYS, action_bounds=BOUNDS, task="push the T")
    before = flow.fingerprint()
    env = make_latent_env(Robot, flow, max_episode_steps=8, obs="env", steer_mode="shared")
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=8, n_epochs=1)).learn(8)
    assert model.policy.observation_space.keys() == {"state", "rgb"}
    assert flow.fingerprint() == before
