"""Settings of the weightings of stage 1. The defaults are the recommended ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """
    What all weightings have in common.

    :param n_iterations: optimiser steps
    :param beta: temperature of the weights: small values learn from the best noises alone
    :param kl_coef: weight of KL(pi || N(0, I))
    :param batch_size: states in a batch
    :param learning_rate: of stage 1's own Adam; a model's optimiser stays as it is
    :param normalize_advantages: divide advantages by their standard deviation before they become weights
    :param learn_std: let the policy change its std; False holds it at its start (exactly so if the std does not depend on the
        observation yet, as in a new policy)
    :raises ValueError: if one of them is out of range
    """

    n_iterations: int
    beta: float
    kl_coef: float
    batch_size: int = 256
    learning_rate: float = 3e-4
    normalize_advantages: bool = True
    learn_std: bool = False

    def __post_init__(self) -> None:
        self._at_least(n_iterations=1, batch_size=1)
        self._positive("learning_rate")
        self._temperatures("beta")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must not be negative, found {self.kl_coef}")

    def _at_least(self, **smallest: int) -> None:
        for name, value in smallest.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, found {getattr(self, name)}")

    def _positive(self, name: str) -> None:
        if getattr(self, name) <= 0:
            raise ValueError(f"{name} must be positive, found {getattr(self, name)}")

    def _temperatures(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is a temperature and must be positive, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ExecutedSettings(FitSettings):
    """
    Of :func:`~sb3_dsrl.fit_executed`: 500 iterations, beta 0.3 and kl_coef 0.01, beside what all settings have.
    Advantages are normalised over all macro-steps.

    :param gae_lambda: of the advantages: 1 is the return until the end of the episode, 0 that of one macro-step
    :param max_weight: clip of the weights; that of an average macro-step is 1
    """

    n_iterations: int = 500
    beta: float = 0.3
    kl_coef: float = 1e-2
    gae_lambda: float = 0.5
    max_weight: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("max_weight")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must lie in [0, 1], found {self.gae_lambda}")


@dataclass(frozen=True, kw_only=True)
class InvertedSettings(ExecutedSettings):
    """
    Of :func:`~sb3_dsrl.fit_inverted`: what :class:`ExecutedSettings` has, with the same values.

    :param tolerance: a chunk of a demo that no noise makes more exactly than this has no weight: root mean square difference
        of the actions, in standard deviations of the demos' actions
    """

    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("tolerance")


@dataclass(frozen=True, kw_only=True)
class CandidateSettings(FitSettings):
    """
    Of :func:`~sb3_dsrl.fit_candidates`: 2,000 iterations, beta 1 and kl_coef 0.001, beside what all settings have.
    Advantages are normalised in each state.

    :param n_candidates: M, candidates of a state in a batch
    :param pool_size: candidates of each state that are drawn, decoded and scored once, beforehand; every iteration takes M
        of them. None draws fresh ones at every iteration, which costs a decode of ``batch_size * n_candidates`` noises
        each time.
    :param kappa: the score is mean - kappa * std over the critic ensemble
    :param tau: temperature of the soft baseline that the logged advantages refer to; weights do not depend on it
    :param warm_start_value: also fit the value network to the critic under the new policy; reward scale, gamma and
        terminations of stage 2 must be the critic's
    """

    n_iterations: int = 2_000
    beta: float = 1.0
    kl_coef: float = 1e-3
    n_candidates: int = 16
    pool_size: int | None = None
    kappa: float = 1.0
    tau: float = 5.0
    warm_start_value: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(n_candidates=2)
        if self.pool_size is not None:
            self._at_least(pool_size=self.n_candidates)
        self._temperatures("tau")


@dataclass(frozen=True, kw_only=True)
class SearchedSettings(FitSettings):
    """
    Of :func:`~sb3_dsrl.fit_searched`: at most 1,000 iterations, beta 0.5 and kl_coef 0.001, beside what all settings have.
    Advantages are normalised over all states.

    :param held_out: share of the searched episodes that are not learned from; the policy that suits them best is kept, of all
        iterations. 0 holds none out and keeps the last one.
    :param warm_start_value: also fit the value network to what followed the states, as the search played on
    """

    n_iterations: int = 1_000
    beta: float = 0.5
    kl_coef: float = 1e-3
    held_out: float = 0.2
    warm_start_value: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a share and must lie in [0, 1), found {self.held_out}")
