"""LeRobot's DiffusionPolicy, small and with random weights, against what LeRobot itself makes of the same noise."""

from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from stable_baselines3 import PPO

from sb3_dsrl import LatentSteeringWrapper, LeRobotPolicy, SteeredPolicy, make_latent_env, ppo_kwargs

STATE, ENV_STATE, IMAGE = "observation.state", "observation.environment_state", "observation.image"
SHAPES = {STATE: (2,), ENV_STATE: (16,), IMAGE: (3, 32, 32)}
KINDS = {STATE: FeatureType.STATE, ENV_STATE: FeatureType.ENV, IMAGE: FeatureType.VISUAL}
KEYS = {STATE: "agent_pos", ENV_STATE: "environment_state", IMAGE: "pixels"}
BOUNDS = (0.0, 512.0)
HORIZON, H, STEPS = 8, 4, 2


def made(*features: str, **settings: Any) -> tuple[DiffusionPolicy, Any]:
    """A policy of random weights that reads some features, with its processors."""
    th.manual_seed(0)
    defaults: dict[str, Any] = dict(
        input_features={name: PolicyFeature(KINDS[name], SHAPES[name]) for name in features},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "VISUAL", "ACTION"), NormalizationMode.MIN_MAX),
        horizon=HORIZON,
        n_action_steps=H,
        n_obs_steps=STEPS,
        down_dims=(16, 32),
        diffusion_step_embed_dim=16,
        spatial_softmax_num_keypoints=4,
        noise_scheduler_type="DDIM",
        num_inference_steps=5,
        device="cpu",
    )
    policy = DiffusionPolicy(DiffusionConfig(**(defaults | settings))).eval()
    size = lambda name: (3, 1, 1) if name == IMAGE else SHAPES.get(name, (2,))  # noqa: E731
    stats = {name: dict(min=th.zeros(size(name)), max=th.full(size(name), 512.0)) for name in (STATE, ENV_STATE, "action")}
    stats[IMAGE] = dict(min=th.zeros(3, 1, 1), max=th.ones(3, 1, 1))
    return policy, make_pre_post_processors(policy.config, dataset_stats=stats)


def frames(rng: np.random.Generator, *features: str) -> list[dict[str, np.ndarray]]:
    """As many observations as the policy looks back on, each as an env gives it."""
    draw = {
        STATE: lambda: rng.uniform(0, 512, 2),
        ENV_STATE: lambda: rng.uniform(0, 512, 16),
        IMAGE: lambda: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
    }
    return [{KEYS[name]: draw[name]() for name in features} for _ in range(STEPS)]


def played_by_lerobot(
    policy: DiffusionPolicy, processors: Any, observed: list[dict[str, np.ndarray]], noise: th.Tensor
) -> np.ndarray:
    """The H actions that LeRobot's own select_action takes after these observations, in the env's units."""
    preprocess, postprocess = processors
    policy.reset()
    actions = []
    for earlier in observed[:-1]:  # what select_action does with an observation, without asking for an action
        batch = preprocess(_batch(earlier))
        policy._queues[STATE].append(batch[STATE])
        if ENV_STATE in batch:
            policy._queues[ENV_STATE].append(batch[ENV_STATE])
        if IMAGE in batch:
            policy._queues["observation.images"].append(batch[IMAGE].unsqueeze(-4))
    for _ in range(H):
        actions.append(postprocess(policy.select_action(preprocess(_batch(observed[-1])), noise=noise[None])))
    return th.cat(actions).numpy()


def _batch(obs: dict[str, np.ndarray]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for name, key in KEYS.items():
        if key in obs:
            value = th.from_numpy(obs[key]).float()
            batch[name] = value.permute(2, 0, 1) / 255 if name == IMAGE else value
    return batch


@pytest.mark.parametrize("features", [(STATE, ENV_STATE), (STATE, IMAGE), (STATE, ENV_STATE, IMAGE)])
def test_decode_is_what_lerobot_plays_with_that_noise(features: tuple[str, ...]) -> None:
    policy, processors = made(*features)
    flow = LeRobotPolicy(policy, processors, obs_keys={name: KEYS[name] for name in features}, action_bounds=BOUNDS).freeze()
    assert flow.noise_shape == (HORIZON, 2) and (flow.act_horizon, flow.action_offset, flow.num_steps) == (H, STEPS - 1, 5)
    observed, w = frames(np.random.default_rng(0), *features), th.randn(HORIZON, 2)
    expected = played_by_lerobot(policy, processors, observed, w)
    stacked = {key: np.stack([frame[key] for frame in observed])[None] for key in observed[0]}
    assert flow.obs_shapes == {key: array.shape[2:] for key, array in stacked.items()}
    with th.no_grad():
        cond = flow.encode(stacked)
        chunk = flow.executed(flow.decode(cond, w[None]))[0].numpy()
        assert cond.shape == (1, flow.cond_dim)
        np.testing.assert_allclose((chunk + 1) * 256, expected, atol=1e-2)
        assert np.ptp(expected, axis=0).min() > 1  # the actions are not all at the bounds
        many = th.randn(1, 3, HORIZON, 2)
        many[0, 1] = w
        np.testing.assert_allclose(flow.executed(flow.decode(cond, many))[0, 1].numpy(), chunk, atol=1e-5)
        assert (flow.decode(cond, many) == flow.decode(cond, many)).all()
        assert not th.allclose(flow.decode(cond, many, num_steps=3), flow.decode(cond, many))
    assert policy.diffusion.num_inference_steps == 5


def test_flat_observations_hold_state_and_environment_state() -> None:
    policy, processors = made(ENV_STATE, STATE)
    flat = LeRobotPolicy(policy, processors, action_bounds=BOUNDS)
    named = LeRobotPolicy(policy, processors, obs_keys={STATE: "agent_pos", ENV_STATE: "environment_state"})
    assert flat.obs_shapes == (18,)
    obs = np.random.default_rng(0).uniform(0, 512, (3, STEPS, 18)).astype(np.float32)
    dict_obs = {"agent_pos": obs[..., :2], "environment_state": obs[..., 2:]}
    assert (flat.encode(obs) == named.encode(dict_obs)).all()


def test_pusht_is_steered_in_both_of_its_modes() -> None:
    for mode, name in (("environment_state_agent_pos", ENV_STATE), ("pixels_agent_pos", IMAGE)):
        policy, processors = made(STATE, name)
        flow = LeRobotPolicy(policy, processors, obs_keys={n: KEYS[n] for n in (STATE, name)}, action_bounds=BOUNDS)
        kwargs = dict(obs_type=mode, observation_width=32, observation_height=32)
        env = make_latent_env("gym_pusht/PushT-v0", flow, 2, env_kwargs=kwargs, max_episode_steps=12, seed=0)
        model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=16, n_epochs=1)).learn(16)
        raw = gym.make("gym_pusht/PushT-v0", **kwargs)
        steered = SteeredPolicy.of(model)
        chunk = steered.predict(raw.reset(seed=0)[0])
        assert chunk.shape == (H, 2) and np.abs(chunk).max() <= 1
        env.close()


def test_what_is_executed_are_the_policys_pixels() -> None:
    policy, processors = made(STATE, ENV_STATE)
    flow = LeRobotPolicy(policy, processors, obs_keys={n: KEYS[n] for n in (STATE, ENV_STATE)}, action_bounds=BOUNDS)
    raw = gym.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos")
    env = LatentSteeringWrapper(raw, flow)
    env.reset(seed=0)
    first = {key: np.asarray(value, np.float32) for key, value in raw.unwrapped.get_obs().items()}
    w = env.action_space.sample()
    env.step(w)
    expected = played_by_lerobot(policy, processors, [first] * STEPS, th.from_numpy(w))
    np.testing.assert_allclose(raw.unwrapped._last_action, expected[-1], atol=1e-2)


def test_from_pretrained_takes_a_ddpm_policy_and_its_processors(tmp_path: Path) -> None:
    policy, processors = made(STATE, ENV_STATE, noise_scheduler_type="DDPM", num_inference_steps=None)
    with pytest.raises(ValueError, match=r"The policy's scheduler is DDPM, .* LeRobotPolicy.from_pretrained loads"):
        LeRobotPolicy(policy, processors)
    for part in (policy, *processors):
        part.save_pretrained(tmp_path)
    flow = LeRobotPolicy.from_pretrained(tmp_path, num_inference_steps=4, device="cpu", action_bounds=BOUNDS)
    assert flow.num_steps == 4
    twin, same = made(STATE, ENV_STATE, num_inference_steps=4)
    expected = LeRobotPolicy(twin, same, action_bounds=BOUNDS)
    obs, w = th.rand(2, STEPS, 18) * 512, th.randn(2, HORIZON, 2)
    th.testing.assert_close(flow.decode(flow.encode(obs), w), expected.decode(expected.encode(obs), w))
    assert flow.fingerprint() == expected.fingerprint()


def test_other_statistics_are_another_policy() -> None:
    policy, processors = made(STATE, ENV_STATE)
    flow = LeRobotPolicy(policy, processors, action_bounds=BOUNDS)
    stats = {name: dict(min=th.zeros(n), max=th.full((n,), 511.0)) for name, n in ((STATE, 2), (ENV_STATE, 16), ("action", 2))}
    others = [
        LeRobotPolicy(policy, make_pre_post_processors(policy.config, dataset_stats=stats), action_bounds=BOUNDS),
        LeRobotPolicy(policy, processors, action_bounds=(0.0, 511.0)),
        LeRobotPolicy(policy),
    ]
    prints = {flow.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(prints) == 4
    assert LeRobotPolicy(policy, processors, action_bounds=BOUNDS).fingerprint() == flow.fingerprint()


def test_features_without_a_key() -> None:
    policy, processors = made(STATE, IMAGE)
    with pytest.raises(
        ValueError, match=r"The policy reads 'observation.image': pass obs_keys, which says what the env calls"
    ):
        LeRobotPolicy(policy, processors)
    with pytest.raises(ValueError, match=r"The policy reads 'observation.state': pass obs_keys"):
        LeRobotPolicy(policy, processors, obs_keys={IMAGE: "pixels"})
    with pytest.raises(
        ValueError, match=r"obs_keys names 'observation.images.top', but the policy reads \['observation.state"
    ):
        LeRobotPolicy(policy, processors, obs_keys={"observation.images.top": "pixels"})
    with pytest.raises(
        ValueError, match=r"obs_keys names 'all' for features of different sizes: 'observation.image' has \(3, 32"
    ):
        LeRobotPolicy(policy, processors, obs_keys={STATE: "all", IMAGE: "all"})
    with pytest.raises(ValueError, match=r"The policy, diffusion, reads no sentence: leave task out"):
        LeRobotPolicy(policy, processors, obs_keys=KEYS, task="push")


def test_policies_without_noise() -> None:
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    features = {name: PolicyFeature(KINDS[name], SHAPES[name]) for name in (STATE, ENV_STATE)}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    act = ACTPolicy(ACTConfig(input_features=features, output_features=outputs, dim_model=8, n_heads=2, device="cpu"))
    with pytest.raises(ValueError, match=r"A LeRobot policy of type 'act' cannot be steered; those of \['diffusion', "):
        LeRobotPolicy(act)
