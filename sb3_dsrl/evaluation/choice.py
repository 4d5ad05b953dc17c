"""The best of several policies, on the same starts, and never one that is worse than the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_dsrl.evaluation.outcomes import Outcomes, play_outcomes
from sb3_dsrl.evaluation.paired_test import PairedDifference
from sb3_dsrl.evaluation.play import Actor, as_vec_env
from sb3_dsrl.evaluation.results import EvalResult, results_table

#: The test's episodes are neither those of rollouts with a small seed nor those of an evaluation or of ``steerability``.
CHOICE_SEED = 3_000_000


class SequentialChoice:
    """
    Which of several policies to keep, from paired episodes that come in blocks; :func:`choose_policy` plays them.

    Each ordered pair is tested with :class:`~sb3_dsrl.evaluation.paired_test.PairedDifference` at ``alpha / (n - 1)``, for n
    policies. A policy that another one is shown to beat is out. What is kept is the most successful of those that are shown to
    beat the start, or else the start. As only n - 1 of the tests concern the start, and as many the truly best policy, the
    chance that what is kept is no better than the start, without being it, is at most alpha; and so is the chance that the
    best policy is ever thrown out.

    :param names: of the policies; the first is the start
    :param alpha: chance of either mistake
    :param margin: the choice is clear as well if no other policy that is left can be better by more than this
    :raises ValueError: if there are not two policies, or alpha or margin is out of range
    """

    def __init__(self, names: Sequence[str], alpha: float = 0.05, margin: float = 0.05) -> None:
        if len(set(names)) < 2:
            raise ValueError(f"A choice needs at least 2 policies, found {', '.join(names) or 'none'}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability and must lie in (0, 1), found {alpha}")
        if not 0 <= margin < 1:
            raise ValueError(f"margin is a difference of success rates and must lie in [0, 1), found {margin}")
        self.names, self.start, self.margin = list(names), names[0], margin
        #: of each test
        self.level = alpha / (len(names) - 1)
        self.pairs = {pair: PairedDifference() for pair in permutations(names, 2)}
        #: policies that none was shown to beat, and those that are shown to beat the start
        self.alive, self.proven = set(names), set[str]()
        self._success: dict[str, list[bool]] = {name: [] for name in names}

    def add(self, success: Mapping[str, np.ndarray]) -> None:
        """
        :param success: of the same starts, (block,), for each policy of :attr:`in_play`
        """
        for name, outcomes in success.items():
            self._success[name] += list(map(bool, outcomes))
        for a, b in permutations(success, 2):
            pair = self.pairs[a, b]
            pair.add(success[a], success[b])
            if pair.exceeds(0.0, self.level):
                self.alive.discard(b)
                if b == self.start:
                    self.proven.add(a)

    @property
    def in_play(self) -> list[str]:
        """Policies whose episodes still matter; the start's do as long as one is left that is not shown to beat it."""
        needed = self.alive | (set() if self.alive <= self.proven else {self.start})
        return [name for name in self.names if name in needed]

    @property
    def kept(self) -> str:
        """What would be kept now."""
        if not self.proven:
            return self.start
        return max(
            (name for name in self.names if name in self.proven),
            key=lambda name: (name in self.alive, np.mean(self._success[name])),
        )

    @property
    def clear(self) -> bool:
        """Whether nothing that is left can be better than what is kept, by more than the margin."""
        kept = self.kept
        return all(self.pairs[kept, name].exceeds(-self.margin, self.level) for name in self.alive - {kept})

    def gain(self, name: str) -> tuple[float, float, float]:
        """
        :param name: of a policy
        :return: mean of its success minus the start's on the same starts, with an interval that holds at all times
        """
        if name == self.start:
            return 0.0, 0.0, 0.0
        pair = self.pairs[name, self.start]
        return pair.mean, *pair.interval(2 * self.level)


@dataclass
class PolicyChoice:
    """
    What :func:`choose_policy` found.

    :param name: of the policy that is kept
    :param actors: what was compared; the first is the start
    :param results: of each; episodes of this test, which flatter the chosen one a little
    :param gains: success minus the start's on the same starts, and both ends of an interval that holds at all times
    :param clear: whether the test stopped because it knew, and not because its episodes were spent
    :param episodes: of all policies together
    :param env_steps: that they took
    """

    name: str
    actors: dict[str, Actor]
    results: dict[str, EvalResult]
    gains: dict[str, tuple[float, float, float]]
    clear: bool
    episodes: int
    env_steps: int

    @property
    def actor(self) -> Actor:
        """The policy that is kept."""
        return self.actors[self.name]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [dict(result.as_row(), gain=list(self.gains[name])) for name, result in self.results.items()]
        return dict(name=self.name, clear=self.clear, episodes=self.episodes, env_steps=self.env_steps, rows=rows)

    def __str__(self) -> str:
        gains = [f"{name}: {gain:+.2f} ({low:+.2f} to {high:+.2f})" for name, (gain, low, high) in self.gains.items()]
        why = "the answer is clear" if self.clear else "the episodes are spent"
        return (
            f"{results_table(list(self.results.values()))}\n\nGains over {gains[0].split(':')[0]} on the same starts: "
            f"{', '.join(gains[1:])}\nKept: {self.name}; {self.episodes} episodes, {self.env_steps:,} env steps, {why}"
        )


def choose_policy(
    actors: Mapping[str, Actor],
    env: gym.Env | VecEnv,
    *,
    alpha: float = 0.05,
    margin: float = 0.05,
    max_episodes: int = 400,
    max_env_steps: int | None = None,
    seed: int = CHOICE_SEED,
    deterministic: bool = True,
    progress_bar: bool = False,
) -> PolicyChoice:
    """
    Plays several policies from the same starts, a block of one episode an env at a time, and stops as soon as the answer is
    clear; see :class:`SequentialChoice` for what is kept, and for what that guarantees. Successes at the end count.

    :param actors: policies by name; the first is the start, "prior" or "zero", say
    :param env: steered env, gym or vectorised; its episodes begin anew for every block
    :param alpha: chance to keep a policy that is no better than the start
    :param margin: stop as well if no other policy can be better by more than this
    :param max_episodes: of each policy
    :param max_env_steps: of all policies; no block begins that could take more, as far as the blocks before it tell; the first
        is always played. None is no limit.
    :param seed: of the episodes
    :param deterministic: compare the policies' means; otherwise sampled play
    :param progress_bar: show a progress bar
    :return: the policy that is kept, and all that was found
    :raises ValueError: if there are not two policies, a number is out of range, or the env reports no success
    """
    if max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1, found {max_episodes}")
    venv = as_vec_env(env)
    choice = SequentialChoice(list(actors), alpha, margin)
    played: dict[str, Outcomes] = {}
    dearest: dict[str, int] = {}
    done = 0
    with tqdm(total=max_episodes, desc="choose a policy", disable=not progress_bar) as bar:
        while done < max_episodes and not choice.clear:
            cost = sum(dearest.get(name, 0) for name in choice.in_play)
            if max_env_steps is not None and done and cost + sum(o.env_steps for o in played.values()) > max_env_steps:
                break
            block = min(venv.num_envs, max_episodes - done)
            news = {
                name: play_outcomes(actors[name], venv, block, seed + done, deterministic, "choose_policy")
                for name in choice.in_play
            }
            for name, outcomes in news.items():
                played[name] = played[name] + outcomes if name in played else outcomes
                dearest[name] = max(dearest.get(name, 0), outcomes.env_steps)
            choice.add({name: outcomes.success_at_end for name, outcomes in news.items()})
            done += block
            bar.update(block)
    return PolicyChoice(
        choice.kept,
        dict(actors),
        {name: outcomes.result(name) for name, outcomes in played.items()},
        {name: choice.gain(name) for name in choice.names},
        choice.clear,
        sum(len(outcomes.returns) for outcomes in played.values()),
        sum(outcomes.env_steps for outcomes in played.values()),
    )
