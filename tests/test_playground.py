"""MuJoCo Playground as a vector env: runs where it is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

pytest.importorskip("mujoco_playground", reason="MuJoCo Playground is not installed: pip install playground jax")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from playground import PlaygroundVectorEnv

from sb3_dsrl.steering.batched import BatchedChunkEnv

GAMMA, H, LIMIT = 0.9, 4, 10


def make(num_envs: int) -> PlaygroundVectorEnv:
    return PlaygroundVectorEnv("CartpoleBalance", num_envs, LIMIT, {"impl": "jax"})


def test_chunks_equal_a_hand_loop() -> None:
    """Macro rewards, observations and the end at the time limit, which a chunk runs past, are those of single steps."""
    chunks = np.random.default_rng(0).uniform(-1, 1, (6, 3, H, 1)).astype(np.float32)
    env = BatchedChunkEnv(make(3), H, gamma=GAMMA)
    env.seed(5)
    plain = make(3)
    obs = plain.reset(seed=5)[0]
    np.testing.assert_array_equal(env.reset()[:, 0], obs)
    for i, chunk in enumerate(chunks):
        found, rewards, dones, infos = env.step(chunk)
        steps = [plain.step(th.from_numpy(action.copy())) for action in chunk.transpose(1, 0, 2)]
        expected = sum(GAMMA**k * step[1].double() for k, step in enumerate(steps))
        np.testing.assert_allclose(rewards, expected, rtol=1e-5)
        assert dones.all() == any(step[3].all() for step in steps) == (i % 3 == 2)
        obs = steps[-1][0]
        if dones.all():
            assert [info["episode_length"] for info in infos] == [LIMIT] * 3
            np.testing.assert_array_equal(infos[1]["terminal_observation"][0], obs[1])
            obs = plain.reset(options={"reset_mask": np.ones(3, bool)})[0]
        np.testing.assert_array_equal(found[:, 0], obs)


def test_a_part_is_reset() -> None:
    """The others go on, and a seed gives the same episode again."""
    env = make(4)
    first = env.reset(seed=1)[0].clone()
    moved = env.step(th.ones(4, 1))[0].clone()
    obs = env.reset(options={"reset_mask": np.array([True, False, False, True])})[0]
    np.testing.assert_array_equal(obs[1:3], moved[1:3])
    assert not (obs[[0, 3]] == moved[[0, 3]]).all(dim=1).any() and not (obs[[0, 3]] == first[[0, 3]]).all(dim=1).any()
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)
