"""What flow, env, rollouts and latent policy must agree on, in one place.

Letters in shapes: ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``w`` noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sb3_dsrl.policies.base import SteerablePolicy

SteerMode = Literal["full", "act_horizon", "shared"]

#: What decides which chunk an action of RL becomes.
PLAYING = ("flow_hash", "act_horizon", "steer_mode", "noise_bound", "residual_scale")

#: What decides which value a chunk has.
REWARDS = ("gamma", "reward_scale", "reward_mode", "ignore_terminations")

EVERYTHING = (*PLAYING, *REWARDS, "num_steps")


def ignores_terminations(reward_mode: str | None, asked: bool | None = None) -> bool:
    """
    The one default of ``ignore_terminations``: go on after success under a dense reward of ManiSkill, stop everywhere else.
    A dense reward that ends at success pays for stalling.

    :param reward_mode: ManiSkill reward mode; None for other envs
    :param asked: what was asked for; None is the default
    """
    return asked if asked is not None else reward_mode in ("dense", "normalized_dense")


@dataclass(frozen=True)
class Contract:
    """
    What must be the same wherever noise is steered: the env builds it, its action space carries it (so SB3 saves it with the
    model), rollouts and latent policies keep it.

    :param flow_hash: :meth:`SteerablePolicy.fingerprint` of the flow that is steered
    :param act_horizon: H, env steps of each chunk that are executed
    :param gamma: discount per env step
    :param num_steps: decoding steps; None is a decoder without steps
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry that is repeated T times: T times fewer dimensions to explore. The code of Diffusion Steering via
        RL (https://arxiv.org/abs/2506.15799) does so with the long chunks of pi0. Its prior is not the flow's, so start
        narrow.
    :param noise_bound: each entry of w lies in [-noise_bound, noise_bound]; at 4 the clipping touches 6 in 100,000 entries of
        the prior
    :param reward_scale: factor on the macro reward
    :param reward_mode: ManiSkill reward mode; None if it is unknown
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit; None if there is no env
    :param residual_scale: what RL adds to the decoded chunk, at most, in the units of its actions, [-1, 1]; 0 is nothing: RL
        decides the noise alone. See :class:`~sb3_dsrl.NoiseSpace`.
    :raises ValueError: if one of them is out of range
    """

    flow_hash: str
    act_horizon: int
    gamma: float
    num_steps: int | None = None
    steer_mode: SteerMode = "full"
    noise_bound: float = 4.0
    reward_scale: float = 1.0
    reward_mode: str | None = None
    ignore_terminations: bool | None = None
    residual_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.act_horizon < 1:
            raise ValueError(f"act_horizon must be at least 1, found {self.act_horizon}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma is the discount per env step and must lie in (0, 1], found {self.gamma}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, found {self.num_steps}")
        if self.steer_mode not in ("full", "act_horizon", "shared"):
            raise ValueError(f"steer_mode must be 'full', 'act_horizon' or 'shared', found {self.steer_mode!r}")
        if not 0 < self.noise_bound < math.inf:
            raise ValueError(f"noise_bound must be positive and finite, found {self.noise_bound}")
        if not 0 <= self.residual_scale < math.inf:
            raise ValueError(f"residual_scale must be 0 or positive, and finite, found {self.residual_scale}")

    @classmethod
    def of(cls, flow: SteerablePolicy, **settings: Any) -> Contract:
        """
        The contract of a flow; what is not given, or given as None, is the flow's own, or the default.

        :param flow: the policy that is steered
        :param settings: fields of the contract
        """
        own: dict[str, Any] = dict(
            flow_hash=flow.fingerprint(),
            act_horizon=flow.act_horizon,
            gamma=flow.gamma,
            num_steps=flow.num_steps,
            reward_scale=flow.reward_scale,
        )
        return cls(**(own | {name: value for name, value in settings.items() if value is not None}))

    @property
    def macro_gamma(self) -> float:
        """Discount of one macro-step, ``gamma ** H``."""
        return self.gamma**self.act_horizon

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``Contract(**values)`` is the way back."""
        return asdict(self)

    def differences(self, other: Contract, names: Sequence[str] = EVERYTHING) -> list[str]:
        """
        :param other: to compare with
        :param names: fields that count; None on either side means unknown, which differs from nothing
        :return: names of the fields that differ
        """
        return [name for name in names if not _agree(getattr(self, name), getattr(other, name))]

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))


def check_agreement(
    who: str,
    found: Contract,
    other: str,
    expected: Contract,
    names: Sequence[str] = EVERYTHING,
) -> None:
    """
    :param who: whose contract is checked, such as "rollouts"
    :param found: their contract
    :param other: whose contract it must fit, such as "env"
    :param expected: that contract
    :param names: fields that must agree
    :raises ValueError: if they differ, with a sentence for each difference
    """
    sentences = [
        f"The {who} {_HAVE[who[-1] == 's']} {_NAMES.get(name, name)}={getattr(found, name)!r}, but the {other} has "
        f"{getattr(expected, name)!r}."
        for name in found.differences(expected, names)
    ]
    if sentences:
        raise ValueError(" ".join(sentences))


def check_act_horizon(flow: SteerablePolicy, contract: Contract) -> None:
    """
    :param flow: the flow that the env should steer
    :param contract: of the env
    :raises ValueError: if the env executes another number of steps of each chunk
    """
    if contract.act_horizon != flow.act_horizon:
        raise ValueError(
            f"The env executes {contract.act_horizon} steps of each chunk (act_horizon), but the flow {flow.act_horizon}: "
            f"pass flow.with_act_horizon({contract.act_horizon})"
        )


_HAVE = {True: "have", False: "has"}
_NAMES = {"flow_hash": "flow"}


def _agree(ours: Any, theirs: Any) -> bool:
    if ours is None or theirs is None:
        return True
    if isinstance(ours, float) or isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs
