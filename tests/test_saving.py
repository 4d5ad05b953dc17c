"""Models and policies on disk: saved, loaded and going on."""

import json
import pathlib

import numpy as np
import pytest
import torch as th
from safetensors import safe_open
from stable_baselines3 import PPO

from sb3_dsrl import LatentPolicy
from sb3_dsrl.stage2.optimizers import RMSpropLrScale
from tests.envs import FORMS, tiny_flow
from tests.models import N_STEPS, ON_POLICY, features, small, steered, weights


@pytest.mark.parametrize("cls", ON_POLICY.values())
def test_save_load_and_go_on(cls, tmp_path: pathlib.Path, env):
    model = small(env, cls, policy_kwargs=dict(prior_mix=0.4, prior_mix_decay=0.5)).learn(6 * N_STEPS)
    obs = features(5).numpy()
    before = model.predict(obs, deterministic=True)[0]
    prior_mix = float(model.policy.prior_mix)
    assert np.abs(before).max() > 1e-4 and prior_mix < 0.4
    model.save(tmp_path / "model")

    loaded = cls.load(tmp_path / "model", env=env)
    assert type(loaded.policy) is LatentPolicy and float(loaded.policy.prior_mix) == prior_mix
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], before)
    th.manual_seed(0)
    sampled = model.predict(obs)[0]
    th.manual_seed(0)
    np.testing.assert_array_equal(loaded.predict(obs)[0], sampled)
    loaded.learn(2 * N_STEPS, reset_num_timesteps=False)
    assert loaded.num_timesteps == 8 * N_STEPS
    assert not np.array_equal(loaded.predict(obs, deterministic=True)[0], before)

    without_env = cls.load(tmp_path / "model")
    np.testing.assert_array_equal(without_env.predict(obs, deterministic=True)[0], before)


def test_going_on_after_load_is_going_on(tmp_path: pathlib.Path, flow):
    """Optimiser state and prior mix are those of the model that was saved: the same seed then gives the same weights."""
    model = small(steered(flow)).learn(2 * N_STEPS)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=steered(flow))
    for each in (model, loaded):
        each.set_env(steered(flow))
        each.set_random_seed(7)
        each.learn(2 * N_STEPS)
    assert weights(model.policy) == weights(loaded.policy)


@pytest.mark.parametrize("form", FORMS)
def test_loading_beside_another_flow_shows_both_hashes(form: str, tmp_path: pathlib.Path, flow):
    small(steered(flow, form=form)).save(tmp_path / "model")
    other = tiny_flow(seed=1)
    assert other.fingerprint() != flow.fingerprint()
    with pytest.raises(ValueError, match=f"{flow.fingerprint()}.*{other.fingerprint()}"):
        PPO.load(tmp_path / "model", env=steered(other, form=form))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        PPO.load(tmp_path / "model", env=steered(flow, form=form, gamma=0.9))


def test_policy_round_trip_keeps_every_keyword(tmp_path: pathlib.Path, env):
    keywords = dict(prior_mix=0.25, prior_mix_decay=0.9, value_lr=5e-3, log_std_init=-1.5)
    centre = np.arange(8).reshape(4, 2) / 10
    model = small(env, policy_kwargs=dict(centre=centre, **keywords)).learn(4 * N_STEPS)
    model.policy.save(tmp_path / "policy")
    loaded = LatentPolicy.load(tmp_path / "policy")
    data = loaded._get_constructor_parameters()
    assert {key: data[key] for key in keywords} == keywords and data["net_arch"] == [16]
    np.testing.assert_array_equal(data["centre"], centre)
    assert weights(loaded) == weights(model.policy)
    assert float(loaded.prior_mix) == pytest.approx(0.25 * 0.9) and loaded.contract == model.policy.contract
    obs = features(5).numpy()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("cls", ON_POLICY.values())
def test_random_state_travels_as_in_the_tests_of_sb3(cls, tmp_path: pathlib.Path, env):
    """Fault p: SB3's test_save_load replaces every entry of the state by th.rand_like."""
    model = small(env, cls)
    random = {name: th.rand_like(value) for name, value in model.policy.state_dict().items()}
    model.policy.load_state_dict(random)
    obs = features(5).numpy()
    before = model.predict(obs, deterministic=True)[0]
    state = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=env)
    for name, value in loaded.policy.state_dict().items():
        assert th.equal(value, state[name]), name
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], before)


def test_policy_file_is_safetensors_and_json(tmp_path: pathlib.Path, env):
    """Any name will do, and nothing in it is a pickle."""
    keywords = dict(activation_fn=th.nn.ELU, net_arch=dict(pi=[8, 4], vf=[6]), optimizer_class=th.optim.RMSprop)
    policy = small(env, policy_kwargs=keywords).policy
    policy.save(tmp_path / "stage1.pt")
    with safe_open(tmp_path / "stage1.pt", "pt") as file:
        config = json.loads(file.metadata()["latent_policy"])
        assert set(file.keys()) == set(policy.state_dict())
    assert (config["activation_fn"], config["optimizer_class"]) == ("ELU", "RMSpropLrScale")
    assert config["action_space"]["contract"] == policy.action_space.contract.as_dict()
    loaded = LatentPolicy.load(tmp_path / "stage1.pt", "cpu")
    assert loaded.action_space == policy.action_space and loaded.observation_space == policy.observation_space
    assert (loaded.net_arch, loaded.activation_fn) == (keywords["net_arch"], th.nn.ELU)
    assert isinstance(loaded.optimizer, RMSpropLrScale)
    assert weights(loaded) == weights(policy)


def test_policy_of_an_unsteered_env_travels_too(tmp_path: pathlib.Path):
    with pytest.warns(UserWarning, match="nothing is steered"):
        policy = PPO("LatentPolicy", "Pendulum-v1", n_steps=4, batch_size=4).policy
        policy.save(tmp_path / "policy")
        loaded = LatentPolicy.load(tmp_path / "policy")
    assert loaded.action_space == policy.action_space and loaded.observation_space == policy.observation_space


def test_copy_draws_no_random_numbers(env):
    policy = small(env).learn(2 * N_STEPS).policy
    before = th.get_rng_state()
    copied = policy.copy()
    assert th.equal(th.get_rng_state(), before) and weights(copied) == weights(policy)
    with th.no_grad():
        copied.action_net.bias.add_(1.0)
    assert weights(copied) != weights(policy)
