"""
A look at gamma before any of SB3's algorithms learns on a steered env.

SB3's default gamma of 0.99 is wrong for macro-steps of H env steps, and nothing else would show it. No part of SB3 that an
extension may supply (policy, env, callback) learns the algorithm's gamma whatever is trained on the env, so the one method
through which every ``learn`` goes is wrapped, once, at ``import sb3_dsrl``: ``BaseAlgorithm._setup_learn``. The wrapper looks,
warns and calls the original; where the action space is not that of a steered env it only calls it.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dsrl.steering.noise_space import NoiseSpace


def install_gamma_check() -> None:
    """Wraps ``BaseAlgorithm._setup_learn``. A second call does nothing."""
    original = BaseAlgorithm._setup_learn
    if getattr(original, "checks_gamma", False):
        return

    @functools.wraps(original)
    def _setup_learn(self: BaseAlgorithm, *args: Any, **kwargs: Any) -> Any:
        warn_about_gamma(self)
        return original(self, *args, **kwargs)

    _setup_learn.checks_gamma = True  # type: ignore[attr-defined]
    BaseAlgorithm._setup_learn = _setup_learn  # type: ignore[method-assign]


def warn_about_gamma(model: BaseAlgorithm) -> None:
    """
    Warns if a model, or the ``VecNormalize`` around its env that scales the rewards, discounts macro-steps with another
    gamma than its steered env does. Other envs are left alone.

    :param model: any of SB3's algorithms
    """
    space = model.action_space  # not find_steering: asking for what is not there ends the workers of SubprocVecEnv
    if not isinstance(space, NoiseSpace):
        return
    found = {type(model).__name__: getattr(model, "gamma", None)}
    normalize = model.get_vec_normalize_env()
    if normalize is not None and normalize.training and normalize.norm_reward:
        found["VecNormalize"] = normalize.gamma
    wrong = [
        f"{name} discounts with gamma={gamma}"
        for name, gamma in found.items()
        if gamma is not None and not np.isclose(gamma, space.contract.macro_gamma, rtol=1e-6)
    ]
    if wrong:
        warnings.warn(
            f"{' and '.join(wrong)} per macro-step, but the env's macro-step discount is {space.contract.macro_gamma:.6g}: "
            f"pass gamma=env.macro_gamma"
        )
