"""Outcomes of episodes, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What the info at the end of an episode tells of it
OUTCOME = ("success_once", "success_at_end", "episode_return", "episode_length")


@dataclass
class EvalResult:
    """
    Outcome of an evaluation.

    :param name: of the row
    :param episodes: number of episodes
    :param success_once: part of the episodes that succeeded at any env step
    :param success_at_end: part of the episodes that were successful at their last env step
    :param ci_low: lower end of the 95% Wilson interval of ``success_at_end``
    :param ci_high: upper end
    :param mean_return: mean undiscounted return in env steps' rewards
    :param mean_length: mean length in env steps
    """

    name: str
    episodes: int
    success_once: float
    success_at_end: float
    ci_low: float
    ci_high: float
    mean_return: float
    mean_length: float

    @classmethod
    def of(
        cls, name: str, success_once: np.ndarray, success_at_end: np.ndarray, returns: np.ndarray, lengths: np.ndarray
    ) -> EvalResult:
        """
        :param name: of the row
        :param success_once: of each episode, (episodes,)
        :param success_at_end: of each episode, (episodes,)
        :param returns: of each episode, (episodes,)
        :param lengths: of each episode in env steps, (episodes,)
        """
        interval = wilson_interval(int(success_at_end.sum()), len(success_at_end))
        means = (float(x.mean()) for x in (returns, lengths))
        return cls(name, len(returns), float(success_once.mean()), float(success_at_end.mean()), *interval, *means)

    def as_row(self) -> dict[str, Any]:
        """The row of ``report.json``."""
        row = dict(vars(self))
        row["return"] = row.pop("mean_return")
        row["length"] = row.pop("mean_length")
        return row


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """
    95% Wilson score interval of a success rate.

    :param successes: number of successes
    :param episodes: number of episodes
    """
    from scipy.stats import binomtest  # a second of every import otherwise, in every worker, too

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def results_table(results: Sequence[EvalResult]) -> str:
    """
    :param results: rows
    :return: a table for the terminal
    """
    import pandas as pd  # 0.3 s of every import otherwise, in every worker, too

    frame = pd.DataFrame([result.as_row() for result in results])
    frame["95% interval"] = [f"{r.ci_low:.2f} - {r.ci_high:.2f}" for r in results]
    columns = ["name", "episodes", "success_once", "success_at_end", "95% interval", "return"]
    return frame[columns].to_string(index=False, float_format="{:.2f}".format)
