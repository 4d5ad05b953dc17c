"""Scores of noises by the chunks that they become."""

from __future__ import annotations

import torch as th

from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.steering.steering import Steering


def score_noises(
    steering: Steering, critic: EnsembleChunkCritic, cond: th.Tensor, w: th.Tensor, kappa: float = 1.0
) -> th.Tensor:
    """
    Scores noises by the chunks that they become.

    :param steering: the flow that decodes them
    :param critic: ensemble chunk critic
    :param cond: (B, C)
    :param w: (B, M, T, A)
    :param kappa: the score is mean - kappa * std over the ensemble
    :return: (B, M)
    """
    flow = steering.flow
    return critic.get_ucb_q(cond, flow.scored(flow.decode(cond, w, steering.contract.num_steps), critic), kappa)
