"""
Noises that RL could choose to execute given chunks.

Letters in shapes: ``n`` chunks, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch as th
from tqdm import tqdm

from sb3_dsrl.policies.action_normalizer import MIN_SCALE
from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.policies.inversion import root_mean_square
from sb3_dsrl.steering.steering import Steering

#: Chunks between two updates of the progress bar.
BLOCK = 256


@dataclass(frozen=True)
class ExecutableNoise:
    """
    :param w: noises within the bounds, (n, T, A), on the CPU
    :param error: how far what they execute is from the chunks: root mean square difference, in standard deviations of the
        actions, (n,)
    :param norm: root mean square entry of the noise, before it was brought within the bounds, (n,)
    """

    w: th.Tensor
    error: th.Tensor
    norm: th.Tensor


def can_invert(steering: Steering) -> bool:
    """
    :param steering: a flow, and how its noise is steered
    :return: whether :func:`invert_executed` works: it needs ``flow.invert``, and RL must decide the whole noise
    """
    return isinstance(steering.flow, FlowPolicy) and steering.contract.steer_mode == "full"


@th.no_grad()
def invert_executed(
    steering: Steering, cond: th.Tensor, chunk: th.Tensor, actions: np.ndarray, progress_bar: bool = False
) -> ExecutableNoise:
    """
    Of each chunk the noise that executes it, as nearly as the flow, its decode and the bounds of the noise allow. The tail of
    a chunk, which is not executed, may be anything.

    :param steering: a flow, and how its noise is steered
    :param cond: (n, C)
    :param chunk: (n, H, A)
    :param actions: (m, A), whose standard deviation is the unit of the error
    :param progress_bar: show a progress bar
    :raises ValueError: if this flow or this noise cannot be inverted
    """
    flow, contract = steering.flow, steering.contract
    if not isinstance(flow, FlowPolicy):
        raise ValueError(f"Noise can be found for the chunks of a FlowPolicy, which has invert(); found {type(flow).__name__}")
    if contract.steer_mode != "full":
        raise ValueError(f"Noise can be found for chunks where all of it is steered (steer_mode='full'), found {contract}")
    std = th.as_tensor(actions.std(axis=0).clip(min=MIN_SCALE), device=flow.device)
    parts = []
    blocks = list(zip(cond.split(BLOCK), chunk.split(BLOCK), strict=True))
    for c, wanted in tqdm(blocks, desc="inverting chunks", disable=not progress_bar):
        c, wanted = c.to(flow.device), wanted.to(flow.device)
        found = flow.invert(c, wanted, contract.num_steps)
        w = found.noise.clamp(-contract.noise_bound, contract.noise_bound)
        executed = flow.executed(flow.decode(c, w, contract.num_steps))
        parts.append((w.cpu(), root_mean_square((executed - wanted) / std).cpu(), found.norm.cpu()))
    return ExecutableNoise(*(th.cat(column) for column in zip(*parts, strict=True)))
