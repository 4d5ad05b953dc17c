"""Search on an env whose best noise depends on the state and is known: scores, counts, ends of episodes, files."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dsrl import (
    ActionChunkWrapper,
    LatentPolicy,
    LatentSteeringWrapper,
    NoiseSearch,
    SearchResult,
    VecLatentSteering,
    collect_rollouts,
    evaluate,
    search_noise,
)
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import WorkerSettings
from sb3_dsrl.steering.steering import Steering
from tests.envs import RestorableEnv, scripted, tiny_flow, vec_steered
from tests.toys import GuideEnv, guide_flow

GAMMA, LENGTH = 0.9, 4


def guide_env(n_envs: int = 2, form: str = "vec", length: int = LENGTH) -> VecEnv:
    flow = guide_flow()
    if form == "gym":
        return DummyVecEnv([lambda: LatentSteeringWrapper(GuideEnv(length), flow, gamma=GAMMA)] * n_envs)
    fns = [lambda: ActionChunkWrapper(GuideEnv(length), 1, gamma=GAMMA)] * n_envs
    return VecLatentSteering(WorkerVecEnv(fns, WorkerSettings(2)) if form == "workers" else DummyVecEnv(fns), flow)


def reward(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of noises (..., 1, 2) in states (..., 2)."""
    return -np.square(w[..., 0, :] - GuideEnv.best(x)).sum(axis=-1)


def searched(horizon: int = 2, episodes: int = 6, n_candidates: int = 5, **kwargs: Any) -> SearchResult:
    return search_noise(guide_env(), guide_flow(), episodes, n_candidates=n_candidates, horizon=horizon, **kwargs)


@pytest.mark.parametrize("horizon", [1, 3, 6])
def test_scores_are_the_rewards_that_follow(horizon: int) -> None:
    """The noise that is tried first, then w = 0, until the horizon or the end of the episode."""
    result = searched(horizon)
    x, w = result.cond.numpy().reshape(-1, LENGTH, 2), result.w.numpy().reshape(-1, LENGTH, 5, 1, 2)
    expected = np.zeros((len(x), LENGTH, 5))
    for t in range(LENGTH):
        expected[:, t] = reward(x[:, t, None], w[:, t])
        for ahead in range(1, min(horizon, LENGTH - t)):
            expected[:, t] += GAMMA**ahead * reward(x[:, t + ahead], np.zeros((len(x), 1, 2)))[:, None]
    np.testing.assert_allclose(result.scores.numpy().reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    assert (result.w[:, 0] == 0).all() and len(result.w.unique(dim=1)) == len(result.w)
    assert result.episode.tolist() == np.repeat(np.arange(6), LENGTH).tolist()


@pytest.mark.parametrize("form", ["vec", "gym", "workers"])
def test_the_best_is_played_and_nothing_of_the_search_is_left(form: str) -> None:
    """The states are those of an env that nobody searches in, in each form of it; what follows is the best noise's."""
    env = guide_env(form=form)
    result = search_noise(env, guide_flow(), 6, n_candidates=5, horizon=3, seed=3)
    plain = collect_rollouts("zero", guide_env(form=form), 6, seed=3)
    np.testing.assert_array_equal(result.cond, plain.cond)
    best = result.w[th.arange(len(result)), result.scores.argmax(dim=1)].numpy()
    rewards = reward(result.cond.numpy(), best).reshape(-1, LENGTH)
    np.testing.assert_allclose(result.returns, rewards.sum(axis=1), rtol=1e-5)
    to_go = [sum(GAMMA**j * rewards[:, t + j] for j in range(LENGTH - t)) for t in range(LENGTH)]
    np.testing.assert_allclose(result.returns_to_go.numpy().reshape(-1, LENGTH), np.stack(to_go, 1), rtol=1e-4, atol=1e-5)
    assert (result.lengths == LENGTH).all()
    env.close()


def test_every_env_step_is_counted() -> None:
    env = guide_env()
    result = search_noise(env, guide_flow(), 6, n_candidates=5, horizon=3)
    made = sum(inner.unwrapped.made for inner in env.unwrapped.envs)  # type: ignore[attr-defined]
    # at each macro-step five noises are tried for three steps, or for what is left of the episode; one is played
    assert result.env_steps == made == 6 * (5 * (3 + 3 + 2 + 1) + LENGTH)


def test_a_share_of_the_macro_steps() -> None:
    result = searched(episodes=40, share=0.4)
    assert 0.25 < len(result) / (40 * LENGTH) < 0.55
    assert result.env_steps < 0.55 * searched(episodes=40).env_steps + 40 * LENGTH


def policy_of(bias: float = 0.0, mean: float = 0.0) -> LatentPolicy:
    """Its value is ``bias`` everywhere, its mean ``mean``."""
    steering = Steering(guide_flow(), guide_env().steering.contract)  # type: ignore[attr-defined]
    policy = LatentPolicy(steering.observation_space, steering.action_space, lambda _: 1e-3, prior_mix=0.0)
    with th.no_grad():
        policy.value_net.weight.zero_()
        policy.value_net.bias.fill_(bias)
        policy.action_net.bias[:2] = mean
    return policy.eval()


def test_a_value_counts_at_the_horizon_and_not_after_an_end() -> None:
    with_value, without = searched(2, value=policy_of(5.0)), searched(2)
    added = (with_value.scores - without.scores).reshape(-1, LENGTH, 5)
    expected = th.tensor([5 * GAMMA**2, 5 * GAMMA**2, 0.0, 0.0])  # the last two reach the end
    np.testing.assert_allclose(added, expected[None, :, None].expand_as(added), atol=1e-4)


def test_a_policy_proposes_its_mean_and_samples() -> None:
    result = search_noise(guide_env(), policy_of(mean=3.0), 40, n_candidates=6, horizon=2)
    w = result.w[:, :, 0]
    assert (w[:, 0] == 0).all()
    np.testing.assert_allclose(w[:, 1], 3.0, rtol=1e-5)
    means = w[:, 2:].mean(dim=(0, 2))
    np.testing.assert_allclose(means, [0, 3, 0, 3], atol=0.3)  # of the prior and of the policy in turn
    # after the first macro-step its mean is played on
    x = result.cond.numpy().reshape(-1, LENGTH, 2)
    follow = GAMMA * reward(x[:, 1:], np.full((len(x), LENGTH - 1, 1, 2), 3.0))
    first = reward(x[:, :-1, None], w.reshape(-1, LENGTH, 6, 1, 2).numpy()[:, :-1])
    expected = first + follow[:, :, None]
    np.testing.assert_allclose(result.scores.reshape(-1, LENGTH, 6)[:, :-1], expected, rtol=1e-4, atol=1e-4)


def test_one_fixed_noise_proposes_itself() -> None:
    result = search_noise(guide_env(), np.full((1, 2), 2.0, np.float32), 2, n_candidates=3, horizon=1)
    assert (result.w[:, 1] == 2).all() and not (result.w[:, 2] == 2).any()


def test_the_prior_can_be_narrower() -> None:
    assert 0.4 < searched(episodes=40, prior_std=0.5).w[:, 1:].std() < 0.6


def test_the_search_can_be_evaluated() -> None:
    env = guide_env()
    found = evaluate(NoiseSearch(env, guide_flow(), n_candidates=16, horizon=1), env, 20)
    assert found.mean_return > 0.5 * evaluate("zero", env, 20).mean_return


def test_the_same_seed_finds_the_same() -> None:
    first, second, third = searched(seed=1), searched(seed=1), searched(seed=2)
    assert th.equal(first.w, second.w) and th.equal(first.scores, second.scores) and not th.equal(first.w, third.w)


def test_file(tmp_path: Path) -> None:
    result = searched()
    result.save(tmp_path / "search.npz")
    loaded = SearchResult.load(tmp_path / "search.npz")
    assert vars(loaded).keys() == vars(result).keys() and loaded.contract == result.contract
    for name, value in vars(result).items():
        assert np.array_equal(vars(loaded)[name], value) if hasattr(value, "shape") else vars(loaded)[name] == value
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SearchResult.load(tmp_path / "other.npz")
    data = bytearray((tmp_path / "search.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        SearchResult.load(tmp_path / "damaged.npz")
    np.savez(tmp_path / "numbers.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="is no file of SearchResult"):
        SearchResult.load(tmp_path / "numbers.npz")


def test_two_searches_as_one() -> None:
    first, second = searched(episodes=2, seed=0), searched(episodes=4, seed=1)
    both = first + second
    assert len(both) == len(first) + len(second) and both.env_steps == first.env_steps + second.env_steps
    assert both.episode.tolist() == np.repeat(np.arange(6), LENGTH).tolist() and both.result.episodes == 6
    with pytest.raises(ValueError, match=r"same shape \(M, ...\)"):
        _ = first + searched(n_candidates=3)
    with pytest.raises(ValueError, match="differ in gamma"):
        _ = first + search_noise(VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(GuideEnv(), 1)]), guide_flow()),
                                 guide_flow(), 1, n_candidates=5)  # fmt: skip


class Dying(RestorableEnv):
    """Its process ends in the middle of a search."""

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        if self.made == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


@pytest.mark.parametrize("on_failure", ["raise", "restart"])
def test_a_worker_that_dies_ends_the_search(on_failure: Any) -> None:
    """What it knew of its episodes is lost, whether it starts again or not."""
    flow = tiny_flow()
    fns = [lambda: ActionChunkWrapper(Dying(episode_lengths=(1000,)), 3, 2)] * 2
    env = VecLatentSteering(WorkerVecEnv(fns, WorkerSettings(2, on_failure)), flow)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"Worker .* died|A worker failed during a search"):
        warnings.simplefilter("ignore")
        search_noise(env, flow, 2, n_candidates=2, horizon=2)
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(n_candidates=1), "n_candidates must be at least 2, found 1"),
        (dict(horizon=0), "horizon must be at least 1 macro-step, found 0"),
        (dict(share=0.0), r"share .* must lie in \(0, 1\], found 0"),
        (dict(share=1e-9), "No macro-step of 6 episodes was searched"),
        (dict(prior_std=0.0), "prior_std is a standard deviation and must be positive, found 0"),
        (dict(episodes=0), "episodes must be at least 1, found 0"),
        (dict(value=guide_flow()), "value must be a model or policy with a value network, found FlowPolicy"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        searched(**kwargs)


def test_bad_envs() -> None:
    flow = tiny_flow()
    with pytest.raises(ValueError, match="cannot go back to a state"):
        search_noise(vec_steered(flow, [scripted()]), flow, 1)
    with pytest.raises(ValueError, match="The env steers flow"):
        search_noise(vec_steered(flow, [RestorableEnv()]), tiny_flow(seed=1), 1)
    with pytest.raises(ValueError, match="pass the env below VecNormalize"):
        search_noise(VecNormalize(guide_env()), guide_flow(), 1)
    with pytest.raises(ValueError, match="is not steered"):
        search_noise(DummyVecEnv([lambda: ActionChunkWrapper(GuideEnv(), 1)]), guide_flow(), 1)
