"""Where a latent policy starts from: close around the best that costs nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sb3_dsrl.evaluation.choice import PolicyChoice
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.evaluation.steerability_report import SteerabilityReport
from sb3_dsrl.evaluation.tickets import Ticket
from sb3_dsrl.policies.base import SteerablePolicy

#: Std of a policy that starts from a free control. A wide one destroys what it starts from while it plays.
START_STD = 0.2


def start_around(found: SteerabilityReport | PolicyChoice | Ticket | Actor, std: float = START_STD) -> dict[str, Any]:
    """
    ``policy_kwargs`` of a :class:`~sb3_dsrl.LatentPolicy` that starts close around a free control, w = 0 or a fixed noise, and
    explores from there outward::

        report = steerability(flow, env)
        model = PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=start_around(report)))

    :param found: a report of steerability, whose more successful control is taken (w = 0 between equals, which needs no luck);
        a choice, whose policy is taken; a ticket; or a control itself. For the prior, or a flow, it is the prior: std 1.
    :param std: standard deviation around the control, 1 is the prior's
    :return: ``centre`` (not for w = 0), ``log_std_init`` and ``prior_mix``
    :raises ValueError: if the std is not positive, or what was found is a policy that was learned, which is a start already
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, found {std}")
    actor: Any = found
    if isinstance(found, SteerabilityReport):
        actor = found.search.w if found.ticket.success_at_end > found.zero.success_at_end else "zero"
    elif isinstance(found, PolicyChoice):
        actor = found.actor
    elif isinstance(found, Ticket):
        actor = found.w
    narrow: dict[str, Any] = dict(log_std_init=math.log(std), prior_mix=0.0)
    if isinstance(actor, np.ndarray):
        return dict(centre=actor) | narrow
    if isinstance(actor, str) and actor == "zero":
        return narrow
    if isinstance(actor, SteerablePolicy) or (isinstance(actor, str) and actor == "prior"):
        return dict(log_std_init=0.0, prior_mix=0.0)
    what = repr(actor) if isinstance(actor, str) else type(actor).__name__
    raise ValueError(f"start_around starts from a free control, found {what}: a learned policy is copied with copy_into")
