"""Stage 1 from a search: weights by hand, the known answer on the toy, held-out selection, rounds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_dsrl import LatentPolicy, SearchedSettings, TrainingCheckpoint, evaluate, pretrain_latent, search_noise
from sb3_dsrl.evaluation.search_result import SearchResult
from sb3_dsrl.stage1.searched import SearchedNoise, held_out_states, searched_weights
from sb3_dsrl.steering.steering import Steering
from tests.bandit import bandit_flow
from tests.test_search import guide_env, reward, searched
from tests.toys import GuideEnv, guide_flow

FAST: dict[str, Any] = dict(
    policy_kwargs=dict(net_arch=dict(pi=[64], vf=[64]), log_std_init=0.0), learning_rate=5e-3, beta=0.1, seed=0
)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return searched(1, episodes=150, n_candidates=16)


def means(policy: LatentPolicy, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """States that were never searched, and the policy's noises in them."""
    x = np.random.default_rng(9).uniform(-1, 1, (n, 2)).astype(np.float32)
    return x, policy.predict(x, deterministic=True)[0]


def test_weights_by_hand() -> None:
    """Advantages over the state's mean, their std over all states: a state where all are as good has uniform weights."""
    scores = th.tensor([[1.0, 3.0], [7.0, 7.0]])
    weights = searched_weights(scores, beta=0.5)
    scale = np.sqrt((1 + 1 + 0 + 0) / 4)
    expected = 1 / (1 + np.exp(-2 / scale / 0.5))
    np.testing.assert_allclose(weights, [[1 - expected, expected], [0.5, 0.5]], rtol=1e-5)
    unscaled = 1 / (1 + np.exp(-2 / 0.5))
    np.testing.assert_allclose(searched_weights(scores, 0.5, normalize=False)[0, 1], unscaled, rtol=1e-5)
    # luck of a millionth does not count, as it would if every state were normalised by itself
    tiny = searched_weights(th.tensor([[0.0, 1e-6], [0.0, 1.0]]))
    np.testing.assert_allclose(tiny[0], 0.5, atol=1e-5)


def test_the_known_answer_is_learned(found: SearchResult) -> None:
    policy = pretrain_latent(guide_flow(), search=found, **FAST)
    x, w = means(policy)
    assert np.abs(w[:, 0] - GuideEnv.best(x)).mean() < 0.2  # of 0.4, the mean of |best|
    learned, nothing = reward(x, w).mean(), reward(x, np.zeros_like(w)).mean()
    fixed = max(reward(x, np.full_like(w, 1) * np.array([a, b])).mean() for a in (-0.3, 0, 0.3) for b in (-0.3, 0, 0.3))
    assert learned > 0.35 * nothing and learned > 0.35 * fixed
    env = guide_env()
    assert evaluate(policy, env, 50).mean_return > 0.5 * evaluate("zero", env, 50).mean_return


def test_nothing_is_learned_from_scores_that_say_nothing(found: SearchResult) -> None:
    """Held-out states show that it is chance; the policy stays what it was."""
    generator = th.Generator().manual_seed(0)
    noise = replace(found, scores=th.randn(found.scores.shape, generator=generator))
    _, w = means(pretrain_latent(guide_flow(), search=noise, **FAST))
    _, without = means(pretrain_latent(guide_flow(), search=noise, held_out=0, **FAST))
    assert np.abs(w).mean() < 0.5 * np.abs(without).mean()


def test_rounds_come_closer(found: SearchResult) -> None:
    """Search with the policy so far as proposal and learning from all of it: expert iteration."""
    start = pretrain_latent(guide_flow(), search=searched(1, episodes=40, n_candidates=4), **FAST)
    again = search_noise(guide_env(), start, 150, n_candidates=4, horizon=1, seed=1)
    learned = pretrain_latent(guide_flow(), search=searched(1, episodes=40, n_candidates=4) + again, **FAST)
    errors = [np.abs(w[:, 0] - GuideEnv.best(x)).mean() for x, w in map(means, (start, learned))]
    assert errors[1] < errors[0]


def test_in_place_with_a_value(found: SearchResult) -> None:
    env = guide_env()
    kwargs: Any = dict(gamma=0.9, n_steps=8, batch_size=8, device="cpu", policy_kwargs=FAST["policy_kwargs"])
    model = PPO("LatentPolicy", env, **kwargs)
    rest = {key: value for key, value in FAST.items() if key != "policy_kwargs"}
    assert pretrain_latent(model, search=found, warm_start_value=True, **rest) is model.policy
    values = model.policy.predict_values(found.cond)[:, 0].detach()
    error, spread = (values - found.returns_to_go).abs().mean(), found.returns_to_go.std()
    assert error < spread  # x is drawn anew at each step, so most of what follows cannot be known
    assert abs(values.mean() - found.returns_to_go.mean()) < 0.3 * spread
    model.learn(16)


def test_only_the_steered_entries_count() -> None:
    steering = Steering(guide_flow(), searched(1, episodes=2).contract)
    noise = SearchedNoise.of(searched(1, episodes=2), steering, SearchedSettings())
    assert noise.w.shape == (8, 5, 1, 2) and noise.weights.sum(dim=1).allclose(th.ones(8))


def test_whole_episodes_are_held_out() -> None:
    episode = np.repeat(np.arange(10), 4)
    mask = held_out_states(episode, 0.2)
    assert mask.sum() == 8 and {tuple(part.tolist()) for part in mask.reshape(10, 4)} == {(False,) * 4, (True,) * 4}
    with pytest.raises(ValueError, match=r"held_out=0.2 of 1 searched episodes"):
        held_out_states(np.zeros(4, int), 0.2)


def test_training_goes_on_after_a_stop(found: SearchResult, tmp_path: Any) -> None:
    """With the best policy so far, which a checkpoint keeps."""
    whole = pretrain_latent(guide_flow(), search=found, n_iterations=100, **FAST)

    class Stop(Exception):
        pass

    def stop(done: int, policy: LatentPolicy) -> None:
        raise Stop

    checkpoint = TrainingCheckpoint(tmp_path, save_freq=20)
    with pytest.raises(Stop):
        pretrain_latent(
            guide_flow(), search=found, n_iterations=100, checkpoint=checkpoint, callback=stop, callback_freq=50, **FAST
        )
    checkpoint = TrainingCheckpoint(tmp_path, save_freq=20, resume=True)
    resumed = pretrain_latent(guide_flow(), search=found, n_iterations=100, checkpoint=checkpoint, **FAST)
    for name, value in whole.state_dict().items():
        assert th.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        (dict(held_out=1.0), ValueError, r"held_out is a share and must lie in \[0, 1\), found 1.0"),
        (dict(beta=0.0), ValueError, "beta is a temperature and must be positive"),
        (dict(kappa=1.0), TypeError, "search=... does not know the setting 'kappa'"),
        (dict(weighting="executed"), ValueError, "learns from the search alone"),
        (dict(demos="demos.h5"), ValueError, "learns from the search alone"),
    ],
)
def test_bad_arguments(found: SearchResult, kwargs: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        pretrain_latent(guide_flow(), search=found, **kwargs)


def test_another_flow_is_refused(found: SearchResult) -> None:
    other = bandit_flow()
    other.net.a.data += 0.1  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="The searched noises have flow="):
        pretrain_latent(other, search=found)
