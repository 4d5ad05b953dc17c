"""Images: from demo files through stage 0 to steered ManiSkill envs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import mani_skill.envs  # noqa: F401  registers the envs
import numpy as np
import pytest
import torch as th
from mani_skill.utils.wrappers import CPUGymWrapper, FlattenRGBDObservationWrapper
from stable_baselines3 import PPO

from sb3_dsrl import (
    ActionChunkWrapper,
    AdvantageWeighting,
    FlowPolicy,
    ImageTraining,
    LatentSteeringWrapper,
    VelocityMLP,
    collect_rollouts,
    demo_transitions,
    load_demos,
    make_chunk_env,
    make_latent_env,
    ppo_kwargs,
    pretrain_latent,
    train_critic,
    train_flow,
)
from sb3_dsrl.envs import maniskill, worker_vec_env
from sb3_dsrl.envs.maniskill_wrappers import flat_images
from sb3_dsrl.policies.encoders import SpatialSoftmaxConv
from sb3_dsrl.stage0.windows import ImageWindows
from sb3_dsrl.steering.batched import BatchedChunkEnv

CAMERA = dict(sensor_configs=dict(width=16, height=16))
MODES: dict[str, Any] = dict(sim_backend="physx_cpu", render_backend="cpu", control_mode="pd_joint_delta_pos", **CAMERA)


def write_image_demos(path: Path, lengths: tuple[int, ...] = (6, 9, 4), track_order: bool = True, flat: bool = False) -> Path:
    """As RecordEpisode writes them: nested groups in the order of the env; the value of a pixel tells its frame."""
    with h5py.File(path, "w") as file:
        for i, length in enumerate(lengths):
            rng = np.random.default_rng(i)
            group = file.create_group(f"traj_{i}")
            obs = group.create_group("obs", track_order=track_order)
            frame = np.arange(length + 1)
            images = {
                name: np.broadcast_to((10 * c + frame + 50 * i)[:, None, None, None], (length + 1, 8, 8, 3)).astype(np.uint8)
                for c, name in enumerate(("hand_camera", "base_camera"))  # not in alphabetical order
            }
            state = {"zeta": rng.standard_normal((length + 1, 2)), "alpha": frame % 2 == 0}
            if flat:
                obs["state"] = np.concatenate([state["zeta"], state["alpha"][:, None]], axis=1).astype(np.float32)
                obs["rgb"] = np.concatenate(list(images.values()), axis=-1)
            else:
                agent, extra = (obs.create_group(name, track_order=track_order) for name in ("agent", "extra"))
                agent["qpos"] = rng.standard_normal((length + 1, 3)).astype(np.float32)
                for name, value in state.items():
                    extra[name] = value
                obs.create_group("sensor_param")
                data = obs.create_group("sensor_data", track_order=track_order)
                for name, value in images.items():
                    data.create_group(name)["rgb"] = value
            group["actions"] = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
            group["rewards"] = rng.standard_normal(length).astype(np.float32)
    env_kwargs = dict(obs_mode="rgb", control_mode="pd_joint_delta_pos", reward_mode="normalized_dense")
    meta = dict(env_info=dict(env_id="PushCube-v1", env_kwargs=env_kwargs), episodes=[{} for _ in lengths])
    path.with_suffix(".json").write_text(json.dumps(meta))
    return path


def test_nested_demos_are_laid_out_as_the_env_does(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    assert demos.obs_shapes == {"state": (6,), "rgb": (8, 8, 6)} and demos.obs_mode == "rgb"
    obs = demos.episodes[1].read_obs()
    with h5py.File(tmp_path / "demos.h5") as file:
        written = file["traj_1/obs"]
        parts = (written["agent/qpos"][()], written["extra/zeta"][()], written["extra/alpha"][()][:, None])
        np.testing.assert_array_equal(obs["state"], np.concatenate(parts, axis=1).astype(np.float32))
    assert obs["rgb"].dtype == np.uint8 and obs["rgb"].shape == (10, 8, 8, 6)
    assert (obs["rgb"][3, 0, 0] == [53, 53, 53, 63, 63, 63]).all()  # hand_camera was written first


def test_flat_demos_are_the_same(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5", flat=True))
    assert demos.obs_shapes == {"state": (3,), "rgb": (8, 8, 6)}
    assert (demos.episodes[1].read_obs()["rgb"][3, 0, 0] == [53, 53, 53, 63, 63, 63]).all()


def test_file_without_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not keep the order in which .* were written"):
        load_demos(write_image_demos(tmp_path / "demos.h5", track_order=False))


def test_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    (tmp_path / "demos.h5").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"demos.h5 cannot be read any more; it is damaged or was replaced"):
        demos.episodes[0].read_obs()


def image_flow(demos: Any, **kwargs: Any) -> FlowPolicy:
    settings: dict[str, Any] = dict(
        net_class=VelocityMLP,
        net_kwargs=dict(width=16, n_blocks=1, embed_dim=8),
        critic_kwargs=dict(width=16, n_heads=2),
        obs_horizon=2,
        pred_horizon=4,
        act_horizon=3,
        num_steps=2,
        n_iterations=3,
        batch_size=8,
        seed=0,
    )
    return train_flow(demos, **(settings | kwargs))


def test_transitions_are_those_of_stacked_observations(tmp_path: Path) -> None:
    """Features are computed once a frame; the result is that of encoding each stacked observation."""
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos)
    found = demo_transitions(flow, demos, ignore_terminations=True)
    row = 0
    for episode in demos.episodes:
        obs = episode.read_obs()
        for t in range(len(episode)):
            for features, at in ((found.cond[row], t), (found.next_cond[row], min(t + 3, len(episode)))):
                stacked = {key: x[[max(at - 1, 0), at]][None] for key, x in obs.items()}
                th.testing.assert_close(features, flow.encode(stacked)[0], atol=1e-5, rtol=1e-5)
            row += 1
    assert row == len(found)


@pytest.mark.parametrize("memory", [1, 2000, 1e9])
def test_windows_cover_all_demos_whatever_fits_into_memory(tmp_path: Path, memory: float) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos)
    windows = ImageWindows(flow, demos, random_shift_pad=0, memory=memory, turnover=2)
    expected = {}
    for episode in demos.episodes:
        obs = episode.read_obs()
        for t in range(len(episode)):
            stacked = {key: x[[max(t - 1, 0), t]][None] for key, x in obs.items()}
            expected[flow.encode(stacked)[0].numpy().round(3).tobytes()] = episode.actions[t]
    seen = set()
    for _ in range(60):
        cond, chunk, weights = windows.sample(16)
        assert weights is None and len(windows._held) == (len(demos.episodes) if memory == 1e9 else len(windows._held))
        if memory == 1:
            assert len(windows._held) == 1
        for features, actions in zip(cond.numpy().round(3), chunk.numpy(), strict=True):
            np.testing.assert_array_equal(expected[features.tobytes()], actions[0])
            seen.add(features.tobytes())
    assert seen == set(expected)


def test_a_window_is_encoded_once_and_repeated(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos)
    cond, chunk, _ = ImageWindows(flow, demos, repeats=3).sample(12)
    assert len(cond) == len(chunk) == 12
    for x in (cond, chunk):
        assert th.equal(x[:4], x[4:8]) and th.equal(x[:4], x[8:])
    with pytest.raises(ValueError, match=r"multiple of images.repeats, found 8 and 3"):
        image_flow(demos, images=ImageTraining(repeats=3))


def test_a_backbone_is_made_for_the_channels(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos, backbone=partial(SpatialSoftmaxConv, out_dim=16, first_stride=2, sharpness=5.0))
    flow.save_pretrained(tmp_path / "flow")
    backbone: Any = FlowPolicy.from_pretrained(tmp_path / "flow").encoder.backbone
    assert (backbone.convs[0].in_channels, backbone.convs[0].stride, backbone.sharpness) == (6, (2, 2), 5.0)


def test_sharp_maps_tell_where_something_is() -> None:
    """Without sharpness an untrained encoder gives almost the same features wherever a square lies on a grained table."""
    th.manual_seed(0)
    images = th.rand(1, 3, 64, 64).repeat(16, 1, 1, 1)
    for i in range(16):
        images[i, :, 14 * (i // 4) + 4 : 14 * (i // 4) + 10, 14 * (i % 4) + 4 : 14 * (i % 4) + 10] = 0.0
    spread = []
    for sharpness in (1.0, 5.0):
        th.manual_seed(0)
        with th.no_grad():
            spread.append(SpatialSoftmaxConv(3, sharpness=sharpness)(images).std(dim=0).mean())
    assert spread[1] > 3 * spread[0]


def test_encoder_learns_unless_it_is_frozen(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos, n_iterations=1)
    before = {key: value.clone() for key, value in flow.encoder.state_dict().items()}
    kwargs = dict(flow=flow, n_iterations=3, batch_size=8)
    train_flow(demos, images=ImageTraining(train_encoder=False), **kwargs)
    assert all(th.equal(value, before[key]) for key, value in flow.encoder.state_dict().items())
    train_flow(demos, **kwargs)
    changed = {key for key, value in flow.encoder.state_dict().items() if not th.equal(value, before[key])}
    assert "backbone.convs.0.weight" in changed and all(key.startswith("backbone.") for key in changed)
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    with pytest.raises(ValueError, match=r"pass images=ImageTraining\(train_encoder=False\)"):
        train_flow(demos, advantage=AdvantageWeighting(), **kwargs)


def test_stage_0_learns_from_images(tmp_path: Path) -> None:
    """What to do is in the image only: a bright square on the left or on the right."""
    path = tmp_path / "demos.h5"
    with h5py.File(path, "w") as file:
        for i in range(20):
            group = file.create_group(f"traj_{i}")
            rgb = np.zeros((11, 32, 32, 3), np.uint8)
            column = 2 if i % 2 else 22
            rgb[:, 12:20, column : column + 8] = 200
            group["obs/rgb"] = rgb
            group["actions"] = np.full((10, 1), 0.6 if i % 2 else -0.6, np.float32)
            group["rewards"] = np.zeros(10, np.float32)
    env_kwargs = dict(obs_mode="rgb", control_mode="pd_joint_pos")
    path.with_suffix(".json").write_text(json.dumps(dict(env_info=dict(env_id="X-v1", env_kwargs=env_kwargs), episodes=[])))
    demos = load_demos(path)
    assert demos.obs_dim == 0
    flow = image_flow(
        demos,
        obs_horizon=1,
        n_iterations=300,
        batch_size=32,
        learning_rate=2e-3,
        net_kwargs=dict(width=64, n_blocks=2),
        ema_decay=0.98,
    )
    rgb = np.stack([demos.episodes[i].read_obs()["rgb"][:1] for i in (0, 1)] * 20)
    chunks = flow.sample({"rgb": rgb}).mean(dim=(1, 2)).reshape(20, 2)
    th.testing.assert_close(chunks.mean(dim=0), th.tensor([-0.6, 0.6]), atol=0.15, rtol=0)


# Real ManiSkill envs


def rgb_flow(obs_horizon: int, env_id: str = "PushCube-v1", obs_mode: str = "rgb") -> FlowPolicy:
    env: Any = flat_images(gym.make(env_id, obs_mode=obs_mode, **MODES))
    shapes = {key: space.shape for key, space in env.unwrapped.single_observation_space.spaces.items()}
    env.close()
    state_dim = shapes.pop("state")[0]
    th.manual_seed(0)
    return FlowPolicy.create(
        state_dim,
        8,
        obs_horizon,
        4,
        4,
        image_shapes=shapes,
        net_class=VelocityMLP,
        net_kwargs=dict(width=16, n_blocks=1, embed_dim=8),
        obs_mode=obs_mode,
        control_mode="pd_joint_delta_pos",
        env_id=env_id,
        num_steps=2,
    ).freeze()


@pytest.mark.parametrize(("obs_horizon", "ignore_terminations"), [(1, True), (3, False)])
def test_frames_are_those_of_an_env_that_renders_every_step(obs_horizon: int, ignore_terminations: bool) -> None:
    kwargs = dict(obs_mode="rgb", max_episode_steps=10, **MODES)
    env = ActionChunkWrapper(gym.make("PushCube-v1", **kwargs), 4, obs_horizon, ignore_terminations=ignore_terminations)
    rendered = 0
    base: Any = env.unwrapped
    update = base.scene.update_render

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal rendered
        rendered += 1
        update(*args, **kwargs)

    base.scene.update_render = counted
    plain = CPUGymWrapper(FlattenRGBDObservationWrapper(gym.make("PushCube-v1", **kwargs)))
    rng = np.random.default_rng(0)
    for seed in range(2):
        obs, _ = env.reset(seed=seed)
        base.scene.update_render = counted
        first, _ = plain.reset(seed=seed)
        frames = [first] * obs_horizon
        done = False
        while not done:
            for key in ("rgb", "state"):
                np.testing.assert_array_equal(obs[key], np.stack([frame[key] for frame in frames[-obs_horizon:]]))
            chunk = rng.uniform(-1, 1, (4, 8)).astype(np.float32)
            rendered = 0
            obs, _, terminated, truncated, _ = env.step(chunk)
            assert rendered == (obs_horizon if ignore_terminations else 4)
            frames += [plain.step(action)[0] for action in chunk]
            done = terminated or truncated
        assert len(frames) - obs_horizon == 12
        np.testing.assert_array_equal(obs["rgb"], np.stack([frame["rgb"] for frame in frames[-obs_horizon:]]))
    env.close()
    plain.close()


def test_batched_form_sees_the_same_images() -> None:
    flow = rgb_flow(obs_horizon=2)
    env = BatchedChunkEnv(flat_images(gym.make("PushCube-v1", obs_mode="rgb", **MODES)), 4, 2, ignore_terminations=True)
    single = ActionChunkWrapper(gym.make("PushCube-v1", obs_mode="rgb", **MODES), 4, 2, ignore_terminations=True)
    env.seed(7)
    batched, (alone, _) = env.reset(), single.reset(seed=7)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for key in ("rgb", "state"):
            np.testing.assert_allclose(batched[key][0].numpy(), alone[key], atol=1e-6)
        chunk = rng.uniform(-1, 1, (4, 8)).astype(np.float32)
        batched, alone = env.step(chunk[None])[0], single.step(chunk)[0]
    assert flow.encode(batched).shape == (1, flow.cond_dim)
    env.close()
    single.close()


@pytest.mark.parametrize(("env_id", "obs_mode", "channels"), [("StackCube-v1", "rgb", 6), ("PushCube-v1", "rgbd", 3)])
def test_cameras_and_depth(env_id: str, obs_mode: str, channels: int) -> None:
    flow = rgb_flow(1, env_id, obs_mode)
    assert isinstance(flow.obs_shapes, dict) and flow.obs_shapes["rgb"] == (16, 16, channels)
    assert ("depth" in flow.obs_shapes) == (obs_mode == "rgbd")
    env = LatentSteeringWrapper(gym.make(env_id, obs_mode=obs_mode, **MODES), flow, ignore_terminations=True)
    features, _ = env.reset(seed=0)
    assert features.shape == (flow.cond_dim,) and np.isfinite(features).all()
    features, *_ = env.step(env.action_space.sample())
    assert np.isfinite(features).all()
    env.close()


def test_three_stages_on_features(tmp_path: Path) -> None:
    """From a recorded image demo to stage 2 in worker processes; no image enters the rollout buffer."""
    flow = rgb_flow(obs_horizon=1)
    env = make_latent_env("PushCube-v1", flow, n_envs=2, max_episode_steps=8, seed=0, **CAMERA)
    rollouts = collect_rollouts(flow, env, episodes=4)
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4))
    pretrain_latent(model, rollouts=rollouts, n_iterations=5)
    model.learn(16)
    assert model.rollout_buffer.observations.size == 4 * 2 * flow.cond_dim
    assert flow.cond_dim < 300
    env.close()


@pytest.mark.parametrize("gpu", [False, True])
def test_images_are_rendered_on_the_gpu_where_there_is_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of ManiSkill and of the workers. (Nothing is rendered: the machine that tests has no GPU.)"""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    found = {}
    asked: dict[str, dict[str, Any]] = dict(state={}, rgb=dict(obs_mode="rgb"), video=dict(render_mode="rgb_array"))
    asked["rgb on the CPU"] = dict(obs_mode="rgb", render_backend="cpu")
    for name, kwargs in asked.items():
        hidden: list[bool] = []
        monkeypatch.setattr(worker_vec_env, "WorkerVecEnv", lambda fns, settings, hide_gpu, to=hidden: to.append(hide_gpu))
        make_chunk_env("PushCube-v1", 2, **kwargs)
        backend = maniskill.maniskill_kwargs("PushCube-v1", **({"obs_mode": "state"} | kwargs))["render_backend"]
        found[name] = (backend, hidden[0])
    sees = ("gpu", False) if gpu else ("cpu", True)
    assert found == dict(state=("none", True), rgb=sees, video=sees) | {"rgb on the CPU": ("cpu", True)}


def test_other_images_are_refused() -> None:
    flow = rgb_flow(obs_horizon=1)
    for kwargs in (
        dict(obs_mode="rgb", **(MODES | dict(sensor_configs=dict(width=32, height=32)))),
        dict(obs_mode="state", **MODES),
    ):
        env = gym.make("PushCube-v1", **kwargs)
        with pytest.raises(ValueError, match=r"The env does not fit the flow: its observations have shape"):
            LatentSteeringWrapper(env, flow)
        env.close()


def test_critic_and_candidates_on_images(tmp_path: Path) -> None:
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos)
    train_critic(flow, demo_transitions(flow, demos, ignore_terminations=True), n_iterations=3, batch_size=8)
    policy = pretrain_latent(flow, demos, n_iterations=3, batch_size=8, n_candidates=4, pool_size=6)
    assert policy.sample(th.zeros(1, flow.cond_dim)).shape == (1, *flow.noise_shape)
