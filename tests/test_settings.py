"""The settings that ppo_kwargs gives: the recipe, the original's, and sizes for any number of envs."""

import math
from typing import Any

import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_dsrl import FlowPolicy, policy_defaults, ppo_kwargs
from sb3_dsrl.stage2.settings import rollout_sizes
from tests.envs import scripted, tiny_flow
from tests.models import steered

NARROW = dict(log_std_init=math.log(0.45), prior_mix=0.03, prior_mix_decay=0.995, value_lr=1e-3)
SHARED = NARROW | dict(log_std_init=math.log(0.3), prior_mix=0.0)
PAPER = dict(log_std_init=0.0, prior_mix=0.3, prior_mix_decay=0.995, value_lr=1e-3)


@pytest.mark.parametrize(
    ("steer_mode", "preset", "expected"),
    [
        ("full", "recommended", NARROW),
        ("act_horizon", "recommended", NARROW),
        ("shared", "recommended", SHARED),
        ("full", "paper", PAPER),
        ("shared", "paper", PAPER),
    ],
)
def test_presets(steer_mode: Any, preset: Any, expected: dict[str, float], flow: FlowPolicy) -> None:
    env = steered(flow, n_envs=2, gamma=0.9, steer_mode=steer_mode)
    kwargs = ppo_kwargs(env, preset)
    assert policy_defaults(steer_mode, preset) == kwargs["policy_kwargs"] == expected
    schedule = kwargs.pop("learning_rate")
    if preset == "paper":
        assert schedule == 3e-4
    else:
        assert isinstance(schedule, LinearSchedule)
        entries = math.prod(env.action_space.shape)
        peak = min(3e-4, 3.2e-3 / entries)
        assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([peak, peak / 2, 0.0])
    sizes = dict(n_steps=256, batch_size=128)
    assert kwargs == dict(gamma=0.9**3, n_epochs=10, clip_range=0.2, ent_coef=1e-3, policy_kwargs=expected, **sizes)
    policy = PPO("LatentPolicy", env, **kwargs).policy
    assert float(policy.prior_mix) == expected["prior_mix"] and policy.net_arch == dict(pi=[256, 256], vf=[256, 256])
    assert policy.log_std.tolist() == pytest.approx([expected["log_std_init"]] * len(policy.log_std))


def test_an_update_stays_near_the_policy_that_acted(flow: FlowPolicy) -> None:
    """With many entries of noise, SB3's learning rate throws the policy far beyond what the clipped objective trusts."""
    env = steered(tiny_flow(pred_horizon=16), n_envs=2)
    assert math.prod(env.action_space.shape) >= 32
    kl = {}
    for name, overrides in dict(ours={}, sb3=dict(learning_rate=3e-4)).items():
        model = PPO("LatentPolicy", env, **ppo_kwargs(env, **overrides), seed=0)
        model.learn(2 * model.n_steps * env.num_envs)
        kl[name] = model.logger.name_to_value["train/approx_kl"]
    assert kl["ours"] < kl["sb3"] / 2


def test_the_recipe_is_the_default(flow: FlowPolicy) -> None:
    assert ppo_kwargs(steered(flow))["policy_kwargs"] == policy_defaults("full") == NARROW


def test_overrides_win(flow: FlowPolicy) -> None:
    changed = ppo_kwargs(steered(flow), gamma=0.5, n_steps=7, seed=1, policy_kwargs=dict(prior_mix=0.1, net_arch=[8]))
    assert (changed["gamma"], changed["n_steps"], changed["seed"], changed["n_epochs"]) == (0.5, 7, 1, 10)
    assert changed["policy_kwargs"] == NARROW | dict(prior_mix=0.1, net_arch=[8])


def test_refusals(flow: FlowPolicy) -> None:
    with pytest.raises(ValueError, match="is not steered"):
        ppo_kwargs(scripted())
    with pytest.raises(ValueError, match="preset must be 'recommended' or 'paper', found 'narrow'"):
        ppo_kwargs(steered(flow), preset="narrow")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_envs", "n_steps", "batch_size"),
    [
        (1, 512, 128),
        (3, 168, 126),
        (7, 72, 126),
        (8, 64, 128),
        (13, 36, 117),
        (50, 16, 200),
        (127, 16, 508),
        (512, 16, 2048),
        (1000, 16, 4000),
        (4093, 16, 4093),
        (4096, 16, 4096),
    ],
)
def test_sizes(n_envs: int, n_steps: int, batch_size: int) -> None:
    assert rollout_sizes(n_envs) == (n_steps, batch_size)


@pytest.mark.parametrize("n_envs", [*range(1, 130), 509, 512, 1000, 2048, 4093, 4096])
def test_sizes_are_sensible(n_envs: int) -> None:
    n_steps, batch_size = rollout_sizes(n_envs)
    rollout = n_steps * n_envs
    assert rollout % batch_size == 0 and n_steps >= 16
    assert rollout / 4 / 2 <= batch_size <= rollout / 4 or 2048 <= batch_size <= 4096


@pytest.mark.parametrize(
    ("n_envs", "given", "expected"),
    [
        (8, dict(n_steps=16), (16, 32)),
        (2, dict(n_steps=7), (7, 2)),
        (1, dict(n_steps=2), (2, 2)),
        (1, dict(n_steps=509), (509, 509)),  # a prime: whole rollouts, not single samples
        (1, dict(n_steps=514), (514, 257)),  # not 2
        (8, dict(batch_size=128), (64, 128)),
        (8, dict(batch_size=256), (64, 256)),
        (8, dict(batch_size=1000), (125, 1000)),
        (3, dict(batch_size=64), (192, 64)),
        (50, dict(batch_size=64), (32, 64)),
        (8, dict(n_steps=10, batch_size=7), (10, 7)),  # both as they are; SB3 warns
    ],
)
def test_sizes_follow_each_other(n_envs: int, given: dict[str, int], expected: tuple[int, int]) -> None:
    assert rollout_sizes(n_envs, **given) == expected
