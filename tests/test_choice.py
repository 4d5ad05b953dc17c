"""The best of several policies by a test that may stop at any time: its error rate, its power, and what it plays."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from scipy.stats import binom

from sb3_dsrl import choose_policy
from sb3_dsrl.evaluation.choice import SequentialChoice
from sb3_dsrl.evaluation.outcomes import play_outcomes
from sb3_dsrl.evaluation.paired_test import PairedDifference
from tests.envs import FORMS, ScriptedEnv, gym_steered, tiny_flow
from tests.toys import linear_flow

RUNS, ALPHA = 2_000, 0.05
#: More errors than this happen in one of ten thousand trials, if the rate is alpha.
MOST = int(binom.ppf(0.9999, RUNS, ALPHA))


def simulated(rates: dict[str, float], shared: float, rng: np.random.Generator, **kwargs: Any) -> SequentialChoice:
    """Paired episodes of policies with these rates; a part of the starts is easy or hard for all of them alike."""
    choice = SequentialChoice(list(rates), **kwargs)
    for _ in range(25):
        own = rng.random((len(rates), 8))
        luck = np.where(rng.random(8) < shared, own[0], own)
        choice.add({name: luck[i] < rates[name] for i, name in enumerate(rates) if name in choice.in_play})
        if choice.clear:
            break
    return choice


# -------------------------------------------------------------------------------------------------------------- evidence


def test_evidence_is_the_mixture_of_bets_in_closed_form() -> None:
    """With m = 0 and wins alone it is the integral of (1 + c)^n over (0, 1)."""
    pair = PairedDifference()
    pair.add(np.ones(7, bool), np.zeros(7, bool))
    assert pair.log_evidence() == pytest.approx(np.log((2**8 - 1) / 8), abs=1e-4)
    assert pair.exceeds(0.0, 0.05)
    ties = np.array([True, False])
    pair.add(np.repeat(ties, 50), np.repeat(ties, 50))
    assert pair.log_evidence() == pytest.approx(np.log((2**8 - 1) / 8), abs=1e-4)  # ties say nothing of m = 0
    assert (pair.episodes, pair.wins, pair.ties, pair.losses) == (107, 7, 100, 0)
    assert pair.mean == pytest.approx(7 / 107)


@pytest.mark.parametrize("probabilities", [(0.2, 0.6, 0.2), (0.05, 0.8, 0.15), (0.35, 0.5, 0.15)])
def test_the_mean_wealth_against_the_truth_is_one(probabilities: tuple[float, float, float]) -> None:
    """Exactly, over all outcomes of six episodes: a fair game."""
    won, tied, lost = probabilities
    total = 0.0
    for wins in range(7):
        for ties in range(7 - wins):
            pair = PairedDifference()
            pair.wins, pair.ties, pair.losses = wins, ties, 6 - wins - ties
            ways = np.exp(_log_factorial(6) - sum(map(_log_factorial, (wins, ties, pair.losses))))
            total += ways * won**wins * tied**ties * lost**pair.losses * np.exp(pair.log_evidence(won - lost))
    assert total == pytest.approx(1.0, abs=1e-9)


def _log_factorial(n: int) -> float:
    return float(np.log(np.arange(1, n + 1)).sum())


def test_the_interval_holds_at_all_times_and_shrinks() -> None:
    rng, outside, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        pair, missed = PairedDifference(), False
        for _ in range(20):
            luck = rng.random((2, 10))
            pair.add(luck[0] < 0.6, luck[1] < 0.5)
            missed |= pair.exceeds(0.1, ALPHA / 2) or pair.reversed().exceeds(-0.1, ALPHA / 2)
        outside += missed
        if len(widths) < 20:
            low, high = pair.interval(ALPHA)
            assert pair.exceeds(low - 1e-6, ALPHA / 2) and not pair.exceeds(low + 1e-6, ALPHA / 2)
            widths.append(high - low)
    assert outside <= binom.ppf(0.9999, 400, ALPHA)
    assert np.mean(widths) < 0.4
    assert PairedDifference().interval(ALPHA) == pytest.approx((-1.0, 1.0), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ error rates


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_a_policy_that_is_no_better_is_seldom_kept(shared: float) -> None:
    rng = np.random.default_rng(1)
    wrong = sum(simulated({"start": 0.5, "same": 0.5}, shared, rng, alpha=ALPHA).kept != "start" for _ in range(RUNS))
    assert wrong <= MOST


def test_of_five_policies_that_are_no_better_none_is_kept_more_often() -> None:
    rng, rates = np.random.default_rng(2), {"start": 0.6, "a": 0.6, "b": 0.6, "c": 0.55, "d": 0.3}
    wrong = sum(simulated(rates, 0.3, rng, alpha=ALPHA).kept != "start" for _ in range(300))
    assert wrong <= binom.ppf(0.9999, 300, ALPHA)


def test_the_best_is_found_and_hardly_ever_thrown_out() -> None:
    rng, rates = np.random.default_rng(3), {"start": 0.45, "a": 0.7, "best": 0.95, "b": 0.75, "worse": 0.2}
    runs = [simulated(rates, 0.3, rng, alpha=ALPHA) for _ in range(200)]
    assert np.mean(["best" not in run.alive for run in runs]) <= binom.ppf(0.9999, 200, ALPHA) / 200
    assert np.mean([run.kept == "best" for run in runs]) > 0.95
    assert np.mean([run.clear for run in runs]) > 0.9
    episodes = np.mean([len(run._success["best"]) for run in runs])
    assert episodes < 100  # of 200 that it may play


def test_a_known_gap_is_found() -> None:
    rng = np.random.default_rng(4)
    runs = [simulated({"start": 0.75, "better": 0.95}, 0.5, rng, alpha=ALPHA) for _ in range(300)]
    assert np.mean([run.kept == "better" for run in runs]) > 0.97


def test_twins_are_told_apart_from_nothing_but_the_margin() -> None:
    """Two policies that do the same on every start: there is nothing to find, and the test says so."""
    rng = np.random.default_rng(5)
    choice = simulated({"start": 0.5, "twin": 0.5}, 1.0, rng, margin=0.05)
    assert choice.clear and choice.kept == "start" and choice.alive == {"start", "twin"}
    assert 60 <= choice.pairs["start", "twin"].episodes <= 120
    assert not simulated({"start": 0.5, "twin": 0.5}, 1.0, rng, margin=0.0).clear


def test_what_is_kept_was_compared_with_the_start_itself() -> None:
    """b beats a and a beats the start: that alone does not keep b."""
    choice = SequentialChoice(["start", "a", "b"])
    yes, no = np.ones(12, bool), np.zeros(12, bool)
    choice.add({"start": no, "a": yes})
    choice.add({"a": no, "b": yes})
    assert choice.alive == {"b"} and choice.proven == {"a"} and choice.kept == "a" and not choice.clear
    assert choice.in_play == ["start", "b"]  # a has lost; the start is still needed
    choice.add({"start": no, "b": yes})
    assert choice.kept == "b" and choice.clear


# ------------------------------------------------------------------------------------------------------------------- envs


class Signs(gym.Env):
    """One step, which succeeds if the action has the sign of what is seen, or with ``blind`` if it is positive."""

    def __init__(self, blind: bool = False) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.blind, self.seen, self.made = blind, np.zeros(2, np.float32), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.seen = self.np_random.standard_normal(2).astype(np.float32)
        return self.seen, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.made += 1
        good = bool(action[0] * (1.0 if self.blind else self.seen[0]) > 0)
        return self.seen, float(good), True, False, {"success": good}


class Looks:
    """Plays the sign of what it sees, times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def predict(self, observation: np.ndarray, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        return self.factor * np.sign(observation)[:, None, :].astype(np.float32), None


@pytest.mark.parametrize("form", FORMS)
def test_choice_in_an_env(form: str) -> None:
    raw = [Signs() for _ in range(4)]
    actors = {"prior": "prior", "wrong": Looks(-0.5), "right": Looks(0.5)}
    found = choose_policy(actors, FORMS[form](linear_flow(), raw))
    assert found.name == "right" and found.actor is actors["right"] and found.clear
    assert found.env_steps == sum(env.made for env in raw) == found.episodes < 3 * 40
    assert found.results["wrong"].success_at_end == 0.0 and found.results["right"].success_at_end == 1.0
    assert found.results["wrong"].episodes < found.results["right"].episodes == found.results["prior"].episodes
    mean, low, high = found.gains["right"]
    assert 0.0 < low < mean < high <= 1.0 and found.gains["prior"] == (0.0, 0.0, 0.0)
    assert "Kept: right" in str(found) and found.as_dict()["rows"][2]["gain"][0] == mean


def test_the_start_stays_if_all_else_is_worse() -> None:
    env = gym_steered(linear_flow(), [Signs() for _ in range(4)])
    found = choose_policy({"right": Looks(0.5), "prior": "prior", "wrong": Looks(-1.0)}, env)
    assert found.name == "right" and found.clear and found.results["wrong"].episodes < 20


def test_limits() -> None:
    env = gym_steered(linear_flow(), [Signs() for _ in range(4)])
    same = {"a": Looks(0.5), "b": Looks(0.6)}
    found = choose_policy(same, env, max_episodes=10)
    assert not found.clear and found.name == "a" and found.episodes == 20
    assert "the episodes are spent" in str(found)
    found = choose_policy(same, env, max_env_steps=31)
    assert not found.clear and found.env_steps == 24
    assert choose_policy(same, env, max_env_steps=1).env_steps == 8  # the first block is always played


def test_every_policy_plays_the_same_starts() -> None:
    raw = [ScriptedEnv(episode_lengths=(4, 9), random_start=True) for _ in range(2)]
    env = gym_steered(tiny_flow(), raw)
    choose_policy({"prior": "prior", "zero": "zero"}, env, max_episodes=6, margin=0.0)
    starts = np.array([each.starts for each in raw])
    blocks = starts.reshape(2, -1, 2)  # an env is also reset when its episode has ended
    assert len(np.unique(blocks[:, :, 0])) == 6
    np.testing.assert_array_equal(blocks[:, 0::2, 0], blocks[:, 1::2, 0])


def test_outcomes_are_in_the_order_of_envs_and_know_their_starts() -> None:
    env = gym_steered(linear_flow(), [Signs() for _ in range(3)])
    played = play_outcomes(Looks(0.5), env, 7, seed=3)
    assert played.success_at_end.all() and len(played.returns) == 7 and played.first_obs is not None
    again = play_outcomes("prior", env, 7, seed=3)
    np.testing.assert_array_equal(played.first_obs, again.first_obs)
    assert len(np.unique(played.first_obs[:, 0])) == 7
    both = played + again
    assert both.result("both").episodes == 14 and both.env_steps == played.env_steps + again.env_steps


def test_bad_input() -> None:
    env = gym_steered(linear_flow(), [Signs()])
    for kwargs, message in (
        (dict(alpha=0.0), "alpha is a probability and must lie in"),
        (dict(margin=1.0), "margin is a difference of success rates"),
        (dict(max_episodes=0), "max_episodes must be at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_policy({"prior": "prior", "zero": "zero"}, env, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A choice needs at least 2 policies, found prior"):
        choose_policy({"prior": "prior"}, env)
