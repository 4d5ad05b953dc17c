"""The action space of a steered env."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_dsrl.steering.contract import PLAYING, REWARDS, Contract


class NoiseSpace(spaces.Box):
    """
    The action space of a steered env: a Box of flow noise, symmetric and finite as SB3 demands.

    Two things set it apart from a Box. :meth:`sample` draws from the prior N(0, I), clipped to the bounds, so that the
    random warm-up of SAC and TQC is the base policy (a uniform sample would not be). And it carries the contract and compares
    it, so that SB3's own check of spaces in ``PPO.load`` and ``set_env`` refuses another flow, discount or reward. Only the
    number of decoding steps may change: a trained policy may be moved to a cheaper decode of the same flow.

    :param shape: (T, A), (H, A) or (1, A), see ``steer_mode``
    :param contract: what the env promises
    :param seed: of the space's own generator
    """

    def __init__(self, shape: tuple[int, int], contract: Contract, seed: int | None = None) -> None:
        super().__init__(-contract.noise_bound, contract.noise_bound, shape, np.float32, seed=seed)
        self.contract = contract

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """Draws from the prior N(0, I), clipped to the bounds."""
        return self.np_random.standard_normal(self.shape).clip(self.low, self.high).astype(np.float32)

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, NoiseSpace)
            and super().__eq__(other)
            and not self.contract.differences(other.contract, (*PLAYING, *REWARDS))
        )

    def __repr__(self) -> str:
        return f"NoiseSpace(shape={self.shape}, {self.contract})"
