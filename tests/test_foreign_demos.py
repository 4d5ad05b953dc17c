"""Demos from elsewhere: arrays, Minari, LeRobot's format and robomimic's. Each feeds flow, critic and steerability."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_dsrl import (
    Demos,
    LatentSteeringWrapper,
    VelocityMLP,
    demo_transitions,
    load_demos,
    load_lerobot,
    load_minari,
    load_robomimic,
    steerability,
    train_critic,
    train_flow,
)
from sb3_dsrl.stage0.episodes import DemoError
from tests.demo_files import write_demos
from tests.envs import scripted
from tests.foreign_demos import (
    BOUNDS,
    LENGTHS,
    columns,
    episodes,
    from_arrays,
    from_lerobot,
    from_minari,
    from_robomimic,
    write_lerobot,
    write_minari,
    write_robomimic,
)

SIZES: dict[str, Any] = dict(
    **dict(net_class=VelocityMLP, net_kwargs=dict(width=16, n_blocks=1, embed_dim=8)),
    **dict(obs_horizon=2, pred_horizon=4, act_horizon=3, num_steps=1),
    **dict(critic_kwargs=dict(width=16, n_heads=2), n_iterations=2, batch_size=8, device="cpu", seed=0),
)


@pytest.fixture(autouse=True)
def datasets_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


LOADERS: dict[str, Callable[..., Demos]] = dict(
    arrays=from_arrays, robomimic=from_robomimic, lerobot=from_lerobot, minari=from_minari
)
loaders = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@loaders
def test_what_was_recorded_is_read(load: Callable[..., Demos], tmp_path: Path) -> None:
    demos, expected = load(tmp_path), episodes()
    assert [len(episode) for episode in demos.episodes] == list(LENGTHS)
    for found, made in zip(demos.episodes, expected, strict=True):
        known_obs = made["obs"] if load is not from_lerobot else np.concatenate([made["obs"][:-1], made["obs"][-2:-1]])
        np.testing.assert_array_equal(found.obs, known_obs)
        np.testing.assert_allclose(found.actions, made["actions"], atol=1e-6)
        np.testing.assert_array_equal(found.rewards, made["rewards"])  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.terminated, made["terminated"])
        if load is not from_robomimic:  # which does not say
            np.testing.assert_array_equal(found.success, made["success"])  # type: ignore[arg-type]
    assert (demos.obs_shapes, demos.action_dim, demos.obs_mode, demos.control_mode) == ((3,), 2, "state", None)


@loaders
def test_each_feeds_flow_critic_and_steerability(load: Callable[..., Demos], tmp_path: Path) -> None:
    demos = load(tmp_path)
    flow = train_flow(demos, **SIZES)
    critic = train_critic(flow, demo_transitions(flow, demos), n_iterations=2, batch_size=8)
    env = LatentSteeringWrapper(scripted(8, episode_lengths=(100,), success_steps=(7, 8), random_start=True), flow)
    report = steerability(flow, env, critic, demos, episodes=32, n_tickets=2, n_candidates=2)
    assert report.spread.source == "demos" and "demos at similar states" in str(report)


@pytest.mark.parametrize("load", [from_robomimic, from_lerobot, from_minari])
def test_the_first_so_many(load: Callable[..., Demos], tmp_path: Path) -> None:
    assert [len(episode) for episode in load(tmp_path, num_demos=2).episodes] == list(LENGTHS[:2])


def test_arrays_are_what_the_same_file_says(tmp_path: Path) -> None:
    """Transitions of arrays and of ManiSkill's file are the same to the bit."""
    file = load_demos(write_demos(tmp_path / "demos.h5", [{k: v for k, v in e.items() if k != "raw"} for e in episodes()]))
    names = ("obs", "actions", "rewards", "terminated", "success")
    known = dict(env_id=file.env_id, control_mode=file.control_mode, reward_mode=file.reward_mode)
    arrays = Demos.from_arrays(*columns(*names), **known)  # type: ignore[arg-type]
    flow = train_flow(file, **SIZES)
    ours, theirs = (vars(demo_transitions(flow, demos)) for demos in (arrays, file))
    assert len(ours) == 5 and all((ours[name] == theirs[name]).all() for name in ours)


def test_images_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    obs = [
        dict(state=episode["obs"], rgb=rng.integers(0, 256, (len(episode["obs"]), 8, 8, 3), dtype=np.uint8))
        for episode in episodes()
    ]
    demos = Demos.from_arrays(obs, columns("actions")[0])
    assert demos.obs_mode == "rgb" and demos.obs_shapes == {"state": (3,), "rgb": (8, 8, 3)}
    np.testing.assert_array_equal(demos.episodes[1].read_obs()["rgb"], obs[1]["rgb"])
    flow = train_flow(demos, **SIZES)
    assert flow.encode({key: value[None, :2] for key, value in obs[0].items()}).shape == (1, flow.cond_dim)


def test_lerobots_older_layout_and_an_order_of_its_own(tmp_path: Path) -> None:
    new, old = (load_lerobot(write_lerobot(tmp_path / v, v), action_bounds=BOUNDS) for v in ("v3.0", "v2.1"))
    for ours, theirs in zip(new.episodes, old.episodes, strict=True):
        np.testing.assert_array_equal(ours.obs, theirs.obs)
    keys = ["observation.environment_state", "observation.state"]
    turned = load_lerobot(tmp_path / "v3.0", obs_keys=keys, action_bounds=BOUNDS)
    np.testing.assert_array_equal(turned.episodes[0].obs, new.episodes[0].obs[:, [2, 0, 1]])


def test_lerobots_images_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "dataset", **{"observation.images.top": dict(dtype="video", shape=[4, 4, 3])})
    with pytest.warns(UserWarning, match=r"the images \['observation.images.top'\] are left out"):
        assert load_lerobot(folder, action_bounds=BOUNDS).obs_dim == 3


def test_robomimic_without_next_obs_and_with_a_mask(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "low_dim.hdf5", next_obs=False)
    demos = load_robomimic(path, obs_keys=("robot0_eef_pos", "object"), filter_key="train")
    assert demos.env_id == "Lift" and [len(episode) for episode in demos.episodes] == [LENGTHS[0], LENGTHS[2]]
    np.testing.assert_array_equal(demos.episodes[0].obs[-1], episodes()[0]["obs"][-2])


def test_minaris_env_and_success_key(tmp_path: Path) -> None:
    dataset = write_minari()
    assert load_minari(dataset).env_id == "Pendulum-v1"
    assert load_minari(dataset, env_id="Mine-v0").env_id == "Mine-v0"
    with pytest.raises(DemoError, match=r"Minari dataset made/here-v0: episode 0 has no info 'goal'; it has \['success'\]"):
        load_minari(dataset, success_key="goal")
    with pytest.raises(
        FileNotFoundError, match=r"no Minari dataset 'made/nowhere-v0' on this machine; minari.download_dataset"
    ):
        load_minari("made/nowhere-v0")
