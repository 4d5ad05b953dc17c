"""Stage 1's result stays only if it does at least as well on fresh episodes."""

import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dsrl import ActionChunkWrapper, Gate, Rollouts, VecLatentSteering, collect_rollouts, ppo_kwargs, pretrain_latent
from tests.toys import BanditEnv, linear_flow

TARGET = np.array([0.6, -0.4])


@pytest.fixture
def env() -> VecEnv:
    return VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(TARGET), 1)] * 4), linear_flow())


def centred(env: VecEnv, centre: tuple[float, float]) -> PPO:
    kwargs = dict(centre=np.array([centre], np.float32), log_std_init=-1.0)
    return PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=kwargs, seed=0))


def fit(model: PPO, rollouts: Rollouts, gate: Gate | None = None) -> None:
    pretrain_latent(model, rollouts=rollouts, gate=gate, n_iterations=300, learning_rate=3e-3, seed=0)


def mean_noise(model: PPO) -> np.ndarray:
    return model.predict(np.zeros((1, 2), np.float32), deterministic=True)[0][0, 0]


def test_what_helps_stays(env: VecEnv) -> None:
    model = centred(env, (0.0, 0.0))
    rollouts = collect_rollouts(model, env, 400)
    gate = Gate(env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, rollouts, gate)
    assert gate.passed and gate.before is not None and gate.after is not None
    assert gate.before.success_at_end == 0.0 < gate.after.success_at_end  # the target is 0.72 away from the start
    assert gate.choice is not None and gate.choice.clear
    assert gate.env_steps == gate.choice.episodes < 2 * 100 < 2 * gate.episodes  # as soon as the answer is clear
    assert np.linalg.norm(mean_noise(model) - TARGET) < 0.5


def test_refusals(env: VecEnv) -> None:
    """Before anything is trained, not after it."""
    with pytest.raises(ValueError, match="episodes must be at least 1, found 0"):
        Gate(env, 0)
    with pytest.raises(ValueError, match="alpha is a probability"):
        Gate(env, alpha=5)
    with pytest.raises(ValueError, match="pass the env below VecNormalize"):
        Gate(VecNormalize(env))
    with pytest.raises(ValueError, match="The gate needs the flow's own features and rewards"):
        Gate(VecNormalize(env, norm_obs=False))


def test_what_harms_is_dropped(env: VecEnv) -> None:
    """The rollouts say that the opposite is good."""
    model = centred(env, (0.6, -0.4))
    rollouts = collect_rollouts(model, env, 400)
    rollouts.reward = -(rollouts.w[:, 0] + th.from_numpy(TARGET).float()).square().sum(dim=1)
    start = {key: x.clone() for key, x in model.policy.state_dict().items()}
    with pytest.warns(UserWarning, match=r"Stage 1 is dropped: .* in 0\.\d\d of \d+ fresh episodes, .* in 1.00"):
        fit(model, rollouts, gate := Gate(env, episodes=20))
    assert gate.passed is False
    assert all(th.equal(start[key], x) for key, x in model.policy.state_dict().items())
    fit(model, rollouts)
    assert np.square(mean_noise(model) - TARGET).sum() > 0.1  # without a gate it goes where the rollouts say


def test_between_twins_the_return_decides(env: VecEnv) -> None:
    """Both always succeed: the test is clear after some 60 episodes, and the mean return decides."""
    model = centred(env, (0.5, -0.3))
    start = {key: x.clone() for key, x in model.policy.state_dict().items()}
    model.policy.centre[:] = th.tensor([0.6, -0.4])
    (gate := Gate(env)).decide(model.policy, start)
    assert gate.passed and gate.choice is not None and gate.choice.clear and gate.choice.name == "before"
    assert gate.after is not None and gate.before is not None and gate.after.episodes < 120
    assert gate.after.success_at_end == gate.before.success_at_end == 1.0
    np.testing.assert_allclose(mean_noise(model), (0.6, -0.4), atol=1e-6)
