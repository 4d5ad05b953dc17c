"""Adam with a learning-rate scale per parameter group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th


class AdamLrScale(th.optim.Adam):
    """
    Adam whose parameter groups may carry ``lr_scale``, a factor on the group's learning rate.

    SB3 writes one learning rate into *every* group at each update. The scale is applied inside :meth:`step`, so it
    survives that, and as a group entry it survives ``deepcopy``, ``state_dict`` and pickling (a step hook would not).
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """
        One optimiser step.

        :param closure: as in :class:`torch.optim.Adam`
        """
        base = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, base, strict=True):
            group["lr"] = lr * group.get("lr_scale", 1.0)
        try:
            return super().step(closure)
        finally:
            for group, lr in zip(self.param_groups, base, strict=True):
                group["lr"] = lr
