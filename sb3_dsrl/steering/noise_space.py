"""The action space of a steered env."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces


class NoiseSpace(spaces.Box):
    """
    The action space of a steered env: a Box of flow noise, symmetric and finite as SB3 demands.

    Two things set it apart from a Box. :meth:`sample` draws from the prior N(0, I), clipped to the bounds, so that the
    random warm-up of SAC and TQC is the base policy (a uniform sample would not be). And it carries the flow's
    fingerprint and the macro-step discount and compares them, so that SB3's own check of spaces in ``PPO.load`` and
    ``set_env`` refuses another flow.

    :param shape: (T, A), (H, A) or (1, A), see ``steer_mode``
    :param noise_bound: each entry lies in [-noise_bound, noise_bound]
    :param flow_hash: :meth:`SteerablePolicy.fingerprint`
    :param macro_gamma: discount of one macro-step, ``gamma ** H``
    :param seed: of the space's own generator
    """

    def __init__(
        self, shape: tuple[int, int], noise_bound: float, flow_hash: str, macro_gamma: float, seed: int | None = None
    ) -> None:
        super().__init__(-noise_bound, noise_bound, shape, np.float32, seed=seed)
        self.noise_bound, self.flow_hash, self.macro_gamma = float(noise_bound), flow_hash, float(macro_gamma)

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """Draws from the prior N(0, I), clipped to the bounds."""
        return self.np_random.standard_normal(self.shape).clip(self.low, self.high).astype(np.float32)

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, NoiseSpace)
            and super().__eq__(other)
            and self.flow_hash == other.flow_hash
            and bool(np.isclose(self.macro_gamma, other.macro_gamma))
        )

    def __repr__(self) -> str:
        return (
            f"NoiseSpace(shape={self.shape}, noise_bound={self.noise_bound:g}, flow_hash={self.flow_hash}, "
            f"macro_gamma={self.macro_gamma:.6g})"
        )
