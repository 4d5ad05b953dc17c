"""Optimisers with a learning-rate scale per parameter group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike


class LrScale(th.optim.Optimizer):
    """
    Mixin: parameter groups may carry ``lr_scale``, a factor on the group's learning rate.

    SB3 writes one learning rate into *every* group at each update. The scale is applied inside :meth:`step`, so it
    survives that, and as a group entry it survives ``deepcopy``, ``state_dict`` and pickling (a step hook would not).
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """
        One optimiser step.

        :param closure: as in :class:`torch.optim.Optimizer`
        """
        base = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, base, strict=True):
            group["lr"] = lr * group.get("lr_scale", 1.0)
        try:
            return super().step(closure)
        finally:
            for group, lr in zip(self.param_groups, base, strict=True):
                group["lr"] = lr

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Takes a state over, but for the scales: they are ratios to the schedule that this optimiser was built with, and
        ``PPO.load(..., learning_rate=...)`` builds it with another one than was saved.

        :param state_dict: as in :class:`torch.optim.Optimizer`
        """
        scales = [group.get("lr_scale", 1.0) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, scale in zip(self.param_groups, scales, strict=True):
            group["lr_scale"] = scale


class AdamLrScale(LrScale, th.optim.Adam):
    """Adam, PPO's optimiser."""


class RMSpropLrScale(LrScale, th.optim.RMSprop):
    """RMSprop, as A2C may use it."""


class RMSpropTFLikeLrScale(LrScale, RMSpropTFLike):
    """SB3's RMSprop, as A2C uses it by default."""


#: The scaled form of the optimisers that SB3's on-policy algorithms choose.
SCALED: dict[type[th.optim.Optimizer], type[th.optim.Optimizer]] = {
    th.optim.Adam: AdamLrScale,
    th.optim.RMSprop: RMSpropLrScale,
    RMSpropTFLike: RMSpropTFLikeLrScale,
}
