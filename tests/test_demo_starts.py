"""Starts from demo files: what is read, and ManiSkill's envs that go on from there as the demos did."""

import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import ActionChunkWrapper, DemoStarts, WorkerSettings, evaluate, load_demos, make_chunk_env, make_latent_env
from sb3_dsrl.envs.maniskill_wrappers import unbatched
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.steering.start_control import get_progress, set_progress
from tests.demo_files import scripted_episode, write_demos
from tests.envs import tiny_flow

PUSH = Path(__file__).parent.parent / "examples" / "demos" / "PushCube-v1.h5"
CONTROL = "pd_joint_delta_pos"


def with_states(length: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A scripted episode whose states are of one body and one robot; that of step i is full of i."""
    states = {"actors/cube": np.tile(np.arange(length + 1.0)[:, None], 13), "articulations/robot": np.zeros((length + 1, 20))}
    return scripted_episode(length, seed=seed, **changes) | dict(env_states=states)


def test_a_piece_of_a_demo(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "demos.h5", [with_states(8), with_states(6, ends=(3, 5))])
    starts = DemoStarts(path, true_starts=0.1)
    assert starts.last_starts == [7, 3]  # the last step, and the one that brought success
    assert (starts.env_id, starts.control_mode, starts.true_starts) == ("PushCube-v1", CONTROL, 0.1)
    assert len(pickle.dumps(starts)) < 2_000  # workers get no states, they read them
    piece = pickle.loads(pickle.dumps(starts)).read(1, 2, 4)
    assert piece.elapsed_steps == piece.state["elapsed_steps"] == 2 and piece.options == {"episode_seed": 1}
    np.testing.assert_array_equal(piece.actions, scripted_episode(6)["actions"][2:4])
    np.testing.assert_array_equal(piece.state["env_states"]["actors"]["cube"], np.full((1, 13), 2.0))
    assert piece.state["env_states"]["articulations"]["robot"].shape == (1, 20)
    assert DemoStarts(path, 1).last_starts == [7]
    assert DemoStarts(load_demos(path, 1)).last_starts == [7]
    assert DemoStarts(load_demos(path)).last_starts == [7, 3]


def test_demos_of_arrays_have_no_states() -> None:
    demos = Demos.from_arrays([np.zeros((3, 2))], [np.zeros((2, 1))])
    with pytest.raises(ValueError, match="arrays is no file with 'env_states': starts need the simulator's states of a Man"):
        DemoStarts(demos)


# ------------------------------------------------------------------------------------------------------ ManiSkill on the CPU


def chunk_env(env_id: str, horizon: int = 4, **kwargs: Any) -> ActionChunkWrapper:
    made = gym.make(env_id, obs_mode="state", render_backend="none", control_mode=CONTROL, reward_mode="normalized_dense")
    return ActionChunkWrapper(unbatched(made), horizon, obs_horizon=2, **kwargs)


@pytest.fixture(scope="module")
def pick_cube(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two short random episodes of PickCube-v1, as ManiSkill records them. The gripper touches nothing."""
    env, rng, episodes = chunk_env("PickCube-v1", 1).env, np.random.default_rng(0), []
    base: Any = env.unwrapped

    def state() -> dict[str, np.ndarray]:
        kinds = base.get_state_dict().items()
        return {f"{kind}/{name}": np.array(value[0]) for kind, part in kinds for name, value in part.items()}

    for seed in range(2):
        obs, states, actions, rewards = [env.reset(seed=seed)[0].copy()], [state()], [], []
        for _ in range(10):
            actions.append(rng.normal(0, 0.3, 8).clip(-1, 1).astype(np.float32))
            seen, reward, *_ = env.step(actions[-1])
            obs.append(np.array(seen))
            states.append(state())
            rewards.append(float(reward))
        env_states = {key: np.stack([own[key] for own in states]) for key in states[0]}
        none = np.zeros(10, bool)
        episodes.append(
            dict(obs=np.stack(obs), actions=np.stack(actions), rewards=np.array(rewards), env_states=env_states)
            | dict(terminated=none, truncated=none)
        )
    env.close()
    path = tmp_path_factory.mktemp("pick") / "demos.h5"
    return write_demos(path, episodes, control_mode=CONTROL, env_id="PickCube-v1"), episodes


def test_pick_cube_goes_on_as_in_the_demo(pick_cube: tuple[Path, list[dict[str, Any]]]) -> None:
    """Frames, goal, rewards and clock; without contact to the last digits of float32."""
    path, episodes = pick_cube
    env, seen = chunk_env("PickCube-v1", starts=DemoStarts(path, true_starts=0.0)), set()
    for i in range(8):
        env.set_start_progress(i / 7)
        obs, _ = env.reset(seed=50 + i)
        errors = [np.abs(own["obs"][t - 1 : t + 1] - obs).max() for own in episodes for t in range(2, 10)]
        own, t = episodes[int(np.argmin(errors)) // 8], 2 + int(np.argmin(errors)) % 8
        seen.add((int(np.argmin(errors)) // 8, t))
        assert min(errors) < 1e-3
        base: Any = env.unwrapped
        assert int(base.elapsed_steps) == t
        np.testing.assert_allclose(np.array(base.goal_site.pose.p)[0], own["env_states"]["actors/goal_site"][0, :3], atol=1e-6)
        chunk = np.concatenate([own["actions"][t:], np.zeros((4, 8), np.float32)])[:4]
        obs, reward, *_ = env.step(chunk)
        k = min(4, 10 - t)
        if k == 4:
            np.testing.assert_allclose(obs, own["obs"][t + 3 : t + 5], atol=2e-3)
            assert reward == pytest.approx(sum(0.99**j * own["rewards"][t + j] for j in range(4)), abs=2e-3)
    assert {episode for episode, _ in seen} == {0, 1} and len({t for _, t in seen}) > 3
    env.close()


def test_true_starts_are_those_of_an_env_without(pick_cube: tuple[Path, list[dict[str, Any]]]) -> None:
    env, plain = chunk_env("PickCube-v1", starts=DemoStarts(pick_cube[0], true_starts=0.5)), chunk_env("PickCube-v1")
    expected = [plain.reset(seed=3)[0], *(plain.reset()[0] for _ in range(5))]
    found, true = [], []
    for i in range(8):
        found.append(env.reset(seed=3 if i == 0 else None)[0])
        true.append(int(env.unwrapped.elapsed_steps) == 0)  # type: ignore[attr-defined]
    assert 2 <= sum(true) < 8
    for own, other in zip(
        [obs for obs, is_true in zip(found, true, strict=True) if is_true], expected[not true[0] :], strict=False
    ):
        np.testing.assert_array_equal(own, other)  # demo starts take none of the seeds that follow
    env.use_starts(False)
    assert np.array_equal(env.reset(seed=3)[0], expected[0]) and np.array_equal(env.reset()[0], expected[1])
    for one in (env, plain):
        one.close()


def test_demos_succeed_from_where_they_are_taken_up() -> None:
    """PushCube-v1, with contacts: the rest of the demo's actions bring the cube to the goal."""
    starts, demos = DemoStarts(PUSH, true_starts=0.0), load_demos(PUSH)
    env, done, drawn = chunk_env("PushCube-v1", starts=starts), [], []
    read = starts.read
    starts.read = lambda *piece: drawn.append(piece) or read(*piece)  # type: ignore[method-assign, func-returns-value]
    for i in range(8):
        env.set_start_progress(i / 7)
        env.reset(seed=i)
        episode, _, t = drawn[-1]
        actions = demos.episodes[episode].actions[t:]
        padded = np.concatenate([actions, np.tile(actions[-1:] * 0, (-len(actions) % 4, 1))]).reshape(-1, 4, 8)
        done.append(any(env.step(chunk)[4]["is_success"] for chunk in padded))
    assert sum(done) >= 7 and len({t for *_, t in drawn}) > 4
    env.close()


def played(venv: VecEnv, n: int = 14) -> list[Any]:
    rng, steps = np.random.default_rng(0), [np.asarray(venv.reset())]
    for _ in range(n):
        chunks = rng.normal(0, 0.3, (3, 4, 8)).clip(-1, 1).astype(np.float32)
        obs, rewards, dones, infos = venv.step(chunks)
        steps += [obs, rewards, dones, np.array([info.get("start_step", -1) for info in infos])]
    return steps


def test_workers_start_as_one_process_does() -> None:
    found = []
    for n_workers in (1, 3):
        kwargs: Any = dict(act_horizon=4, obs_horizon=2, control_mode=CONTROL, max_episode_steps=45)
        venv = make_chunk_env("PushCube-v1", 3, workers=WorkerSettings(n_workers), starts=DemoStarts(PUSH), **kwargs)
        venv.seed(0)
        found.append(played(venv))
        assert np.shape(get_progress(venv)) == (3,)
        venv.close()
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({step for steps in found[0][4::4] for step in steps.tolist()}) > 2


def test_the_steered_env_takes_starts() -> None:
    flow = tiny_flow(35, 8, pred_horizon=4, act_horizon=4, env_id="PushCube-v1", control_mode=CONTROL)
    env = make_latent_env("PushCube-v1", flow, 1, starts=DemoStarts(PUSH, true_starts=0.0), max_episode_steps=45)
    set_progress(env, [0.0])
    env.seed(0)
    env.reset()
    w, ended = np.zeros((1, 4, 8), np.float32), None
    while ended is None:
        info = env.step(w)[3][0]
        ended = info if "start_step" in info else None
    assert 10 < ended["start_step"] < 45 and ended["episode_length"] == 45 - ended["start_step"]
    assert evaluate("zero", env, 1).mean_length == 45
    env.close()


def test_refusals(tmp_path: Path) -> None:
    starts = DemoStarts(PUSH)
    with pytest.raises(ValueError, match=r"PushCube-v1\.h5 was recorded with env 'PushCube-v1', but .* in 'PickCube-v1'"):
        chunk_env("PickCube-v1", starts=starts)
    with pytest.raises(ValueError, match=r"with control_mode 'pd_joint_delta_pos', but .* in 'pd_joint_pos'"):
        make_chunk_env("PushCube-v1", control_mode="pd_joint_pos", starts=starts)
    with pytest.raises(ValueError, match="starts are for sim_backend='physx_cpu'"):
        make_chunk_env("PushCube-v1", sim_backend="physx_cuda", starts=starts)
    with pytest.raises(ValueError, match=r"episodes in a row ended .*: is the time limit of PushCube-v1 shorter than theirs"):
        make_chunk_env("PushCube-v1", max_episode_steps=5, starts=DemoStarts(PUSH, true_starts=0.0)).reset()
    foreign = write_demos(tmp_path / "foreign.h5", [with_states(8)])
    with pytest.raises(ValueError, match=r"PushCube-v1 has .*'goal_region'.*, but the recorded state is of .*'robot'"):
        chunk_env("PushCube-v1", starts=DemoStarts(foreign, true_starts=0.0)).reset(seed=0)


def test_a_file_that_changes_afterwards(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "demos.h5", [with_states(8)])
    starts = DemoStarts(path)
    with h5py.File(path, "a") as file:
        del file["traj_0/env_states"]
    with pytest.raises(ValueError, match=r"demos\.h5:traj_0 cannot be read any more; it is damaged or was replaced"):
        starts.read(0, 1, 2)
