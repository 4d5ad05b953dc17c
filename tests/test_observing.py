"""What the latent policy sees: features, the env's frames, or both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dsrl import (
    ExactBootstrap,
    LatentPolicy,
    LatentSteeringWrapper,
    SteerablePolicy,
    SteeredPolicy,
    VecLatentSteering,
    collect_rollouts,
    evaluate,
    make_latent_env,
    pretrain_latent,
)
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.observing import Observer
from tests.envs import BatchedScriptedEnv, gym_steered, scripted, tiny_flow, vec_steered
from tests.models import small


def batched(flow: Any, envs: list[gym.Env], obs: Any) -> VecEnv:
    return VecLatentSteering(BatchedChunkEnv(BatchedScriptedEnv(envs), flow.act_horizon, flow.obs_horizon), flow, obs=obs)


FORMS: dict[str, Callable[..., VecEnv]] = {"gym form": gym_steered, "vec form": vec_steered, "batched": batched}
forms = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


class Parts(gym.ObservationWrapper):
    """The same observation as a dict of two."""

    def __init__(self, env: gym.Env, names: tuple[str, str] = ("a", "b")) -> None:
        super().__init__(env)
        self.names = names
        boxes = (spaces.Box(-np.inf, np.inf, (n,), np.float32) for n in (1, 2))
        self.observation_space = spaces.Dict(dict(zip(names, boxes, strict=True)))

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.names, (observation[:1], observation[1:]), strict=True))


class ByParts(SteerablePolicy):
    """Sees a dict; its features are its sums."""

    def __init__(self, names: tuple[str, str] = ("a", "b")) -> None:
        shapes = dict(zip(names, ((1,), (2,)), strict=True))
        super().__init__(obs_shapes=shapes, obs_horizon=2, noise_shape=(3, 2), cond_dim=2, act_horizon=3)

    def encode(self, obs: Any) -> th.Tensor:
        return th.stack([th.as_tensor(x).flatten(1).sum(dim=1) for x in obs.values()], dim=1).float()

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        return w.clamp(-1, 1)


def scripts(wrapper: Callable[[gym.Env], gym.Env] = lambda env: env) -> list[gym.Env]:
    """Episodes that end at awkward times, one of them by a time limit."""
    return [wrapper(scripted(limit, episode_lengths=lengths)) for limit, lengths in ((None, (5, 24, 2)), (10, (1000,)))]


def seen(env: VecEnv, n: int = 8) -> list[Any]:
    """All observations of the same noises, terminal ones, too."""
    rng = np.random.default_rng(0)
    found: list[Any] = [env.reset()]
    for _ in range(n):
        obs, _, dones, infos = env.step(rng.standard_normal((2, *env.action_space.shape)))  # type: ignore[misc]
        found.append(obs)
        found += [infos[i]["terminal_observation"] for i in np.flatnonzero(dones)]
    return found


@forms
def test_both_is_the_other_two(make: Callable[..., VecEnv]) -> None:
    flow = tiny_flow()
    features, raw, both = (seen(make(flow, scripts(), obs=kind)) for kind in ("features", "env", "both"))
    assert len(features) == len(raw) == len(both) > 11
    for ours, frames, pair in zip(features, raw, both, strict=True):
        assert set(pair) == {"features", "env"} and frames.shape[-2:] == (2, 3)
        np.testing.assert_array_equal(pair["features"], ours)
        np.testing.assert_array_equal(pair["env"], frames)
        encoded = flow.encode(frames[None] if frames.ndim == 2 else frames).numpy()
        np.testing.assert_allclose(encoded.reshape(ours.shape), ours, atol=1e-6)


@pytest.mark.parametrize("make", [gym_steered, vec_steered])
def test_a_dict_of_the_env_keeps_its_names(make: Callable[..., VecEnv]) -> None:
    plain, both = (seen(make(ByParts(), scripts(Parts), obs=kind)) for kind in ("env", "both"))
    for frames, pair in zip(plain, both, strict=True):
        assert list(frames) == ["a", "b"] and set(pair) == {"features", "a", "b"}
        for name in frames:
            np.testing.assert_array_equal(frames[name], pair[name])


@pytest.mark.parametrize("kind", ["features", "env", "both"])
def test_spaces_hold_what_is_seen(kind: Any) -> None:
    check_env(LatentSteeringWrapper(gym.make("Pendulum-v1"), tiny_flow(3, 1), obs=kind))
    env = make_latent_env("Pendulum-v1", tiny_flow(3, 1), obs=kind)
    obs = env.reset()
    one = {key: x[0] for key, x in obs.items()} if isinstance(obs, dict) else obs[0]
    assert env.observation_space.contains(one)


def test_what_is_handed_out_may_be_written_to() -> None:
    env = LatentSteeringWrapper(scripted(episode_lengths=(100,)), tiny_flow(), obs="both")
    obs, _ = env.reset()
    for part in obs.values():
        part[:] = 99.0
    obs, *_ = env.step(np.zeros((4, 2)))
    assert max(np.abs(part).max() for part in obs.values()) < 9


class Sign(gym.Env):
    """One step; the best action has the sign that the observation shows."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.sign = np.float32(self.np_random.choice([-1.0, 1.0]))
        return np.array([self.sign]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.array([self.sign]), -float((action[0] - 0.5 * self.sign) ** 2), True, False, {}


class Blind(SteerablePolicy):
    """Its features say nothing, and noise is the action."""

    def __init__(self) -> None:
        super().__init__(obs_shapes=(1,), obs_horizon=1, noise_shape=(1, 1), cond_dim=1, act_horizon=1)

    def encode(self, obs: Any) -> th.Tensor:
        return th.zeros(len(obs), 1)

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        return w.clamp(-1, 1)


@pytest.mark.parametrize(("kind", "learns"), [("features", False), ("env", True), ("both", True)])
def test_ppo_learns_from_what_only_the_env_shows(kind: Any, learns: bool) -> None:
    env = DummyVecEnv([lambda: LatentSteeringWrapper(Sign(), Blind(), obs=kind)] * 8)
    settings: dict[str, Any] = dict(n_steps=32, batch_size=64, learning_rate=3e-3, gamma=0.99, seed=0)
    policy_kwargs = dict(log_std_init=-1.0, prior_mix=0.0, net_arch=[16])
    model = PPO("LatentPolicy", env, policy_kwargs=policy_kwargs, **settings).learn(4_096)
    assert (model.policy.features_extractor_class is CombinedExtractor) == (kind == "both")
    env.seed(0)
    obs, errors = env.reset(), []
    for _ in range(20):
        obs, rewards, *_ = env.step(model.predict(obs, deterministic=True)[0])
        errors += list(-rewards)
    assert (np.mean(errors) < 0.05) == learns and (learns or np.mean(errors) > 0.2)  # without the sign 0.25 is best


def test_models_and_policies_are_saved_and_loaded(tmp_path: Path) -> None:
    env = gym_steered(tiny_flow(), scripts(), obs="both")
    model = small(env).learn(32)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "latent.safetensors")
    obs = env.reset()
    expected = model.predict(obs, deterministic=True)[0]
    latent = LatentPolicy.load(tmp_path / "latent.safetensors")
    assert latent.observation_space == env.observation_space
    for policy in (PPO.load(tmp_path / "model", env=env), latent):
        np.testing.assert_allclose(policy.predict(obs, deterministic=True)[0], expected, atol=1e-6)
    latent.copy_into(model)
    with pytest.raises(ValueError, match=r"shape of an observation is \(6,\), but this policy's is {'env': \(2, 3\), 'feat"):
        latent.copy_into(small(gym_steered(tiny_flow(), scripts())))


def test_what_needs_no_features_plays() -> None:
    env = gym_steered(tiny_flow(), scripts(), obs="both", cut_at_time_limit=True)
    model = small(env, A2C).learn(64, callback=ExactBootstrap())
    results = [evaluate(actor, env, 4, seed=0) for actor in (model, "zero")]
    assert [result.episodes for result in results] == [4, 4]
    small(VecNormalize(env, gamma=0.99**3)).learn(16)


def test_what_needs_features_is_told_so() -> None:
    env = gym_steered(tiny_flow(), scripts(), obs="env")
    rollouts = collect_rollouts("prior", gym_steered(tiny_flow(), scripts()), 2)
    model = small(env)
    with pytest.raises(ValueError, match=r"collect_rollouts needs the flow's own features, .* steer with obs='features'"):
        collect_rollouts("prior", env, 2)
    with pytest.raises(ValueError, match="train with obs='features'"):
        pretrain_latent(model, rollouts=rollouts)
    with pytest.raises(ValueError, match="train with obs='features'"):
        SteeredPolicy.of(model)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="obs must be 'features', 'env' or 'both', found 'state'"):
        LatentSteeringWrapper(scripted(), tiny_flow(), obs="state")  # type: ignore[arg-type]
    features, names = spaces.Box(-1, 1, (2,)), ("features", "b")
    with pytest.raises(
        ValueError, match=r"obs='both' adds the entry 'features', but the env's .* have one: \['b', 'features'\]"
    ):
        LatentSteeringWrapper(Parts(scripted(), names), ByParts(names), obs="both")
    assert Observer("env", features, spaces.Dict(features=features)).space == spaces.Dict(features=features)
