"""The action space of a steered env.

Letters in shapes: ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``w`` noise.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dsrl.steering.contract import PLAYING, REWARDS, Contract

Array = TypeVar("Array", np.ndarray, th.Tensor)


class NoiseSpace(spaces.Box):
    """
    The action space of a steered env: a Box of flow noise, symmetric and finite as SB3 demands.

    With a residual (``contract.residual_scale`` above 0) H rows more follow those of the noise: a residual chunk (H, A) in
    [-1, 1], which is multiplied with the scale and added to the decoded chunk. So an action is (T + H, A), and flattened its
    noise comes first. :meth:`split` and :meth:`join` know this layout, and nothing else does. (Residuals on top of steered
    noise are those of Residual Flow Steering, https://arxiv.org/abs/2602.01789; a small, bounded correction of a frozen
    policy is Policy Decorator's, https://arxiv.org/abs/2412.13630.)

    Two things set it apart from a Box. :meth:`sample` draws from the prior N(0, I), clipped to the bounds, with residual 0, so
    that the random warm-up of SAC and TQC is the base policy (a uniform sample would not be). And it carries the contract and
    compares it, so that SB3's own check of spaces in ``PPO.load`` and ``set_env`` refuses another flow, discount or reward.
    Only the number of decoding steps may change: a trained policy may be moved to a cheaper decode of the same flow.

    :param noise_shape: (T, A), (H, A) or (1, A), see ``steer_mode``
    :param contract: what the env promises
    :param seed: of the space's own generator
    """

    def __init__(self, noise_shape: tuple[int, int], contract: Contract, seed: int | None = None) -> None:
        rows, action_dim = noise_shape
        self.contract = contract
        bounds = np.repeat([contract.noise_bound, 1.0], [rows, self.residual_rows])[:, None]
        high = np.broadcast_to(bounds, (len(bounds), action_dim)).astype(np.float32)
        super().__init__(-high, high, dtype=np.float32, seed=seed)

    # Worked out, not kept: spaces in files of before know nothing of residuals.
    @property
    def residual_rows(self) -> int:
        """H, or 0 without a residual."""
        return self.contract.act_horizon if self.contract.residual_scale else 0

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the noise alone: (T, A), (H, A) or (1, A)."""
        rows, action_dim = self.shape
        return rows - self.residual_rows, action_dim

    def split(self, action: Array) -> tuple[Array, Array]:
        """
        :param action: of this space, with any leading dimensions
        :return: noise (..., T, A), (..., H, A) or (..., 1, A), and residual (..., H, A), or (..., 0, A) without one
        """
        rows = self.noise_shape[0]
        return action[..., :rows, :], action[..., rows:, :]

    def join(self, noise: Array, residual: Array | None = None) -> Array:
        """
        The way back from :meth:`split`.

        :param noise: (..., T, A), (..., H, A) or (..., 1, A)
        :param residual: (..., H, A), or (..., 0, A) without one; None is 0
        :return: action of this space, with the same leading dimensions
        """
        if isinstance(noise, th.Tensor):
            residual = noise.new_zeros(*noise.shape[:-2], *self._residual_shape) if residual is None else residual
            return th.cat([noise, residual], dim=-2)
        residual = np.zeros((*noise.shape[:-2], *self._residual_shape), noise.dtype) if residual is None else residual
        return np.concatenate([noise, residual], axis=-2)

    def clip(self, action: Array) -> Array:
        """
        :param action: of this space, with any leading dimensions
        :return: within the bounds
        """
        noise, residual = self.split(action)
        bound = self.contract.noise_bound
        return self.join(noise.clip(-bound, bound), residual.clip(-1.0, 1.0))

    @property
    def _residual_shape(self) -> tuple[int, int]:
        return self.residual_rows, self.shape[1]

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """Draws from the prior N(0, I), clipped to the bounds; the residual is 0."""
        return self.clip(self.join(self.np_random.standard_normal(self.noise_shape))).astype(np.float32)

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, NoiseSpace)
            and super().__eq__(other)
            and not self.contract.differences(other.contract, (*PLAYING, *REWARDS))
        )

    def __repr__(self) -> str:
        return f"NoiseSpace(shape={self.shape}, {self.contract})"
