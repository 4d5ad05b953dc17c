"""Candidates of stage 1: noises that RL could choose, decoded by the frozen flow, scored by the critic and weighted.

Letters in shapes: ``n`` states, ``B`` batch, ``M`` candidates, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim,
``C`` features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch as th
from tqdm import tqdm

from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage1.aw_mle import Batch
from sb3_dsrl.stage1.settings import CandidateSettings
from sb3_dsrl.steering.scores import score_noises
from sb3_dsrl.steering.steering import Steering

#: Noises that are decoded and scored at once, which bounds the memory that activations take.
MAX_NOISES = 4_096
#: Noises that the states' pools are made of.
BANK_SIZE = 65_536


def soft_baseline(q: th.Tensor, tau: float) -> th.Tensor:
    """
    Soft value of a state, ``tau * log mean exp(q / tau)``: the mean for large tau, the maximum for small tau.

    :param q: scores of the candidates, (B, M)
    :param tau: temperature
    :return: (B,)
    """
    return tau * (th.logsumexp(q / tau, dim=1) - math.log(q.shape[1]))


def candidate_weights(
    q: th.Tensor, beta: float = 1.0, tau: float = 5.0, normalize: bool = True
) -> tuple[th.Tensor, th.Tensor]:
    """
    Softmax weights of candidates by their advantage over the soft baseline.

    :param q: scores, (B, M)
    :param beta: temperature of the weights
    :param tau: temperature of the baseline. It shifts all advantages of a state alike, so the weights do not depend on
        it; the logged advantages do.
    :param normalize: divide the advantages of each state by their standard deviation. Without it small spreads of q
        give uniform weights, from which nothing is learned.
    :return: weights (B, M), which sum to 1 in each state, and advantages (B, M)
    """
    advantages = q - soft_baseline(q, tau)[:, None]
    scale = q.std(dim=1, keepdim=True).clamp_min(1e-8) if normalize else 1.0
    return th.softmax(advantages / scale / beta, dim=1), advantages


def effective_number(weights: th.Tensor) -> th.Tensor:
    """
    Effective number of candidates, ``1 / sum w^2``: M for uniform weights, 1 when one takes all.

    :param weights: (B, M), each row sums to 1
    :return: mean over the batch
    """
    return (1.0 / weights.pow(2).sum(dim=1)).mean()


class Candidates(Protocol):
    """States with noises to choose from, and the scores of these."""

    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param batch_size: B
        :return: features (B, C), the steered part of the noises (B, M, T, A), (B, M, H, A) or (B, M, 1, A), and scores (B, M);
            on the CPU
        """


@dataclass(frozen=True)
class Scorer:
    """
    Scores noises by the chunks that they become, in blocks that bound the memory of a decode.

    :param steering: the flow that decodes them
    :param critic: ensemble chunk critic
    :param kappa: the score is mean - kappa * std over the ensemble
    """

    steering: Steering
    critic: EnsembleChunkCritic
    kappa: float

    @th.no_grad()
    def __call__(self, cond: th.Tensor, w: th.Tensor) -> th.Tensor:
        """
        :param cond: (B, C)
        :param w: noises, (B, M, T, A)
        :return: (B, M), on the CPU
        """
        n_noises = min(w.shape[1], MAX_NOISES)
        n_states = MAX_NOISES // n_noises
        device = self.steering.flow.device
        rows = []
        for of_states, noises in zip(cond.split(n_states), w.split(n_states), strict=True):
            of_states = of_states.to(device)
            parts = [part.to(device) for part in noises.split(n_noises, dim=1)]
            q = [score_noises(self.steering, self.critic, of_states, part, self.kappa) for part in parts]
            rows.append(th.cat(q, dim=1).cpu())
        return th.cat(rows)


@dataclass
class FreshCandidates:
    """Batches of fresh candidates."""

    score: Scorer
    cond: th.Tensor
    n_candidates: int

    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        cond = self.cond[th.randint(len(self.cond), (batch_size,))]
        steering = self.score.steering
        w = steering.choices(batch_size, self.n_candidates)
        return cond, w[:, :, steering.rows], self.score(cond, w)


@dataclass
class PooledCandidates:
    """
    Batches of candidates from a pool: of each state, ``pool_size`` noises, decoded and scored once.

    All states share a bank of noises. So a state costs 8 bytes a noise, whatever the size of a noise is.

    :param cond: features, (n, C)
    :param bank: the steered part of noises, (noises, T, A), (noises, H, A) or (noises, 1, A)
    :param index: which of them belong to a state, (n, pool_size)
    :param q: their scores, (n, pool_size)
    :param n_candidates: M
    """

    cond: th.Tensor
    bank: th.Tensor
    index: th.Tensor
    q: th.Tensor
    n_candidates: int

    @classmethod
    def build(
        cls, score: Scorer, cond: th.Tensor, pool_size: int, n_candidates: int, progress_bar: bool = False
    ) -> PooledCandidates:
        """
        :param score: scores them
        :param cond: features, (n, C)
        :param pool_size: noises of a state
        :param n_candidates: M
        :param progress_bar: show a progress bar
        """
        steering, n = score.steering, len(cond)
        bank = steering.choices(1, min(BANK_SIZE, n * pool_size))[0, :, steering.rows].clone()
        if len(bank) == n * pool_size:
            index = th.arange(len(bank), dtype=th.int32).view(n, pool_size)
        else:
            index = th.randint(len(bank), (n, pool_size), dtype=th.int32)
        states_at_once = max(1, MAX_NOISES // pool_size)
        q = th.empty(n, pool_size)
        for i in tqdm(range(0, n, states_at_once), desc="stage 1: candidates", disable=not progress_bar):
            block = slice(i, i + states_at_once)
            q[block] = score(cond[block], _completed(steering, bank[index[block].long()]))
        return cls(cond, bank, index, q, n_candidates)

    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        state = th.randint(len(self.cond), (batch_size, 1))
        chosen = th.rand(batch_size, self.index.shape[1]).topk(self.n_candidates, dim=1).indices
        return self.cond[state[:, 0]], self.bank[self.index[state, chosen].long()], self.q[state, chosen]


def _completed(steering: Steering, steered: th.Tensor) -> th.Tensor:
    """All T entries of noises, as :meth:`Steering.choices` has them: alike within a state in what is not steered."""
    noise = steering.choices(len(steered), 1).repeat(1, steered.shape[1], 1, 1)
    if steering.contract.steer_mode == "shared":
        return steered.expand_as(noise)
    noise[:, :, steering.rows] = steered
    return noise


@dataclass
class WeightedCandidates:
    """Batches of candidates with the weights of AW-MLE."""

    candidates: Candidates
    settings: CandidateSettings

    def sample(self, batch_size: int) -> Batch:
        cond, w, q = self.candidates.sample(batch_size)
        settings = self.settings
        weights, advantages = candidate_weights(q, settings.beta, settings.tau, settings.normalize_advantages)
        scalars = {
            "stage1/effective_candidates": effective_number(weights),
            "stage1/q_spread": q.std(dim=1).mean(),
            "stage1/advantage_max": advantages.amax(dim=1).mean(),
        }
        return Batch(cond, w, weights, scalars)
