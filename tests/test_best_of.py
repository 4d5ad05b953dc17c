"""Best of M: it plays the noise that the critic scores highest, in every form, and refuses what it cannot score."""

from collections.abc import Callable

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_dsrl import ActionChunkWrapper, BestOfM, FlowPolicy, LatentSteeringWrapper, VecLatentSteering, evaluate
from tests.envs import FORMS, scripted, tiny_flow
from tests.toys import BanditEnv, KnownCritic, linear_flow, mean_flow

TARGET = np.array([0.5, -0.3])


def closeness(cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
    return -(chunk[..., 0, :] - th.as_tensor(TARGET, dtype=th.float32)).square().sum(dim=-1)


def bandit(n_envs: int = 2, flow: FlowPolicy | None = None) -> VecEnv:
    envs = DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(TARGET), 1)] * n_envs)
    return VecLatentSteering(envs, flow or linear_flow())  # decodes noise to itself, clipped


@pytest.mark.parametrize(("kappa", "score"), [(0.0, lambda x: x), (1.0, lambda x: -x.abs()), (-1.0, lambda x: x.abs())])
def test_plays_the_best_of_its_noises(kappa: float, score: Callable[[th.Tensor], th.Tensor]) -> None:
    """With kappa = 0 two heads that agree on x; otherwise x and -x, of which the mean is 0 and the std |x|."""
    sign = 1 if kappa == 0 else -1
    critic = KnownCritic(lambda cond, chunk: chunk[..., 0, 0], lambda cond, chunk: sign * chunk[..., 0, 0])
    actor = BestOfM(bandit(flow=linear_flow(a=-0.8, num_steps=1)), critic, 5, kappa)  # decodes w to 0.2 w: never clipped
    th.manual_seed(0)
    w, state = actor.predict(np.zeros((3, 2), np.float32))
    th.manual_seed(0)
    drawn = th.randn(3, 5, 1, 2)
    np.testing.assert_array_equal(w, drawn[th.arange(3), score(drawn[:, :, 0, 0]).argmax(dim=1)])
    assert state is None and w.dtype == np.float32


def test_more_candidates_are_better_and_a_wrong_critic_is_worse() -> None:
    env, right = bandit(4), KnownCritic(closeness)
    wrong = KnownCritic(lambda cond, chunk: -closeness(cond, chunk))
    prior, best4, best32, worst4 = (
        evaluate(actor, env, 60).mean_return
        for actor in ("prior", BestOfM(env, right, 4), BestOfM(env, right, 32), BestOfM(env, wrong, 4))
    )
    assert worst4 < prior - 0.2 and prior + 0.2 < best4 < best32 < 0 and best32 > -0.1
    assert evaluate(BestOfM(env, right, 4), env, 60).mean_return == best4  # the seed decides


def test_noise_that_is_not_steered_does_not_choose() -> None:
    """The mean of 4 rows is scored, one of them is steered: the best of 16 is the largest of it, 1.77 on average."""
    env = DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(TARGET), 1)])
    env = VecLatentSteering(env, mean_flow(), steer_mode="act_horizon")
    w, _ = BestOfM(env, KnownCritic(lambda cond, chunk: chunk[..., 0, 0])).predict(np.zeros((300, 2), np.float32))
    assert w[:, 0, 0].mean() == pytest.approx(1.75, abs=0.15)  # a little less: actions are clipped


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("mode", "rows"), [("full", 4), ("act_horizon", 3), ("shared", 1)])
def test_forms_and_steer_modes(form: str, mode: str, rows: int) -> None:
    flow = tiny_flow()
    assert flow.critic is not None
    flow.critic.updates += 1
    env = FORMS[form](flow, [scripted(10, episode_lengths=(5,)), scripted(10)], steer_mode=mode, noise_bound=0.5)
    actor = BestOfM(env, n_candidates=3)  # the flow's own critic
    w, _ = actor.predict(np.zeros((2, flow.cond_dim), np.float32))
    assert w.shape == (2, rows, 2) and np.abs(w).max() == 0.5
    assert evaluate(actor, env, 4).episodes == 4


def test_gym_env() -> None:
    env = LatentSteeringWrapper(BanditEnv(TARGET), linear_flow())
    assert evaluate(BestOfM(env, KnownCritic(closeness), 64), env, 20).success_at_end > 0.8


def test_refusals() -> None:
    env, critic = bandit(), KnownCritic(closeness)
    with pytest.raises(ValueError, match=r"needs a trained critic, found an untrained one: call train_critic"):
        BestOfM(env)
    with pytest.raises(ValueError, match="n_candidates must be at least 1, found 0"):
        BestOfM(env, critic, 0)
    with pytest.raises(ValueError, match="pass the env below VecNormalize"):
        BestOfM(VecNormalize(env), critic)
    with pytest.raises(ValueError, match="The critic needs the flow's own features: pass the env below VecNormalize"):
        BestOfM(VecMonitor(VecNormalize(VecNormalize(env), norm_obs=False)), critic)
    with pytest.raises(ValueError, match="is not steered"):
        BestOfM(BanditEnv(TARGET), critic)


def test_vec_normalize_of_rewards_alone_is_no_problem() -> None:
    env, critic = bandit(), KnownCritic(closeness)
    normalized = VecNormalize(env, norm_obs=False)
    result = evaluate(BestOfM(normalized, critic, 4), normalized, 8)
    assert result == evaluate(BestOfM(env, critic, 4), env, 8)
