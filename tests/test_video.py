"""Videos are filmed in a copy of the env that the actor plays, however it is steered, and are whole or not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_dsrl import FlowPolicy, LatentSteeringWrapper, make_latent_env
from sb3_dsrl.envs.maniskill import maniskill_kwargs
from sb3_dsrl.evaluation import video
from sb3_dsrl.evaluation.play import play
from sb3_dsrl.evaluation.video import record_video
from tests.envs import scripted, tiny_flow, vec_steered

TASK: dict[str, Any] = dict(env_id="PushCube-v1", obs_mode="state", control_mode="pd_joint_delta_pos")
D, A = 35, 8  # of the state and of the action


@pytest.fixture(scope="module")
def push_flow() -> FlowPolicy:
    return tiny_flow(D, A, **TASK)


def push_cube(flow: FlowPolicy, n_envs: int = 1, **kwargs: Any) -> VecEnv:
    return make_latent_env("PushCube-v1", flow, n_envs, max_episode_steps=6, gamma=0.9, **kwargs)


def n_frames(path: Path) -> int:
    return len(imageio.mimread(path))


@pytest.mark.parametrize("steer_mode", ["act_horizon", "shared"])  # "full" is filmed by the scripts' tests
def test_a_model_is_filmed_as_it_is_steered(steer_mode: Any, push_flow: FlowPolicy, tmp_path: Path) -> None:
    env = push_cube(push_flow, steer_mode=steer_mode, noise_bound=2.0, num_steps=1, reward_scale=3.0)
    model = PPO("LatentPolicy", env, gamma=env.macro_gamma, n_steps=8, batch_size=8)
    record_video(tmp_path / "videos" / "model.mp4", env, model, 2, size=64)
    assert n_frames(tmp_path / "videos" / "model.mp4") == 2 * 6  # the time limit is the env's
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["model.mp4"]
    copy = video._steered_alike(video._camera_env(env, 64, {}), env)
    assert copy.action_space == env.action_space and copy.get_attr("reward_scale") == [3.0]
    (original, *_), (filmed, *_) = (list(play(model, each, 1, seed=7)) for each in (env, copy))
    np.testing.assert_allclose(original.next_obs, filmed.next_obs, atol=1e-4)
    np.testing.assert_allclose(original.rewards, filmed.rewards, atol=1e-4)
    env.close()
    copy.close()


def test_workers_and_the_gym_form(push_flow: FlowPolicy, tmp_path: Path) -> None:
    workers = push_cube(push_flow, 2, steer_mode="shared")
    record_video(tmp_path / "workers.mp4", workers, "prior", 1, size=64)
    workers.close()
    raw = gym.make("PushCube-v1", **maniskill_kwargs(**TASK, max_episode_steps=9))
    single = LatentSteeringWrapper(raw, push_flow, steer_mode="act_horizon", ignore_terminations=True)
    record_video(tmp_path / "gym.mp4", single, "zero", 1, size=64, max_episode_steps=3)
    assert [n_frames(tmp_path / f"{name}.mp4") for name in ("workers", "gym")] == [6, 3]
    single.close()


def test_a_vec_normalize_is_copied(push_flow: FlowPolicy) -> None:
    env = VecNormalize(push_cube(push_flow), gamma=0.7)
    env.reset()
    env.obs_rms.mean += 5.0
    count = env.obs_rms.count
    copy = video._steered_alike(video._camera_env(env, 64, {}), env)
    (step, *_) = play("zero", copy, 1)
    assert isinstance(copy, VecNormalize) and step.obs.mean() < -1.0
    assert env.obs_rms.count == count == copy.obs_rms.count
    env.close()
    copy.close()


@pytest.fixture
def half_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"the film before")
    yield path
    assert path.read_bytes() == b"the film before" and list(tmp_path.iterdir()) == [path]


def test_a_crash_leaves_no_half_file(push_flow: FlowPolicy, half_file: Path) -> None:
    class Crash:
        def predict(self, observation: np.ndarray, *, deterministic: bool = False) -> Any:
            raise RuntimeError("out of order")

    env = push_cube(push_flow)
    with pytest.raises(RuntimeError, match="out of order"):
        record_video(half_file, env, Crash(), 1)
    with pytest.raises(ValueError, match="episodes must be at least 1, found 0"):
        record_video(half_file, env, "prior", 0)
    env.close()


def test_refusals(flow: FlowPolicy, half_file: Path) -> None:
    with pytest.raises(ValueError, match="record_video films ManiSkill's envs, but VecLatentSteering has no env id"):
        record_video(half_file, vec_steered(flow, [scripted()]), "prior")
    with pytest.raises(ValueError, match="is not steered"):
        record_video(half_file, scripted(), "prior")
    pendulum = LatentSteeringWrapper(gym.make("Pendulum-v1"), tiny_flow(3, 1))
    with pytest.raises(ValueError, match="'Pendulum-v1' is not a ManiSkill environment"):
        record_video(half_file, pendulum, "prior")
