"""What a policy with a residual does without it: which part of its gain is the noise's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_dsrl.evaluation.play import HasLatent, Predictor
from sb3_dsrl.steering.noise_space import NoiseSpace


@dataclass(frozen=True)
class NoiseOnly:
    """
    An actor for :func:`~sb3_dsrl.evaluate`: the noise that a model chooses, with residual 0.

    :param model: a model or a policy for an env with a residual
    :param action_space: its own
    """

    model: Predictor
    action_space: NoiseSpace

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """
        :param observation: features, (N, C)
        :param deterministic: passed on
        :return: noise of the model and residual 0, (N, T + H, A), say; and the state that the model returned
        """
        action, state = self.model.predict(observation, deterministic=deterministic)
        return self.action_space.join(self.action_space.split(action)[0]), state


@dataclass(frozen=True)
class LatentNoiseOnly:
    """The same for a policy that holds a latent one."""

    latent: NoiseOnly


def without_residual(model: Predictor | HasLatent) -> NoiseOnly | LatentNoiseOnly:
    """
    A policy without its residual. ``evaluate`` of w = 0, of a ticket, of ``without_residual(model)`` and of ``model``, on the
    same episodes, tells what noise and residual contribute each::

        for name, actor in dict(zero="zero", noise=without_residual(model), both=model).items():
            print(evaluate(actor, env, name=name))

    The noise was learned beside the residual: trained alone it might do better.

    :param model: a model, a policy or a :class:`~sb3_dsrl.SteeredPolicy` that was made for an env with a residual
    :return: an actor for :func:`~sb3_dsrl.evaluate`, ``collect_rollouts`` and ``record_video``
    :raises ValueError: if it has no residual
    """
    if isinstance(model, HasLatent):
        inner = without_residual(model.latent)
        assert isinstance(inner, NoiseOnly)
        return LatentNoiseOnly(inner)
    space = getattr(model, "action_space", None)
    if not isinstance(space, NoiseSpace) or not space.residual_rows:
        raise ValueError(f"{type(model).__name__} has no residual, it acts in {space}: make its env with residual_scale=")
    return NoiseOnly(model, space)
