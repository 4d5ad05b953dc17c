"""A test of two policies on the same starts that may be looked at after every episode."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

#: Bets of the mixture, as parts of the largest one: midpoints of a uniform grid.
BETS = (np.arange(200) + 0.5) / 200


class PairedDifference:
    """
    Evidence that policy a succeeds more often than policy b, from episodes that both play from the same starts.

    The differences of success D are -1, 0 or 1. For a bet c in (0, 1), ``prod_i (1 + c (D_i - m) / (1 + m))`` is what a player
    who starts with 1 owns after betting against "the mean of D is at most m". If that is true, the player gains nothing on
    average, whatever the differences look like. So the wealth, averaged over the bets in ``BETS``, is a nonnegative
    supermartingale, and the chance that it *ever* reaches ``1 / alpha`` is at most alpha (Ville's inequality). Therefore one
    may look after every episode and stop as soon as one likes. (This is a confidence sequence by betting, Waudby-Smith and
    Ramdas, https://arxiv.org/abs/2010.09686. With m = 0 ties do not count, and the average over bets is the mixture SPRT of
    the coin "a wins where they differ", with a uniform prior.)

    It is valid if starts are drawn independently of what happened before, as those of other seeds are.
    """

    def __init__(self) -> None:
        self.wins, self.ties, self.losses = 0, 0, 0

    @property
    def episodes(self) -> int:
        """Of either policy."""
        return self.wins + self.ties + self.losses

    @property
    def mean(self) -> float:
        """Of the differences; 0 before the first episode."""
        return (self.wins - self.losses) / max(self.episodes, 1)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """
        :param a: success of policy a in some episodes, (n,)
        :param b: of policy b, from the same starts, (n,)
        """
        a, b = np.asarray(a, bool), np.asarray(b, bool)
        self.wins += int((a & ~b).sum())
        self.losses += int((b & ~a).sum())
        self.ties += int((a == b).sum())

    def log_evidence(self, m: float = 0.0) -> float:
        """
        Logarithm of the wealth against "the mean of D is at most m".

        :param m: in (-1, 1)
        """
        won, tied, lost = _log_factors(m)
        each = self.wins * won + self.ties * tied + self.losses * lost
        return float(np.logaddexp.reduce(each) - math.log(len(each)))

    def exceeds(self, m: float, alpha: float) -> bool:
        """
        :param m: in (-1, 1)
        :param alpha: chance to ever say so if it is not true
        :return: whether the mean of D is above m
        """
        return self.log_evidence(m) >= -math.log(alpha)

    def lower(self, alpha: float) -> float:
        """
        Lower end of the confidence sequence.

        :param alpha: chance that it ever lies above the mean of D
        :return: in [-1, 1]
        """
        low, high = -1.0, 1.0  # evidence falls as m rises
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.exceeds(middle, alpha) else (low, middle)
        return low

    def interval(self, alpha: float) -> tuple[float, float]:
        """
        :param alpha: chance that the mean of D is ever outside
        :return: both ends, in [-1, 1]
        """
        return self.lower(alpha / 2), -self.reversed().lower(alpha / 2)

    def reversed(self) -> PairedDifference:
        """The same episodes, seen from policy b."""
        other = PairedDifference()
        other.wins, other.ties, other.losses = self.losses, self.ties, self.wins
        return other


@lru_cache(maxsize=256)
def _log_factors(m: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of what a win, a tie and a loss multiply the wealth by, for each bet."""
    won, tied, lost = (np.log1p(BETS * (d - m) / (1 + m)) for d in (1.0, 0.0, -1.0))
    return won, tied, lost
