"""Candidates of stage 1: noises from the prior, decoded by the frozen flow, scored by the critic and weighted.

Letters in shapes: ``B`` batch, ``M`` candidates, ``T`` = pred_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch as th
from tqdm import tqdm

from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.steering.scores import score_noises
from sb3_dsrl.steering.steering import Steering


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


@dataclass
class FreshCandidates:
    """Batches of fresh candidates from the prior."""

    steering: Steering
    critic: EnsembleChunkCritic
    cond: th.Tensor
    n_candidates: int
    kappa: float

    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        cond = self.cond[th.randint(len(self.cond), (batch_size,))]
        w = self.steering.prior(batch_size, self.n_candidates, device=cond.device)
        return cond, w, score_noises(self.steering, self.critic, cond, w, self.kappa)


@dataclass
class PooledCandidates:
    """Batches of candidates from a pool: of each state, ``pool_size`` noises of the prior, decoded and scored once."""

    cond: th.Tensor
    pool: th.Tensor
    q: th.Tensor
    n_candidates: int

    @classmethod
    @th.no_grad()
    def build(
        cls,
        steering: Steering,
        critic: EnsembleChunkCritic,
        cond: th.Tensor,
        pool_size: int,
        n_candidates: int,
        kappa: float,
        progress_bar: bool,
        states_at_once: int = 64,
    ) -> PooledCandidates:
        pool = steering.prior(len(cond), pool_size, device=cond.device)
        starts = range(0, len(cond), states_at_once)
        q = [
            score_noises(steering, critic, cond[i : i + states_at_once], pool[i : i + states_at_once], kappa)
            for i in tqdm(starts, desc="stage 1: candidates", disable=not progress_bar)
        ]
        return cls(cond, pool, th.cat(q), n_candidates)

    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        index = th.randint(len(self.cond), (batch_size, 1))
        chosen = th.rand(batch_size, self.pool.shape[1]).topk(self.n_candidates, dim=1).indices
        return self.cond[index[:, 0]], self.pool[index, chosen], self.q[index, chosen]


@dataclass
class WeightedCandidates:
    """Batches of candidates with the weights of AW-MLE."""

    candidates: FreshCandidates | PooledCandidates
    rows: slice
    tau: float
    beta: float
    normalize: bool

    @th.no_grad()
    def sample(self, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        cond, w, q = self.candidates.sample(batch_size)
        weights, advantages = candidate_weights(q, self.beta, self.tau, self.normalize)
        scalars = {
            "stage1/effective_candidates": effective_number(weights),
            "stage1/q_spread": q.std(dim=1).mean(),
            "stage1/advantage_max": advantages.amax(dim=1).mean(),
        }
        return cond, w[:, :, self.rows], weights, scalars
