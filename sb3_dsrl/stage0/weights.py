"""Exponential weights of samples."""

from __future__ import annotations

import numpy as np
import torch as th


def exp_weights(scores: th.Tensor, max_weight: float) -> th.Tensor:
    """
    Exponential weights of AWAC and AWR, clipped from above and then normalised to mean 1.

    :param scores: advantages divided by their temperature, any shape
    :param max_weight: clip
    :return: the weights, same shape
    """
    weights = scores.clamp_max(np.log(max_weight)).exp()
    return weights / weights.mean()
