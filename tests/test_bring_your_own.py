"""The page ``docs/bring_your_own.md``: its blocks, and SB3's tools on a Pendulum that a ten-line policy steers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_dsrl import (
    LatentPolicy,
    LatentSteeringWrapper,
    SteerablePolicy,
    SteeredPolicy,
    collect_rollouts,
    make_latent_env,
    ppo_kwargs,
    pretrain_latent,
)
from tests.pages import DOCS, blocks

PAGE = DOCS / "bring_your_own.md"
BLOCKS = [block.text for block in blocks(PAGE, "python")]
H, LIMIT = 2, 30


class Swing(SteerablePolicy):
    def __init__(self) -> None:
        super().__init__(obs_shapes=(3,), obs_horizon=1, noise_shape=(4, 1), cond_dim=3, act_horizon=H)

    def encode(self, obs: Any) -> th.Tensor:
        return th.as_tensor(obs)[:, -1].float()

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        along = cond[:, 2].sign().view(-1, *[1] * (w.dim() - 1))
        return (0.5 * along + w).clamp(-1, 1)


def made(n_envs: int = 2, vec_env_cls: type[Any] = DummyVecEnv) -> VecEnv:
    return make_vec_env(
        "Pendulum-v1",
        n_envs,
        seed=0,
        env_kwargs=dict(max_episode_steps=LIMIT),
        wrapper_class=LatentSteeringWrapper,
        wrapper_kwargs=dict(flow=Swing()),
        vec_env_cls=vec_env_cls,
    )


def model_on(env: VecEnv, **kwargs: Any) -> PPO:
    settings: dict[str, Any] = dict(n_steps=32, n_epochs=1, policy_kwargs=dict(net_arch=[16]), seed=0)
    return PPO("LatentPolicy", env, **ppo_kwargs(env, **(settings | kwargs)))


@pytest.fixture
def env() -> Iterator[VecEnv]:
    venv = made()
    yield venv
    venv.close()


def block(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a block leaves behind when it runs in a folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(BLOCKS[number], f"{PAGE.name}, block {number}", "exec"), names)
    return names


def test_blocks_are_short() -> None:
    lines = [[line for line in code.splitlines() if line.strip()] for code in BLOCKS]
    assert len(lines) == 3 and all(len(block) <= 15 for block in lines)


def test_own_env_and_own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = block(0, tmp_path, monkeypatch)
    assert names["model"].num_timesteps == 1_024 and isinstance(names["model"].policy, LatentPolicy)
    cond, w = th.randn(5, 3), th.randn(5, 7, 4, 1)  # the page's policy is the one of the tests below
    assert (names["Swing"]().decode(cond, w) == Swing().decode(cond, w)).all()


def test_demos_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demos").mkdir()
    raw, flow = gym.make("Pendulum-v1", max_episode_steps=40), Swing()
    for i in range(4):
        obs, actions, rewards = [raw.reset(seed=i)[0]], [], []
        for _ in range(40):
            action = np.float32([1.5 * np.sign(obs[-1][2])])
            seen, reward, *_ = raw.step(action)
            obs.append(seen), actions.append(action), rewards.append(reward)
        np.savez(tmp_path / "demos" / f"{i}.npz", obs=obs, actions=actions, rewards=rewards)
    names = block(2, tmp_path, monkeypatch)
    assert len(names["demos"].episodes) == 4 and names["demos"].actions().max() == 0.75
    played = names["env"].envs[0].get_wrapper_attr("steering").flow
    assert played.fingerprint() == names["flow"].fingerprint() and played.critic.updates == 100
    latent = LatentPolicy.load(tmp_path / "latent.safetensors")
    assert latent.contract == names["model"].policy.contract != flow
    latent.copy_into(names["model"])


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_make_vec_env(vec_env_cls: type[Any]) -> None:
    env, other = made(2, vec_env_cls), make_latent_env("Pendulum-v1", Swing(), 2, max_episode_steps=LIMIT, seed=0)
    np.testing.assert_allclose(env.reset(), other.reset(), atol=1e-6)
    rng = np.random.default_rng(0)
    for step in range(LIMIT // H):
        w = rng.standard_normal((2, 4, 1)).astype(np.float32)
        (obs, rewards, dones, infos), theirs = env.step(w), other.step(w)
        if step < LIMIT // H - 1:  # then the next episodes begin, each where its env's seed says
            np.testing.assert_allclose(obs, theirs[0], atol=1e-4)
        np.testing.assert_allclose(rewards, theirs[1], atol=1e-4)
        assert list(dones) == list(theirs[2]) == [step == LIMIT // H - 1] * 2
    assert [info["episode"]["l"] for info in infos] == [LIMIT // H] * 2 and infos[0]["TimeLimit.truncated"]
    env.close()
    other.close()


def test_registered_id_is_the_same_env() -> None:
    kwargs = dict(env_id="Pendulum-v1", flow=Swing(), env_kwargs=dict(max_episode_steps=LIMIT), noise_bound=2.0)
    env, other = make_vec_env("sb3_dsrl/Latent-v0", 2, seed=0, env_kwargs=kwargs), made()
    np.testing.assert_array_equal(env.reset(), other.reset())
    w = np.full((2, 4, 1), 0.3, np.float32)
    for ours, theirs in zip(env.step(w)[:3], other.step(w)[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert env.action_space.high.max() == 2.0  # type: ignore[attr-defined]


def test_monitor(env: VecEnv, tmp_path: Path) -> None:
    assert all(env.env_is_wrapped(Monitor))
    inner = LatentSteeringWrapper(gym.make("Pendulum-v1", LIMIT), Swing())
    monitored = Monitor(inner, str(tmp_path / "log"))
    monitored.reset(seed=0)
    rewards = []
    for _ in range(LIMIT // H):
        _, reward, _, truncated, info = monitored.step(np.zeros((4, 1), np.float32))
        rewards.append(reward)
    assert truncated and info["episode"]["l"] == LIMIT // H
    assert info["episode"]["r"] == pytest.approx(sum(map(float, rewards)), abs=1e-4)


def test_evaluate_policy(env: VecEnv) -> None:
    model = model_on(env)
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [LIMIT // H] * 4 and np.isfinite(rewards).all()


def test_eval_callback(env: VecEnv, tmp_path: Path) -> None:
    callback = EvalCallback(
        made(1), n_eval_episodes=2, eval_freq=32, log_path=str(tmp_path), best_model_save_path=str(tmp_path)
    )
    model = model_on(env).learn(128, callback=callback)
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [64, 128] and (results["ep_lengths"] == LIMIT // H).all()
    best = PPO.load(tmp_path / "best_model", env=env)
    assert isinstance(best.policy, LatentPolicy) and best.policy.contract == model.policy.contract


def test_vec_normalize(env: VecEnv) -> None:
    rewards = VecNormalize(env, norm_obs=False, gamma=Swing().gamma ** H)
    model = model_on(rewards).learn(64)
    assert rewards.ret_rms.count > 60
    assert SteeredPolicy.of(model).predict(np.zeros(3, np.float32)).shape == (H, 1)
    both = VecNormalize(env, gamma=Swing().gamma ** H)
    model = model_on(both).learn(64)
    with pytest.raises(ValueError, match="features that VecNormalize has normalised"):
        SteeredPolicy.of(model)
    with pytest.raises(ValueError, match="collect_rollouts needs the flow's own features and rewards"):
        collect_rollouts("prior", both, 2)


def test_vec_frame_stack_is_refused_where_features_are_needed(env: VecEnv) -> None:
    rollouts = collect_rollouts("prior", env, 2)
    stacked = VecFrameStack(env, 2)
    model = model_on(stacked).learn(64)  # PPO itself can do with any observation
    with pytest.raises(ValueError, match="train with obs='features', without wrappers that change observations"):
        SteeredPolicy.of(model)
    with pytest.raises(ValueError, match=r"sees Box\(-inf, inf, \(6,\).* features, Box\(-inf, inf, \(3,\).*train with obs="):
        pretrain_latent(model, rollouts=rollouts, n_iterations=1)
    with pytest.raises(
        ValueError, match=r"needs the flow's own features, .* but VecFrameStack shows Box\(.*\(6,\), float32\)"
    ):
        collect_rollouts("prior", stacked, 2)
    gym_form = gym.wrappers.FrameStackObservation(LatentSteeringWrapper(gym.make("Pendulum-v1"), Swing()), 2)
    with pytest.raises(ValueError, match=r"but FrameStackObservation shows Box\(.*\(2, 3\), float32\)"):
        collect_rollouts("prior", gym_form, 2)


@pytest.mark.filterwarnings("ignore:We recommend you to use a symmetric")
def test_check_env() -> None:
    check_env(LatentSteeringWrapper(gym.make("Pendulum-v1"), Swing()))
    check_env(gym.make("sb3_dsrl/Latent-v0", env_id="Pendulum-v1", flow=Swing()))


def test_other_algorithms(env: VecEnv) -> None:
    SAC("MlpPolicy", env, learning_starts=4, gamma=Swing().gamma ** H).learn(16)
