"""The wrappers on real ManiSkill envs: PushCube-v1 and PickCube-v1 on the CPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    LatentSteeringWrapper,
    ResumeCallback,
    WorkerSettings,
    collect_rollouts,
    evaluate,
    load_demos,
    make_chunk_env,
    make_latent_env,
    ppo_kwargs,
    resume,
)
from sb3_dsrl.envs import maniskill
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.stage2.resume import RECONFIGURE
from sb3_dsrl.utils.checkpoint import previous
from tests.envs import tiny_flow
from tests.stage2 import bits

DEMOS = Path(__file__).parent.parent / "examples" / "demos" / "PushCube-v1.h5"
TASKS = {"PushCube-v1": 35, "PickCube-v1": 42}
MODES = dict(obs_mode="state", control_mode="pd_joint_delta_pos", sim_backend="physx_cpu", render_backend="none")


def flow_for(env_id: str) -> FlowPolicy:
    return tiny_flow(TASKS[env_id], 8, pred_horizon=4, act_horizon=4, env_id=env_id, control_mode="pd_joint_delta_pos")


def raw_env(env_id: str, **kwargs: Any) -> gym.Env:
    return gym.make(env_id, **{**MODES, "reward_mode": "normalized_dense", **kwargs})


@pytest.fixture(params=list(TASKS))
def env_id(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def workers(env_id: str) -> Iterator[VecEnv]:
    env = make_latent_env(env_id, flow_for(env_id), n_envs=2, max_episode_steps=10, seed=0)
    yield env
    env.close()


def test_other_act_horizon() -> None:
    flow = flow_for("PushCube-v1")
    env = make_latent_env("PushCube-v1", flow, act_horizon=2, max_episode_steps=5)
    result = evaluate("prior", env, 1)
    assert result.episodes == 1 and env.steering.contract.act_horizon == 2 and flow.act_horizon == 4
    assert env.step(np.zeros((1, 4, 8)))[3][0]["action_chunk"].shape == (2, 8)
    assert env.macro_gamma == pytest.approx(0.99**2)
    env.close()


def test_check_env(env_id: str) -> None:
    flow = flow_for(env_id)
    env = LatentSteeringWrapper(raw_env(env_id), flow)
    check_env(env, warn=False)
    check_env(env.env, warn=False)
    env.close()


def test_chunk_is_what_the_simulator_does(env_id: str) -> None:
    """A chunk against the same actions in a bare env: reward, observation, no aliasing of simulator memory."""
    gamma, rng = 0.9, np.random.default_rng(0)
    env, bare = ActionChunkWrapper(raw_env(env_id), act_horizon=4, obs_horizon=2, gamma=gamma), raw_env(env_id)
    obs, _ = env.reset(seed=5)
    frame, _ = bare.reset(seed=5)
    np.testing.assert_array_equal(obs, np.stack([frame[0].numpy()] * 2))
    for _ in range(3):
        chunk = rng.uniform(-1, 1, (4, 8)).astype(np.float32)
        kept = obs.copy()
        next_obs, reward, *_ = env.step(chunk)
        np.testing.assert_array_equal(obs, kept)
        frames, expected = [], 0.0
        for i, action in enumerate(chunk):
            frame, r, *_ = bare.step(action)
            frames.append(frame[0].numpy().copy())
            expected += gamma**i * float(r)
        np.testing.assert_allclose(next_obs, np.stack(frames[-2:]), atol=1e-6)
        assert reward == pytest.approx(expected, abs=1e-6)
        obs = next_obs
    env.close()
    bare.close()


def test_worker_processes_equal_the_gym_form(env_id: str, workers: VecEnv) -> None:
    flow = flow_for(env_id)
    single = DummyVecEnv(
        [
            lambda: LatentSteeringWrapper(raw_env(env_id, max_episode_steps=10), flow, ignore_terminations=True)
            for _ in range(workers.num_envs)
        ]
    )
    noises = np.random.default_rng(1).standard_normal((7, 2, 4, 8)).astype(np.float32)
    transitions = []
    for venv in (workers, single):
        venv.seed(3)
        rows = [(venv.reset(),)]
        rows += [venv.step(w) for w in noises]
        transitions.append(rows)
    for ours, theirs in zip(*transitions, strict=True):
        for x, y in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        for info, other in zip(ours[3] if len(ours) > 1 else [], theirs[3] if len(theirs) > 1 else [], strict=True):
            assert info["chunk_length"] == other["chunk_length"] == 4
            assert info["TimeLimit.truncated"] == other["TimeLimit.truncated"]
            assert ("terminal_observation" in info) == ("terminal_observation" in other)
    single.close()


def test_time_limit_inside_a_chunk(workers: VecEnv) -> None:
    """A limit of 10 steps falls into the third chunk of 4: 12 steps run, 10 count."""
    workers.reset()
    dones = []
    for _ in range(3):
        _, _, done, infos = workers.step(np.zeros((2, 4, 8), np.float32))
        dones.append(done.tolist())
    assert dones == [[False] * 2, [False] * 2, [True] * 2]
    for info in infos:
        assert info["TimeLimit.truncated"] and (info["episode_length"], info["episode"]["l"]) == (10, 3)
        assert info["chunk_length"] == 4 and info["success_at_end"] is False


def test_ppo_learns_and_evaluates(env_id: str, workers: VecEnv) -> None:
    model = PPO("LatentPolicy", workers, **ppo_kwargs(workers, n_steps=8, batch_size=16, n_epochs=1))
    model.learn(16)
    result = evaluate(model, workers, episodes=3)
    assert result.episodes == 3 and result.mean_length == 10 and 0 < result.mean_return < 10


def test_make_vec_env_of_sb3() -> None:
    """It wraps Monitor(env) in the wrapper; an episode of 50 env steps is 13 chunks of 4."""
    venv = make_vec_env(
        "PushCube-v1",
        seed=0,
        env_kwargs=MODES,
        wrapper_class=LatentSteeringWrapper,
        wrapper_kwargs=dict(flow=flow_for("PushCube-v1")),
    )
    model = PPO("LatentPolicy", venv, **ppo_kwargs(venv, n_steps=16, n_epochs=1)).learn(16)
    assert [episode["l"] for episode in model.ep_info_buffer] == [13]
    returns, lengths = evaluate_policy(model, venv, 1, return_episode_rewards=True)
    assert lengths == [13] and 0 < returns[0] < 13 * 4
    venv.close()


def test_same_seed_same_episodes(workers: VecEnv) -> None:
    first, second, other = (collect_rollouts("prior", workers, 4, seed=seed) for seed in (1, 1, 2))
    for name in ("cond", "w", "chunk", "reward", "next_cond"):
        assert (getattr(first, name) == getattr(second, name)).all(), name
        assert not (getattr(first, name) == getattr(other, name)).all(), name
    assert first.env_steps == 4 * 12


def test_errors_name_the_way_out() -> None:
    flow = flow_for("PushCube-v1")
    with pytest.raises(ValueError, match=r"'PushCub-v1' is not a ManiSkill environment; did you mean PushCube-v1"):
        make_latent_env("PushCub-v1", flow)
    with pytest.raises(ValueError, match="n_envs must be at least 1, found 0"):
        make_latent_env("PushCube-v1", flow, n_envs=0)
    with pytest.raises(ValueError, match="sim_backend must be"):
        make_latent_env("PushCube-v1", flow, sim_backend="physx_gpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="The flow was trained on PushCube-v1, but the env is PickCube-v1; if that is meant"):
        make_latent_env("PickCube-v1", flow)
    with pytest.raises(ValueError, match=r"observations have shape .* \(2, 42\), but the flow's are \(2, 35\)"):
        make_latent_env("PickCube-v1", flow, allow_other_task=True)
    with pytest.raises(
        ValueError, match=r"control_mode='pd_joint_target_delta_pos', but the flow's actions are for 'pd_joint_delta_pos'"
    ):
        make_latent_env("PushCube-v1", flow, control_mode="pd_joint_target_delta_pos")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("asked", "simulator"), [(None, "physx_cpu"), ("cpu", "physx_cpu"), ("gpu", "physx_cuda")])
def test_number_of_envs_does_not_choose_the_physics(
    gpu: bool, asked: str | None, simulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 training and 25 evaluation envs simulate alike, whether or not there is a GPU. (No simulator runs here.)"""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(maniskill, "_made", lambda env_id, **kwargs: made.append(kwargs))
    monkeypatch.setattr(maniskill, "spread_envs", lambda make, *args, **kwargs: make())
    for name in ("ActionChunkWrapper", "BatchedChunkEnv", "flat_images", "unbatched"):
        monkeypatch.setattr(maniskill, name, lambda env, *args, **kwargs: env)
    for n_envs in (1, 25, 50, 512):
        make_chunk_env("PushCube-v1", n_envs, **({} if asked is None else dict(sim_backend=asked)))  # type: ignore[arg-type]
    assert [kwargs["sim_backend"] for kwargs in made] == [simulator] * 4


def test_one_env_in_a_worker_if_asked_for() -> None:
    env = make_chunk_env("PushCube-v1", control_mode="pd_joint_delta_pos", workers=WorkerSettings(on_failure="restart"))
    assert isinstance(env, WorkerVecEnv) and env.settings.on_failure == "restart"
    env.close()


def test_registered_id_steers_it_too() -> None:
    flow = flow_for("PushCube-v1")
    asked = dict(max_episode_steps=8, sim_backend="physx_cpu")
    env = gym.make("sb3_dsrl/Latent-v0", env_id="PushCube-v1", flow=flow, env_kwargs=asked)
    (same,) = make_latent_env("PushCube-v1", flow, max_episode_steps=8).venv.envs  # type: ignore[attr-defined]
    same = LatentSteeringWrapper(same, flow)
    np.testing.assert_array_equal(env.reset(seed=3)[0], same.reset(seed=3)[0])
    for _ in range(2):
        w = np.full(flow.noise_shape, 0.3, np.float32)
        (obs, reward, *ends, _), (other_obs, other_reward, *other_ends, _) = env.step(w), same.step(w)
        np.testing.assert_array_equal(obs, other_obs)
        assert (reward, ends) == (other_reward, other_ends)
    assert ends == [False, True]


def test_batched_simulator_is_refused() -> None:
    class Batched(gym.Env):
        num_envs, gpu_sim_enabled, device = 4, True, "cuda"
        single_action_space = None
        spec = gym.spec("PushCube-v1")

    with pytest.raises(ValueError, match=r"use make_latent_env\('PushCube-v1', flow, n_envs=4\)"):
        LatentSteeringWrapper(Batched(), flow_for("PushCube-v1"))


def test_a_scene_built_anew_remembers_nothing() -> None:
    """What a resume relies on: without the option, contacts of earlier episodes change the last bits of two of these."""
    numbers = (1, 2, 3, 4)
    seeds = [episode["episode_seed"] for episode in json.loads(DEMOS.with_suffix(".json").read_text())["episodes"]]
    demos = load_demos(DEMOS).episodes
    env = ActionChunkWrapper(raw_env("PushCube-v1"), 4)

    def play(number: int) -> np.ndarray:
        actions = demos[number].actions
        obs, _ = env.reset(seed=seeds[number], options=dict(RECONFIGURE))
        return np.array([obs, *(env.step(chunk)[0] for chunk in actions[: len(actions) // 4 * 4].reshape(-1, 4, 8))])

    first = {number: play(number) for number in numbers}
    assert all(np.abs(obs[-1] - obs[0]).max() > 0.1 for obs in first.values())
    for number in reversed(numbers):  # after another history
        np.testing.assert_array_equal(play(number), first[number])
    env.close()


def test_stage_2_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Twice, and once more from a checkpoint in processes that know nothing of the first."""
    kwargs: dict[str, Any] = dict(n_steps=8, batch_size=8, n_epochs=2, seed=3, policy_kwargs=dict(net_arch=[16]))
    total = 2 * 8 * 4

    def run(env: VecEnv, path: Path) -> PPO:
        model = resume(PPO, path, env) or PPO("LatentPolicy", env, **ppo_kwargs(env, **kwargs))
        fresh = model.num_timesteps == 0
        return model.learn(total - model.num_timesteps, ResumeCallback(path, save_freq=60), reset_num_timesteps=fresh)

    def make() -> VecEnv:
        return make_latent_env("PushCube-v1", flow_for("PushCube-v1"), 2, workers=WorkerSettings(2), max_episode_steps=20)

    first, second = make(), make()
    try:
        expected = run(first, tmp_path / "a.zip")
        previous(tmp_path / "a.zip").rename(tmp_path / "middle.zip")
        for path in ("middle.zip", "b.zip"):  # the first is there, the second is not
            model = run(second, tmp_path / path)
            assert bits(model.policy) == bits(expected.policy)
            assert np.array_equal(model.rollout_buffer.rewards, expected.rollout_buffer.rewards)
    finally:
        first.close()
        second.close()
