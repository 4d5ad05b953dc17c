"""Noises that a search tried in the simulator, weighted by their scores.

Letters in shapes: ``S`` searched states, ``B`` batch, ``M`` candidates, ``T`` = pred_horizon, ``A`` action dim,
``C`` features.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from sb3_dsrl.evaluation.search_result import SearchResult
from sb3_dsrl.stage1.aw_mle import Batch, aw_mle_loss
from sb3_dsrl.stage1.candidates import effective_number
from sb3_dsrl.stage1.settings import SearchedSettings
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.steering.steering import Steering


def searched_weights(scores: th.Tensor, beta: float = 0.5, normalize: bool = True) -> th.Tensor:
    """
    Softmax weights of candidates by their advantage over the mean of their state.

    :param scores: (S, M)
    :param beta: temperature of the weights
    :param normalize: divide advantages by their standard deviation over all states. Not over each state: where all noises
        are as good, the differences are chance, and the weights must stay uniform.
    :return: (S, M), which sum to 1 in each state
    """
    advantages = scores - scores.mean(dim=1, keepdim=True)
    scale = advantages.std(unbiased=False).clamp_min(1e-8) if normalize else 1.0
    return th.softmax(advantages / scale / beta, dim=1)


@dataclass
class SearchedNoise:
    """
    Batches of searched states, with all their candidates and the weights of these.

    :param cond: features, (S, C)
    :param w: the steered part of the noises, (S, M, T, A), (S, M, H, A) or (S, M, 1, A)
    :param weights: (S, M)
    """

    cond: th.Tensor
    w: th.Tensor
    weights: th.Tensor

    @classmethod
    def of(cls, search: SearchResult, steering: Steering, settings: SearchedSettings) -> SearchedNoise:
        """
        :param search: of whole episodes
        :param steering: says which part of the noise is learned
        :param settings: of the weights
        """
        weights = searched_weights(search.scores, settings.beta, settings.normalize_advantages)
        return cls(search.cond, steering.steered_part(search.w), weights)

    def __len__(self) -> int:
        return len(self.cond)

    def split(self, held_out: th.Tensor) -> tuple[SearchedNoise, SearchedNoise]:
        """
        :param held_out: which states are held out, (S,)
        :return: those that are learned from, and those that are not
        """
        parts = [SearchedNoise(self.cond[mask], self.w[mask], self.weights[mask]) for mask in (~held_out, held_out)]
        return parts[0], parts[1]

    def sample(self, batch_size: int) -> Batch:
        """
        :param batch_size: states
        """
        index = th.randint(len(self.cond), (batch_size,))
        weights = self.weights[index]
        return Batch(self.cond[index], self.w[index], weights, {"stage1/effective_candidates": effective_number(weights)})


class BestOnHeldOut:
    """
    The policy that had the lowest loss on searched states that it does not learn from: it does not matter then whether the
    iterations are too many.

    :param policy: that is trained
    :param noise: the states that are held out
    :param kl_coef: of the loss
    :param every: iterations between two looks
    """

    def __init__(self, policy: LatentPolicy, noise: SearchedNoise, kl_coef: float, every: int = 25) -> None:
        self.policy, self.noise, self.kl_coef, self.every = policy, noise, kl_coef, every
        self.iterations, self.loss, self.best = 0, float("inf"), deepcopy(policy.state_dict())
        self.look(0, policy)

    @th.no_grad()
    def look(self, done: int, policy: LatentPolicy) -> None:
        """
        :param done: iterations
        :param policy: as it is after them
        """
        if done % self.every:
            return
        cond, w, weights = (x.to(policy.device) for x in (self.noise.cond, self.noise.w, self.noise.weights))
        loss = float(aw_mle_loss(policy, cond, w, weights, self.kl_coef))
        if loss < self.loss:
            self.iterations, self.loss, self.best = done, loss, deepcopy(policy.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return dict(iterations=self.iterations, loss=self.loss, best=self.best)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        :param state_dict: of :meth:`state_dict`
        """
        self.iterations, self.loss, self.best = (state_dict[name] for name in ("iterations", "loss", "best"))


def held_out_states(episode: np.ndarray, share: float) -> th.Tensor:
    """
    Whole episodes, drawn from torch's global generator.

    :param episode: of each state, (S,)
    :param share: of the episodes; 0 holds none out
    :return: (S,)
    :raises ValueError: if there are too few episodes
    """
    known = np.unique(episode)
    n = round(share * len(known))
    if share and not 0 < n < len(known):
        raise ValueError(
            f"held_out={share} of {len(known)} searched episodes leaves nothing to learn from or nothing to look at: search "
            f"more episodes, or pass held_out=0"
        )
    chosen = known[th.randperm(len(known))[:n].numpy()]
    return th.from_numpy(np.isin(episode, chosen))
