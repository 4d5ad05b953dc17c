"""Can the noise make the flow do what the demos do?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch as th

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.stage0.demos import Demos, chunks_from_now
from sb3_dsrl.steering.inverting import can_invert, invert_executed
from sb3_dsrl.steering.steering import Steering


@dataclass(frozen=True)
class ChunkReach:
    """
    Chunks that a noise within the bounds executes: those of the demos, and beside them those that the flow executed in the
    base episodes, of which a noise is known to exist. What is missing of these is what the inversion did not find.

    :param chunks: of the demos, that were looked at
    :param tolerance: largest error of a chunk that counts as reached: root mean square difference of the actions, in standard
        deviations of the demos' actions
    :param demos: share of the demos' chunks that are reached
    :param own: share of the flow's own
    :param error: median error of the demos' chunks
    :param norm: mean of ``||w|| / sqrt(T * A)`` of the noises of the demos' chunks. What is above that of the flow's own is
        further from the prior than what the flow does by itself.
    :param own_norm: the same of the flow's own chunks
    """

    chunks: int
    tolerance: float
    demos: float
    own: float
    error: float
    norm: float
    own_norm: float

    def __str__(self) -> str:
        advice = "." if self.demos > 0.9 * self.own else ": noise alone cannot make the rest, a residual or more demos could."
        return (
            f"Demos: {self.demos:.2f} of {self.chunks} of their chunks are what the flow makes of some noise, to "
            f"{self.tolerance:g} of the std of their actions (of its own chunks {self.own:.2f}); those noises have norm "
            f"{self.norm:.2f} (its own {self.own_norm:.2f}){advice}"
        )


def chunk_reach(
    steering: Steering, rollouts: Rollouts, encoded: Demos, seed: int, n_chunks: int = 256, tolerance: float = 0.1
) -> ChunkReach | None:
    """
    :param steering: a flow, and how its noise is steered
    :param rollouts: base episodes
    :param encoded: demos in the features of the flow
    :param seed: of the choice of chunks
    :param n_chunks: that are looked at, at most, of either
    :param tolerance: see :class:`ChunkReach`
    :return: None if noise cannot be found for chunks: another policy than a FlowPolicy, or noise that is steered in part
    """
    if not can_invert(steering):
        return None
    generator = th.Generator().manual_seed(seed)
    horizon = steering.flow.act_horizon
    cond = np.concatenate([episode.obs[:-1] for episode in encoded.episodes])
    chunk = np.concatenate([chunks_from_now(episode, encoded.control_mode, horizon) for episode in encoded.episodes])
    found = []
    for features, chunks in ((th.from_numpy(cond), th.from_numpy(chunk)), (rollouts.cond, rollouts.chunk)):
        index = th.randperm(len(chunks), generator=generator)[:n_chunks]
        found.append(invert_executed(steering, features[index], chunks[index], encoded.actions()))
    of_demos, own = found
    return ChunkReach(
        chunks=len(of_demos.w),
        tolerance=tolerance,
        demos=float((of_demos.error <= tolerance).float().mean()),
        own=float((own.error <= tolerance).float().mean()),
        error=float(of_demos.error.median()),
        norm=float(of_demos.norm.mean()),
        own_norm=float(own.norm.mean()),
    )
