"""ManiSkill trajectory files: what is read, how it is cut into windows and transitions, and every refusal."""

import json
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import action_windows, chunk_transitions, frame_history
from sb3_dsrl.utils.integrity import write_sums
from tests.demo_files import scripted_episode, write_demos

SHIPPED = Path(__file__).parent.parent / "examples" / "demos" / "PushCube-v1.h5"
GAMMA = 0.9


@pytest.fixture
def episodes() -> list[dict[str, Any]]:
    """Never done, done in the middle (as after success in a replay), done at the last step, shorter than a chunk."""
    return [
        scripted_episode(7, seed=0),
        scripted_episode(9, seed=1, ends=(4, 5, 6, 7, 8)),
        scripted_episode(6, seed=2, ends=(5,)),
        scripted_episode(2, seed=3),
    ]


@pytest.fixture
def path(tmp_path: Path, episodes: list[dict[str, Any]]) -> Path:
    return write_demos(tmp_path / "demos.h5", episodes)


def test_load_demos_reads_everything(path: Path, episodes: list[dict[str, Any]]) -> None:
    demos = load_demos(path)
    assert (demos.env_id, demos.obs_mode, demos.control_mode) == ("PushCube-v1", "state", "pd_joint_delta_pos")
    assert (demos.reward_mode, demos.path) == ("normalized_dense", path)
    assert (demos.obs_dim, demos.action_dim, demos.n_steps, len(demos.episodes)) == (3, 2, 24, 4)
    for found, written in zip(demos.episodes, episodes, strict=True):
        for key in ("obs", "actions", "rewards", "terminated", "success"):
            np.testing.assert_array_equal(getattr(found, key), written[key], err_msg=key)
    np.testing.assert_array_equal(demos.frames(), np.concatenate([episode["obs"] for episode in episodes]))
    assert load_demos(str(path), control_mode="pd_joint_delta_pos").n_steps == 24


def test_episodes_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(1 + i) for i in range(12)])  # traj_10 is not before traj_2
    assert [len(episode) for episode in load_demos(path).episodes] == list(range(1, 13))
    assert [len(episode) for episode in load_demos(path, num_demos=11).episodes] == list(range(1, 12))


def test_optional_series_may_be_missing(tmp_path: Path) -> None:
    episode = scripted_episode(4)
    for key in ("rewards", "terminated", "truncated", "success"):
        del episode[key]
    (found,) = load_demos(write_demos(tmp_path / "demos.h5", [episode])).episodes
    assert found.rewards is None
    assert found.success is None
    np.testing.assert_array_equal(found.terminated, np.zeros(4, bool))


@pytest.mark.parametrize(
    ("modes", "env_mode", "expected"),
    [
        ("pd_ee_delta_pose", "pd_joint_pos", "pd_ee_delta_pose"),  # replay_trajectory rewrites the episodes' only
        (None, "pd_joint_pos", "pd_joint_pos"),  # older files
    ],
)
def test_control_mode_of_the_episodes_wins(tmp_path: Path, modes: str | None, env_mode: str, expected: str) -> None:
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(3)], modes, env_mode)
    assert load_demos(path).control_mode == expected


@pytest.mark.parametrize("obs_horizon", [1, 2, 5])
def test_stack_frames_against_a_loop(obs_horizon: int) -> None:
    obs = scripted_episode(4)["obs"]
    stacked = frame_history(obs, obs_horizon)
    assert stacked.shape == (5, obs_horizon, 3)
    for t in range(5):
        for j in range(obs_horizon):
            np.testing.assert_array_equal(stacked[t, j], obs[max(0, t - (obs_horizon - 1 - j))])


@pytest.mark.parametrize(("obs_horizon", "pred_horizon"), [(1, 1), (2, 4), (3, 16)])
@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_joint_pos"])
def test_windows_against_a_loop(
    tmp_path: Path, episodes: list[dict[str, Any]], obs_horizon: int, pred_horizon: int, control_mode: str
) -> None:
    demos = load_demos(write_demos(tmp_path / "demos.h5", episodes, control_mode))
    obs, actions = action_windows(demos, obs_horizon, pred_horizon)
    row = 0
    for episode in episodes:
        length, last = len(episode["actions"]), episode["actions"][-1]
        standstill = np.append(np.zeros_like(last[:-1]), last[-1]) if "delta" in control_mode else last
        for t in range(length):
            for j in range(obs_horizon):
                np.testing.assert_array_equal(obs[row, j], episode["obs"][max(0, t - obs_horizon + 1 + j)])
            for j in range(pred_horizon):
                np.testing.assert_array_equal(actions[row, j], episode["actions"][t + j] if t + j < length else standstill)
            row += 1
    assert len(obs) == len(actions) == row == demos.n_steps


@pytest.mark.parametrize("act_horizon", [1, 3, 8])
@pytest.mark.parametrize("obs_horizon", [1, 2])
@pytest.mark.parametrize("ignore_terminations", [False, True])
@pytest.mark.parametrize("reward_scale", [1.0, 5.0])
def test_chunk_transitions_against_a_loop(
    path: Path,
    episodes: list[dict[str, Any]],
    act_horizon: int,
    obs_horizon: int,
    ignore_terminations: bool,
    reward_scale: float,
) -> None:
    found = chunk_transitions(load_demos(path), obs_horizon, act_horizon, GAMMA, ignore_terminations, reward_scale)

    def frames(episode: dict[str, Any], t: int) -> np.ndarray:
        return np.stack([episode["obs"][max(0, t - i)] for i in reversed(range(obs_horizon))])

    row = 0
    for episode in episodes:
        length, done = len(episode["actions"]), episode["terminated"]
        for start in range(length):
            if not ignore_terminations and done[:start].any():
                break  # the episode was over before
            reward, k, ended = 0.0, 0, False
            while k < act_horizon and start + k < length and not ended:
                reward += GAMMA**k * episode["rewards"][start + k]
                ended = bool(done[start + k]) and not ignore_terminations
                k += 1
            np.testing.assert_array_equal(found.obs[row], frames(episode, start))
            np.testing.assert_array_equal(found.next_obs[row], frames(episode, start + k))
            np.testing.assert_array_equal(found.chunk[row, :k], episode["actions"][start : start + k])
            np.testing.assert_allclose(found.reward[row], reward_scale * reward, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.discount[row], 0.0 if ended else GAMMA**k, rtol=1e-6)
            row += 1
    assert len(found.obs) == len(found.discount) == row
    assert (found.discount == 0).any() != ignore_terminations


def test_only_rewards_stand_between_demos_and_transitions(tmp_path: Path) -> None:
    episodes = [scripted_episode(4), {key: value for key, value in scripted_episode(5).items() if key != "rewards"}]
    demos = load_demos(write_demos(tmp_path / "demos.h5", episodes))
    assert len(action_windows(demos, 1, 2)[0]) == 9
    with pytest.raises(ValueError, match=r"demos.h5: episode 1 has no 'rewards': record them"):
        chunk_transitions(demos, 1, 2, GAMMA, ignore_terminations=True)


#: What replay_trajectory of ManiSkill 3.0.1 writes into env_kwargs
REPLAYED = dict(reward_mode=None, render_backend="none", sim_backend="physx_cpu", num_envs=1, render_mode="rgb_array")


@pytest.mark.parametrize(
    ("mode", "env_kwargs", "about", "warns"),
    [
        ("pd_ee_delta_pose", REPLAYED, {}, True),
        ("pd_joint_delta_pos", REPLAYED, {}, False),
        ("pd_ee_delta_pose", REPLAYED, dict(source_type="motionplanning"), False),  # recorded, as by make_demos.py
        ("pd_ee_delta_pose", dict(sim_backend="physx_cpu"), {}, False),
    ],
)
def test_replayed_rotations_are_warned_of(
    tmp_path: Path, mode: str, env_kwargs: dict[str, Any], about: dict[str, Any], warns: bool
) -> None:
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(3, action_dim=7)] * 2, mode, mode)
    meta = json.loads(path.with_suffix(".json").read_text()) | about
    meta["env_info"]["env_kwargs"] = dict(obs_mode="state", control_mode=mode) | env_kwargs
    path.with_suffix(".json").write_text(json.dumps(meta))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_demos(path)
    found = [str(warning.message) for warning in caught]
    assert len(found) == warns
    assert not warns or re.search(r"demos.h5 looks as if replay_trajectory .* axis-angle there, .* Euler angles", found[0])


# Refusals are in tests/faults/demo_files.py


def test_what_is_not_read_cannot_harm(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(5), scripted_episode(0)])
    assert load_demos(path, num_demos=1).n_steps == 5


def test_rounding_errors_of_actions_are_clipped(tmp_path: Path) -> None:
    episode = scripted_episode(5)
    episode["actions"][0, 0] = 1.00005
    assert load_demos(write_demos(tmp_path / "demos.h5", [episode])).episodes[0].actions.max() <= 1.0


def test_checksums(tmp_path: Path) -> None:
    """The file of ``sha256sum``, also in its binary form; without one nothing is checked."""
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(5)])
    files = [path, path.with_suffix(".json")]
    sums = path.with_suffix(".sha256")
    subprocess.run(["sha256sum", "-b", *(file.name for file in files)], cwd=tmp_path, stdout=sums.open("w"), check=True)
    assert load_demos(path).n_steps == 5
    write_sums(sums, files)
    subprocess.run(["sha256sum", "-c", sums.name], cwd=tmp_path, check=True, capture_output=True)
    files[1].write_text(files[1].read_text() + "\n")
    with pytest.raises(ValueError, match=r"demos.json is not the file that demos.sha256 was written for"):
        load_demos(path)
    sums.unlink()
    assert load_demos(path).n_steps == 5


# The file that is shipped


def test_shipped_demos_are_small_and_say_what_they_are() -> None:
    meta = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert meta["env_info"]["env_kwargs"]["control_mode"] == "pd_joint_delta_pos"
    assert meta["env_info"]["env_kwargs"]["reward_mode"] == "normalized_dense"
    assert SHIPPED.stat().st_size + SHIPPED.with_suffix(".json").stat().st_size < 3_000_000
    assert SHIPPED.with_suffix(".sha256").is_file()


def test_shipped_demos_load() -> None:
    demos = load_demos(SHIPPED, control_mode="pd_joint_delta_pos")
    assert (demos.env_id, demos.obs_mode, demos.reward_mode) == ("PushCube-v1", "state", "normalized_dense")
    assert len(demos.episodes) == len(json.loads(SHIPPED.with_suffix(".json").read_text())["episodes"])
    assert (demos.obs_dim, demos.action_dim) == (35, 8)
    for episode in demos.episodes:
        assert episode.rewards is not None and episode.success is not None
        assert episode.rewards.min() >= 0 and episode.rewards.max() <= 1  # normalised
        assert episode.success[-1]  # only successes are kept
    transitions = chunk_transitions(demos, 2, 4, 0.99, ignore_terminations=True)
    assert len(transitions.reward) == demos.n_steps
    assert (transitions.discount > 0).all()
