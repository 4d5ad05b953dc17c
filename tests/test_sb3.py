"""LatentPolicy and the steered envs among Stable-Baselines3's own algorithms, callbacks and wrappers."""

import copy
import math
import pathlib
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC, TRPO
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
from torch import nn

from sb3_dsrl import ActionChunkWrapper, FlowPolicy, LatentPolicy, LatentSteeringWrapper, ppo_kwargs
from tests.envs import FORMS, gym_steered, scripted, tiny_flow

N_STEPS = 8
ON_POLICY = {"ppo": PPO, "a2c": A2C, "trpo": TRPO}


@pytest.fixture
def env(flow: FlowPolicy) -> VecEnv:
    return steered(flow)


def steered(flow: FlowPolicy, n_envs: int = 2, form: str = "vec form", **kwargs: Any) -> VecEnv:
    lengths = ((5, 9), (100,), (7,))
    return FORMS[form](flow, [scripted(10, episode_lengths=lengths[i], random_start=True) for i in range(n_envs)], **kwargs)


def small(env: VecEnv, cls: type[BaseAlgorithm] = PPO, **kwargs: Any) -> Any:
    """An on-policy model that learns in milliseconds."""
    policy_kwargs = dict(net_arch=[16]) | kwargs.pop("policy_kwargs", {})
    batch = {} if cls is A2C else dict(batch_size=N_STEPS * env.num_envs)
    defaults = dict(n_steps=N_STEPS, gamma=0.99**3, seed=0, policy_kwargs=policy_kwargs, **batch)
    return cls("LatentPolicy", env, **(defaults | kwargs))


def weights(module: th.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def shaken(model: Any, seed: int = 0) -> Any:
    """The model with a policy that is no longer the prior."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in model.policy.action_net.parameters():
            parameter.add_(0.2 * th.randn(parameter.shape, generator=generator))
    return model


def features(n: int, seed: int = 0) -> th.Tensor:
    return th.randn(n, 6, generator=th.Generator().manual_seed(seed))


class Record(BaseCallback):
    """Keeps what each rollout was collected with."""

    def __init__(self) -> None:
        super().__init__()
        self.obs: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.prior_mix: list[set[float]] = []

    def _on_rollout_start(self) -> None:
        self.prior_mix.append(set())

    def _on_step(self) -> bool:
        self.obs.append(self.locals["new_obs"].copy())
        self.actions.append(self.locals["actions"].copy())
        if isinstance(self.model.policy, LatentPolicy):
            self.prior_mix[-1].add(float(self.model.policy.prior_mix))
        return True


# ----------------------------------------------------------------------------------------------------------- algorithms


def test_check_env(flow):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Your observation|We recommend you to use a symmetric)")  # 2-D Boxes
        check_env(ActionChunkWrapper(scripted(10), act_horizon=3, obs_horizon=2))
        check_env(LatentSteeringWrapper(scripted(10), flow))
        check_env(LatentSteeringWrapper(scripted(10), flow, steer_mode="act_horizon"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", ON_POLICY.values())
def test_on_policy_algorithms_learn(cls, form: str, flow):
    before = weights(flow)
    model = small(steered(flow, form=form), cls)
    assert isinstance(model.policy, LatentPolicy)
    start = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(4 * N_STEPS)
    assert model.num_timesteps == 4 * N_STEPS
    for part in ("action_net", "value_net"):
        assert any(part in name and not th.equal(value, start[name]) for name, value in model.policy.named_parameters()), part
    assert all(value.isfinite().all() for value in model.policy.parameters())
    assert weights(flow) == before and not flow.training
    assert all(not p.requires_grad and p.grad is None for p in flow.parameters())
    assert flow.fingerprint() == model.policy.flow_hash


@pytest.mark.parametrize("cls", [SAC, TQC])
def test_off_policy_warm_up_is_the_prior(cls, flow):
    env = gym_steered(flow, [scripted(10)])
    model = cls("MlpPolicy", env, learning_starts=10, batch_size=4, seed=3, policy_kwargs=dict(net_arch=[16]), gamma=0.99**3)
    space = copy.deepcopy(env.action_space)
    space.seed(3)
    record = Record()
    model.learn(14, callback=record)
    prior = np.stack([space.sample() for _ in range(14)])
    executed = np.stack(record.actions)[:, 0]
    np.testing.assert_allclose(executed[:10], prior[:10], atol=1e-5)
    assert not np.allclose(executed[10:], prior[10:])


@pytest.mark.parametrize("form", FORMS)
def test_seeds(form: str, flow):
    def rollout(seed: int) -> tuple[np.ndarray, np.ndarray]:
        record = Record()
        small(steered(flow, form=form, steer_mode="act_horizon"), seed=seed).learn(4 * N_STEPS, callback=record)
        return np.stack(record.obs), np.stack(record.actions)

    first, again, other = rollout(0), rollout(0), rollout(1)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.allclose(first[0], other[0]) and not np.allclose(first[1], other[1])


# --------------------------------------------------------------------------------------------------------- save and load


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
    assert float(loaded.prior_mix) == pytest.approx(0.25 * 0.9) and loaded.flow_hash == model.policy.flow_hash
    obs = features(5).numpy()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


# ------------------------------------------------------------------------------------------------- callbacks and wrappers


def test_callbacks_monitor_progress_bar_and_tensorboard(tmp_path: pathlib.Path, flow):
    env = VecMonitor(steered(flow), str(tmp_path / "train"))
    eval_env = VecMonitor(steered(flow))
    callbacks = [
        EvalCallback(
            eval_env, eval_freq=4, n_eval_episodes=2, best_model_save_path=str(tmp_path), log_path=str(tmp_path), verbose=0
        ),
        CheckpointCallback(save_freq=N_STEPS, save_path=str(tmp_path), name_prefix="step"),
    ]
    model = small(env, tensorboard_log=str(tmp_path / "tb"))
    model.learn(4 * N_STEPS, callback=callbacks, progress_bar=True)
    assert (tmp_path / "best_model.zip").exists() and (tmp_path / "train.monitor.csv").stat().st_size > 50
    assert {path.name for path in tmp_path.glob("step*")} == {"step_16_steps.zip", "step_32_steps.zip"}
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["results"].shape == (4, 2) and evaluations["successes"].shape == (4, 2)
    assert PPO.load(tmp_path / "best_model", env=env).policy.flow_hash == flow.fingerprint()
    assert list((tmp_path / "tb").glob("PPO_1/events*"))


def test_success_rate_is_logged(tmp_path: pathlib.Path, flow):
    model = small(steered(flow))  # the first env succeeds in every episode, the second in none
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(2 * N_STEPS)
    header, row = (tmp_path / "progress.csv").read_text().splitlines()[:2]
    logged = dict(zip(header.split(","), row.split(","), strict=True))
    buffer = model.rollout_buffer
    ended = [int(buffer.episode_starts[1:, i].sum() + model._last_episode_starts[i]) for i in range(2)]
    assert float(logged["rollout/success_rate"]) == pytest.approx(ended[0] / sum(ended))
    assert 1 <= float(logged["rollout/ep_len_mean"]) <= 4  # macro-steps: episodes of up to 11 env steps, H = 3


@pytest.mark.parametrize("form", FORMS)
def test_vec_normalize(form: str, tmp_path: pathlib.Path, flow):
    env = VecNormalize(steered(flow, form=form), gamma=0.99**3)
    model = small(env).learn(4 * N_STEPS)
    assert not np.allclose(env.obs_rms.mean, 0) and model.policy.flow_hash == flow.fingerprint()
    env.save(tmp_path / "stats.pkl")
    model.save(tmp_path / "model")
    again = VecNormalize.load(tmp_path / "stats.pkl", steered(flow, form=form))
    obs = features(3).numpy()
    np.testing.assert_array_equal(again.normalize_obs(obs), env.normalize_obs(obs))
    PPO.load(tmp_path / "model", env=again).learn(2 * N_STEPS)


def test_evaluate_policy(flow):
    model = small(steered(flow))
    returns, lengths = evaluate_policy(model, VecMonitor(steered(flow)), n_eval_episodes=4, return_episode_rewards=True)
    assert len(returns) == len(lengths) == 4


# ----------------------------------------------------------------------------------------------------------------- gamma


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", ON_POLICY.values())
@pytest.mark.parametrize(("gamma", "warns"), [(0.9**3, False), (0.9, True), (0.99, True)])
def test_gamma_mismatch_warns(cls, form: str, gamma: float, warns: bool, flow):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small(steered(flow, form=form, gamma=0.9), cls, gamma=gamma)
    found = [str(warning.message) for warning in caught if "macro-step" in str(warning.message)]
    expected = f"{cls.__name__} discounts with gamma={gamma} per macro-step, but the env's macro-step discount is 0.729"
    assert len(found) == warns and all(message.startswith(expected) for message in found)


def test_gamma_warning_stays_silent_on_load(tmp_path: pathlib.Path, flow):
    model = small(steered(flow))
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*macro-step")
        PPO.load(tmp_path / "model")
        PPO.load(tmp_path / "model", env=steered(flow))
        LatentPolicy.load(tmp_path / "policy")


def test_ppo_kwargs(flow):
    env = steered(flow, n_envs=2, gamma=0.9)
    kwargs = ppo_kwargs(env)
    assert kwargs == dict(
        gamma=0.9**3,
        n_steps=256,
        batch_size=128,
        n_epochs=10,
        learning_rate=3e-4,
        clip_range=0.2,
        ent_coef=1e-3,
        policy_kwargs=dict(prior_mix=0.3, prior_mix_decay=0.995, value_lr=1e-3),
    )
    model = PPO("LatentPolicy", env, **kwargs)
    assert float(model.policy.prior_mix) == 0.3 and model.policy.net_arch == dict(pi=[256, 256], vf=[256, 256])
    changed = ppo_kwargs(env, gamma=0.5, n_steps=7, seed=1, policy_kwargs=dict(prior_mix=0.1, net_arch=[8]))
    assert (changed["gamma"], changed["n_steps"], changed["seed"], changed["n_epochs"]) == (0.5, 7, 1, 10)
    assert changed["policy_kwargs"] == dict(prior_mix=0.1, prior_mix_decay=0.995, value_lr=1e-3, net_arch=[8])
    with pytest.raises(ValueError, match="is not steered"):
        ppo_kwargs(scripted())


# -------------------------------------------------------------------------------------------------------------- value_lr


def learning_rates(model: Any) -> list[float]:
    """What Adam truly does: its first step moves every weight by its learning rate. First the policy's, then the value's."""
    model.predict(features(1).numpy())  # SB3 policies keep their last distribution: only without a graph can they be copied
    probe = copy.deepcopy(model.policy)
    moved = []
    for module in (probe.action_net, probe.value_net):
        module.bias.grad = th.ones_like(module.bias)
        before = module.bias.detach().clone()
        probe.optimizer.state.clear()
        probe.optimizer.step()
        module.bias.grad = None
        moved.append((before - module.bias.detach()).mean().item())
    return moved


@pytest.mark.parametrize(("value_lr", "expected"), [(4e-3, 4e-3), (None, 1e-3), (1e-4, 1e-4)])
def test_value_lr_changes_the_value_networks_steps(value_lr: float | None, expected: float, tmp_path: pathlib.Path, env):
    model = small(env, learning_rate=1e-3, policy_kwargs=dict(value_lr=value_lr))
    assert learning_rates(model) == pytest.approx([1e-3, expected], rel=0.01)
    model._logger = configure(None, [])
    model._update_learning_rate(model.policy.optimizer)
    assert learning_rates(model) == pytest.approx([1e-3, expected], rel=0.01)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=env).learn(2 * N_STEPS)
    assert learning_rates(loaded) == pytest.approx([1e-3, expected], rel=0.01)


@pytest.mark.parametrize("rms_prop", [True, False])
def test_value_lr_works_with_the_optimisers_of_a2c(rms_prop: bool, env):
    model = A2C(
        "LatentPolicy", env, gamma=0.99**3, use_rms_prop=rms_prop, policy_kwargs=dict(value_lr=4e-3), learning_rate=1e-3
    )
    optimizer, steps = model.policy.optimizer, []
    for group in optimizer.param_groups:
        parameter = group["params"][0]
        before, parameter.grad = parameter.detach().clone(), th.ones_like(parameter)
        optimizer.step()
        steps.append(float((parameter - before).abs().mean()))
        optimizer.zero_grad()
    assert steps[1] / steps[0] == pytest.approx(4.0, rel=1e-3)


def test_value_lr_needs_an_optimiser_that_scales(env):
    with pytest.raises(ValueError, match="SGD knows no lr_scale: set value_lr=None"):
        small(env, policy_kwargs=dict(optimizer_class=th.optim.SGD))


def test_value_lr_follows_a_schedule_in_proportion(env):
    model = small(env, learning_rate=lambda progress: 1e-3 * progress, policy_kwargs=dict(value_lr=4e-3))
    model._logger = configure(None, [])
    model._current_progress_remaining = 0.25
    model._update_learning_rate(model.policy.optimizer)
    assert learning_rates(model) == pytest.approx([2.5e-4, 1e-3], rel=0.01)


# ------------------------------------------------------------------------------------------------- prior mix and the prior


@pytest.mark.parametrize("prior_mix", [0.0, 0.3, 1.0])
def test_ratio_is_one_before_the_first_update(prior_mix: float, env):
    model = shaken(small(env, policy_kwargs=dict(prior_mix=prior_mix, centre=np.full((4, 2), 0.5))))
    _, callback = model._setup_learn(2 * N_STEPS)
    callback.on_training_start({}, {})
    model.collect_rollouts(env, callback, model.rollout_buffer, N_STEPS)
    model.policy.set_training_mode(True)  # as train() does
    (batch,) = model.rollout_buffer.get()
    _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    ratio = th.exp(log_prob - batch.old_log_prob)
    np.testing.assert_allclose(ratio.detach(), 1.0, atol=1e-5)
    alone = model.policy.log_prob(batch.observations, batch.actions.reshape(-1, 4, 2))
    assert th.allclose(alone, batch.old_log_prob, atol=1e-3) == (prior_mix == 0.0)  # it is the mixture's density


def test_prior_mix_decays_once_between_update_and_rollout(flow):
    env = steered(flow)
    model = small(env, policy_kwargs=dict(prior_mix=0.4, prior_mix_decay=0.5))
    during_update = []
    evaluate_actions = model.policy.evaluate_actions
    model.policy.evaluate_actions = lambda *args: (
        during_update.append(float(model.policy.prior_mix)),
        evaluate_actions(*args),
    )[1]
    record = Record()
    evaluation = EvalCallback(steered(flow), eval_freq=3, n_eval_episodes=1, verbose=0, warn=False)
    model.learn(3 * 2 * N_STEPS, callback=[evaluation, record])
    assert record.prior_mix == [{0.4}, {0.2}, {0.1}]
    assert during_update == [0.4] * 10 + [0.2] * 10 + [0.1] * 10
    for _ in range(3):
        model.predict(features(2).numpy())
    assert float(model.policy.prior_mix) == pytest.approx(0.05)


def test_rollouts_mix_the_prior_and_predict_does_not(env):
    model = small(env, policy_kwargs=dict(prior_mix=0.25, centre=np.full((4, 2), 3.0), log_std_init=-5.0))
    obs = features(4000)
    th.manual_seed(0)
    with th.no_grad():
        collected = model.policy(obs)[0].reshape(4000, 8)
        predicted = model.policy.sample(obs).reshape(4000, 8)
    from_prior = (collected.mean(dim=1) - 3.0).abs() > 0.5
    assert from_prior.float().mean() == pytest.approx(0.25, abs=0.03)
    assert collected[from_prior].mean().abs() < 0.05 and abs(collected[from_prior].std() - 1) < 0.03
    assert (predicted - 3.0).abs().max() < 0.1
    assert th.equal(model.policy.sample(obs[:2], deterministic=True), th.full((2, 4, 2), 3.0))


def test_fresh_policy_is_the_prior_for_any_observation(env):
    policy = small(env).policy
    obs = 1e3 * features(50)
    normal = policy.pi(obs).distribution
    assert th.equal(normal.mean, th.zeros(50, 8)) and th.equal(normal.stddev, th.ones(50, 8))
    assert th.equal(policy.kl_to_prior(obs), th.zeros(50))
    w = th.randn(50, 4, 2)
    expected = -0.5 * (w.pow(2).sum(dim=(1, 2)) + 8 * math.log(2 * math.pi))
    th.testing.assert_close(policy.log_prob(obs, w), expected)
    _, log_prob, entropy = policy.evaluate_actions(obs, w.flatten(1))
    th.testing.assert_close(log_prob, expected)
    th.testing.assert_close(entropy, th.full((50,), 4 * math.log(2 * math.pi * math.e)))


def test_std_depends_on_the_observation(env):
    normal = shaken(small(env)).policy.pi(features(2)).distribution
    assert not th.allclose(normal.stddev[0], normal.stddev[1]) and not th.allclose(normal.mean[0], normal.mean[1])


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(prior_mix=1.5), r"prior_mix must lie in \[0, 1\], found 1.5"),
        (dict(prior_mix_decay=-0.1), r"prior_mix_decay must lie in \[0, 1\], found -0.1"),
        (dict(value_lr=0.0), "value_lr must be positive, found 0.0"),
        (dict(centre=np.zeros((3, 2))), r"centre must have the noise's shape \(4, 2\), found \(3, 2\)"),
    ],
)
def test_policy_refuses(kwargs: dict, sentence: str, env):
    with pytest.raises(ValueError, match=sentence):
        small(env, policy_kwargs=kwargs)


# ------------------------------------------------------------------------------------------------------------- copy_into


def test_copy_into_copies_the_policy_and_nothing_else(env):
    source = shaken(small(env, policy_kwargs=dict(prior_mix=0.1, value_lr=1e-4, centre=np.full((4, 2), 0.7)))).policy
    target = small(env, policy_kwargs=dict(prior_mix=0.5, value_lr=2e-3), learning_rate=1e-3)
    source.copy_into(target)
    obs = features(5)
    assert th.equal(source.sample(obs, deterministic=True), target.policy.sample(obs, deterministic=True))
    assert float(target.policy.prior_mix) == 0.5
    assert learning_rates(target) == pytest.approx([1e-3, 2e-3], rel=0.01)
    target.learn(2 * N_STEPS)  # the source does not learn with it
    assert not th.equal(source.sample(obs, deterministic=True), target.policy.sample(obs, deterministic=True))


def test_copy_into_refuses(env, flow):
    policy, other = small(env).policy, tiny_flow(seed=1)
    hashes = f"The policy has flow='{flow.fingerprint()}', but the model's env has '{other.fingerprint()}'"
    with pytest.raises(ValueError, match=hashes):
        policy.copy_into(small(steered(other)))
    with pytest.raises(ValueError, match=re.escape("The model's net_arch is [8], but this policy's is [16]")):
        policy.copy_into(small(env, policy_kwargs=dict(net_arch=[8])))
    with pytest.raises(ValueError, match=r"The model's activation_fn is .*ReLU.*, but this policy's is .*Tanh"):
        policy.copy_into(small(env, policy_kwargs=dict(activation_fn=nn.ReLU)))
    with pytest.raises(ValueError, match="The policy has steer_mode='full', but the model's env has 'act_horizon'"):
        policy.copy_into(small(steered(flow, steer_mode="act_horizon")))
    with pytest.raises(ValueError, match="expects a model with 'LatentPolicy', found ActorCriticPolicy"):
        policy.copy_into(PPO("MlpPolicy", env, gamma=0.99**3, n_steps=N_STEPS, batch_size=2 * N_STEPS))
