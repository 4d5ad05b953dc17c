"""LatentSAC and other off-policy algorithms on disk: save, load, resume; and what is refused."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sb3_contrib import TQC
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dsrl import (
    ActionCritic,
    DistilledCritic,
    FlowPolicy,
    LatentSAC,
    ResumeCallback,
    SuccessEvalCallback,
    collect_rollouts,
    make_latent_env,
    resume,
    sac_kwargs,
)
from sb3_dsrl.stage0.features import FeatureTransitions
from tests.envs import tiny_flow
from tests.models import features, steered
from tests.stage2 import bits
from tests.stage2 import steered as seeded
from tests.test_determinism import Crash, CrashAt
from tests.test_latent_sac import CRITICS, small


@pytest.fixture(scope="module")
def transitions(flow: FlowPolicy) -> FeatureTransitions:
    return collect_rollouts(flow, steered(flow), 4).transitions()


# Save and load


@pytest.mark.parametrize("critic", [*CRITICS, ActionCritic(num_steps=1)])
def test_save_and_load(critic: Any, tmp_path: Path, flow: FlowPolicy, transitions: FeatureTransitions) -> None:
    demos = None if critic == "noise" else transitions
    model = small(steered(flow), critic, ent_coef="auto", demos=demos).learn(24)
    obs = features(5).numpy()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = LatentSAC.load(tmp_path / "model", env=steered(flow), demos=demos)
    loaded.load_replay_buffer(tmp_path / "replay")
    assert bits(loaded.policy) == bits(model.policy) and loaded.critic_kind == model.critic_kind
    for each in (model, loaded):  # optimisers, alpha and replay are those that were saved
        each.set_env(steered(flow))
        each.set_random_seed(7)
        each.learn(12)
    assert bits(loaded.policy) == bits(model.policy) and loaded.alpha() == model.alpha()
    before = model.predict(obs, deterministic=True)[0]
    model.save(tmp_path / "again")
    alone = LatentSAC.load(tmp_path / "again")
    np.testing.assert_array_equal(alone.predict(obs, deterministic=True)[0], before)


def test_the_zip_holds_neither_flow_nor_demos(tmp_path: Path, flow: FlowPolicy, transitions: FeatureTransitions) -> None:
    small(steered(flow), demos=transitions).learn(12).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = archive.read("data").decode()
    assert "FlowPolicy" not in data and "Steering" not in data and "FeatureTransitions" not in data
    assert flow.fingerprint() in data
    loaded = LatentSAC.load(tmp_path / "model", env=steered(flow))
    with pytest.warns(UserWarning, match=r"has learned with demos, which are not in its zip, .* pass demos= to load"):
        loaded.learn(4)


def test_another_flow_or_discount_is_refused(tmp_path: Path, flow: FlowPolicy) -> None:
    model = small(steered(flow))
    model.save(tmp_path / "model")
    other = tiny_flow(seed=1)
    with pytest.raises(ValueError, match=f"{flow.fingerprint()}.*{other.fingerprint()}"):
        LatentSAC.load(tmp_path / "model", env=steered(other))
    for env in (steered(other), steered(flow, gamma=0.9)):
        with pytest.raises(ValueError, match="spaces do not match"):
            model.set_env(env)


def test_policy_file(tmp_path: Path, flow: FlowPolicy) -> None:
    policy = small(steered(flow), "distilled", policy_kwargs=dict(centre=np.full((4, 2), 0.5), log_std_init=-1.0)).policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy")
    assert bits(loaded) == bits(policy)


def test_a_new_env_is_decoded_with_its_own_steering(flow: FlowPolicy) -> None:
    model = small(steered(flow)).learn(8)
    env = steered(flow, num_steps=1)
    model.set_env(env)
    decoder = model._get_decoder()
    assert decoder is not None and decoder.steering is env.steering  # type: ignore[attr-defined]


# Determinism and resume


def run(
    cls: Any, path: Path, flow: FlowPolicy, goes_on: bool = False, crash: Sequence[BaseCallback] = (), **kwargs: Any
) -> tuple[Any, SuccessEvalCallback]:
    """144 macro-steps with 3 to 5 checkpoints; the warm-up ends after the first one."""
    wrap, demos, seed = kwargs.pop("wrap", lambda env: env), kwargs.pop("demos", None), kwargs.pop("seed", 3)
    env = wrap(seeded(flow))
    curve = SuccessEvalCallback(wrap(seeded(flow)), eval_freq=150, n_eval_episodes=2)
    keeper = ResumeCallback(path, save_freq=80, keep=[curve])
    model = resume(cls, path, env, **(dict(demos=demos) if demos is not None else {})) if goes_on else None
    if model is None:
        settings = dict(learning_starts=40, batch_size=8, gradient_steps=2, seed=seed, device="cpu", buffer_size=80) | kwargs
        if cls is LatentSAC:
            settings = sac_kwargs(env, **settings, demos=demos, policy_kwargs=dict(net_arch=[16]))
        else:
            settings |= dict(gamma=0.99**3, policy_kwargs=dict(net_arch=[16]))
        model = cls("LatentPolicy" if cls is LatentSAC else "MlpPolicy", env, **settings)
    fresh = model.num_timesteps == 0
    model.learn(144 - model.num_timesteps, [curve, keeper, *crash], reset_num_timesteps=fresh)
    return model, curve


def contents(buffer: Any) -> list[bytes]:
    parts = [buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts]
    for obs in (buffer.observations, buffer.next_observations):
        parts += list(obs.values()) if isinstance(obs, dict) else [obs]
    return [part.tobytes() for part in parts] + [bytes([buffer.pos, buffer.full])]


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (LatentSAC, dict(critic="noise", ent_coef="auto", wrap=lambda env: VecNormalize(env, gamma=0.99**3))),
        (LatentSAC, dict(critic="action", demos=True)),
        (LatentSAC, dict(critic="distilled", policy_delay=3)),
        (SAC, dict(action_noise=True)),
        (SAC, dict(n_steps=3)),
        (TQC, dict()),
    ],
)
def test_twice_and_resumed(
    cls: Any, kwargs: dict[str, Any], tmp_path: Path, flow: FlowPolicy, transitions: FeatureTransitions
) -> None:
    """The same seed gives the same bits, with and without a crash: parameters, replay, learning curve."""

    def settings() -> dict[str, Any]:
        made: dict[str, Any] = {}
        if "action_noise" in kwargs:
            made = dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros((4, 2)), np.full((4, 2), 0.1)))
        if "demos" in kwargs:
            made = dict(demos=transitions)
        return kwargs | made

    expected, curve = run(cls, tmp_path / "whole.zip", flow, **settings())
    again, _ = run(cls, tmp_path / "again.zip", flow, **settings())
    assert bits(again.policy) == bits(expected.policy) and contents(again.replay_buffer) == contents(expected.replay_buffer)
    assert bits(run(cls, tmp_path / "other.zip", flow, seed=4, **settings())[0].policy) != bits(expected.policy)
    for timesteps in (36, 120):  # in the warm-up; and when the replay has come round
        path = tmp_path / f"{timesteps}.zip"
        with pytest.raises(Crash):
            run(cls, path, flow, crash=[CrashAt(timesteps)], **settings())
        assert path.exists()
        model, resumed = run(cls, path, flow, goes_on=True, **settings())
        assert bits(model.policy) == bits(expected.policy) and model.num_timesteps == 144
        assert contents(model.replay_buffer) == contents(expected.replay_buffer)
        assert resumed.history == curve.history


def test_the_end_of_a_run_is_kept(tmp_path: Path, flow: FlowPolicy) -> None:
    model, _ = run(LatentSAC, tmp_path / "a.zip", flow)
    again, _ = run(LatentSAC, tmp_path / "a.zip", flow, goes_on=True)
    assert bits(again.policy) == bits(model.policy) and contents(again.replay_buffer) == contents(model.replay_buffer)
    assert bits(LatentSAC.load(tmp_path / "a.zip").policy) == bits(model.policy)


def test_what_cannot_be_resumed(tmp_path: Path, flow: FlowPolicy) -> None:
    run(LatentSAC, tmp_path / "a.zip", flow)
    with pytest.raises(ValueError, match=r"'observations' of a replay buffer with shape \(40, 2, 6\), .* same number of envs"):
        resume(LatentSAC, tmp_path / "a.zip", seeded(flow, n_envs=4))
    model = small(steered(flow), buffer_size=20)
    model.optimize_memory_usage = model.replay_buffer.optimize_memory_usage = True  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="With optimize_memory_usage a transition shares its observations"):
        model.learn(2, ResumeCallback(tmp_path / "b.zip"))
    model.optimize_memory_usage, model.replay_buffer = False, object.__new__(HerReplayBuffer)
    with pytest.raises(ValueError, match="The state of a HerReplayBuffer is unknown"):
        model.learn(2, ResumeCallback(tmp_path / "b.zip"))


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (
            dict(critic="actions"),
            "critic must be one of 'noise', 'action', 'distilled', or an object of these, found 'actions'",
        ),
        (dict(critic=DistilledCritic), "critic must be one of"),
        (dict(max_ent_coef=0.3), r"max_ent_coef bounds an ent_coef of 'auto', but it is fixed at 0\.01"),
        (dict(ent_coef="auto", max_ent_coef=0.0), r"max_ent_coef must be positive, found 0\.0"),
        (dict(policy_delay=0), "policy_delay must be at least 1, found 0"),
        (dict(n_steps=3), "LatentSAC learns from single macro-steps: n_steps must be 1, found 3"),
        (dict(replay_buffer_class=HerReplayBuffer), "replay_buffer_class must be ChunkReplayBuffer, .* found HerReplayBuffer"),
        (dict(use_sde=True), "LatentSACPolicy has its own state-dependent std: use_sde must be False, found True"),
        (dict(policy_kwargs=dict(centre=np.zeros((2, 2)))), r"centre must have the noise's shape \(4, 2\), found \(2, 2\)"),
        (
            dict(policy_kwargs=dict(centre=np.full((4, 2), 9.0))),
            r"centre must lie within noise_bound=4\.0, found an entry of 9",
        ),
        (dict(policy_kwargs=dict(residual_log_std_init=-1.0)), "was given, but the env has no residual"),
        (dict(policy_kwargs=dict(log_std_init=-np.inf)), "log_std_init must be finite, found -inf: a std is positive"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], sentence: str, flow: FlowPolicy) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(steered(flow), **kwargs)


def test_bad_envs_and_policies(flow: FlowPolicy) -> None:
    with pytest.raises(ValueError, match="LatentSAC needs a steered env, whose actions are noise, found Box"):
        LatentSAC("LatentPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="is not steered"):
        sac_kwargs(make_latent_env("Pendulum-v1", tiny_flow(3, 1), seed=0).venv)
    with pytest.raises(TypeError, match="LatentSAC needs 'LatentPolicy' or a subclass of LatentSACPolicy"):
        LatentSAC(type(SAC("MlpPolicy", "Pendulum-v1", buffer_size=1).policy), steered(flow))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"make the env with obs='features' or 'both', or use critic='noise'"):
        small(steered(flow, obs="env"))
    with pytest.raises(ValueError, match=r"but VecNormalize normalises them: use VecNormalize\(norm_obs=False\)"):
        small(VecNormalize(steered(flow)))
    with pytest.raises(ValueError, match="num_steps must be at least 1, found 0"):
        ActionCritic(num_steps=0)
