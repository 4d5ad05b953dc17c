"""Actions in the units of a flow: its noise has std 1, the actions of delta controllers have 0.08 to 0.4."""

from __future__ import annotations

import torch as th

from sb3_dsrl.policies.networks import Network

#: Floor of a dimension's scale, in the units of [-1, 1].
MIN_SCALE = 1e-2


class ActionNormalizer(Network):
    """
    Shifts and scales each dimension of an action, so that the network of a policy sees numbers of about unit size. Without it
    the error that is left in the network's output, which goes with the size of the noise, is large beside the action.

    The statistics are fitted once and saved with the weights. Until then this is the identity.

    :param action_dim: A
    """

    offset: th.Tensor
    scale: th.Tensor

    def __init__(self, action_dim: int) -> None:
        super().__init__(action_dim=action_dim)
        self.register_buffer("offset", th.zeros(action_dim))
        self.register_buffer("scale", th.ones(action_dim))

    @property
    def needs_fit(self) -> bool:
        """Whether it was never fitted."""
        return not self.offset.any() and bool((self.scale == 1).all())

    def fit_moments(self, actions: th.Tensor, min_scale: float = MIN_SCALE) -> None:
        """
        Mean 0 and standard deviation 1, which are those of the noise.

        :param actions: of demos, (n, A)
        :param min_scale: floor of the scale, in the units of [-1, 1]: a dimension that is constant in the demos, as that of
            a gripper may be, stays within about this distance of its value
        """
        self._set(actions.mean(dim=0), actions.std(dim=0, unbiased=False), min_scale)

    def fit_range(self, actions: th.Tensor, min_scale: float = MIN_SCALE) -> None:
        """
        From the smallest to the largest action is [-1, 1], for decoders that clip to that.

        :param actions: of demos, (n, A)
        :param min_scale: floor of the scale, as in :meth:`fit_moments`
        """
        low, high = actions.aminmax(dim=0)
        self._set((low + high) / 2, (high - low) / 2, min_scale)

    def _set(self, offset: th.Tensor, scale: th.Tensor, min_scale: float) -> None:
        self.offset.copy_(offset)
        self.scale.copy_(scale.clamp_min(min_scale))

    def forward(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: of the env, (..., A)
        :return: in the network's units
        """
        return (actions - self.offset) / self.scale

    def undo(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: in the network's units, (..., A)
        :return: actions of the env, not clipped
        """
        return self.offset + self.scale * x
