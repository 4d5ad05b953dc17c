"""Where tensors go."""

from __future__ import annotations

import torch as th


def get_device(device: th.device | str = "auto") -> th.device:
    """
    Stable-Baselines3's convention, for the rooms that know nothing of it.

    :param device: "auto" is a GPU where there is one
    """
    if device == "auto":
        return th.device("cuda" if th.cuda.is_available() else "cpu")
    return th.device(device)
