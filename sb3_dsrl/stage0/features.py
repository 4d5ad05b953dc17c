"""Demos in the features of a frozen policy: each observation is encoded once.

Letters in shapes: ``n`` samples, ``L`` env steps of an episode, ``H`` = act_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch as th

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.stage0.demos import Demos, chunk_transitions, frame_history
from sb3_dsrl.steering.contract import ignores_terminations


@dataclass
class FeatureTransitions:
    """
    SMDP transitions in the flow's features: what the critic is trained on.

    :param cond: (n, C)
    :param chunk: (n, H, A)
    :param reward: ``sum_{i<k} gamma^i r_i``, (n,)
    :param discount: ``gamma^k``, 0 after a termination, (n,)
    :param next_cond: (n, C)
    """

    cond: th.Tensor
    chunk: th.Tensor
    reward: th.Tensor
    discount: th.Tensor
    next_cond: th.Tensor

    def __len__(self) -> int:
        return len(self.cond)

    def __add__(self, other: FeatureTransitions) -> FeatureTransitions:
        return FeatureTransitions(*(th.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def to(self, device: th.device) -> FeatureTransitions:
        """The same transitions on another device."""
        return FeatureTransitions(*(value.to(device) for value in vars(self).values()))

    def __getitem__(self, index: th.Tensor) -> FeatureTransitions:
        return FeatureTransitions(*(value[index] for value in vars(self).values()))


@th.no_grad()
def encode_demos(flow: FlowLike, demos: Demos) -> Demos:
    """
    The same demos with features in place of observations, encoded once and one episode at a time.

    :param flow: its ``encode`` is used; a policy or its folder
    :param demos: the demos
    :return: demos whose ``obs`` are (L + 1, C)
    :raises ValueError: if demos and flow do not fit
    """
    flow = resolve_flow(flow)
    check_demos_fit(flow, demos)
    features = [flow.encode(frame_history(episode.read_obs(), flow.obs_horizon)) for episode in demos.episodes]
    episodes = [
        replace(episode, obs=cond.cpu().numpy(), images=None) for episode, cond in zip(demos.episodes, features, strict=True)
    ]
    return replace(demos, episodes=episodes)


def demo_transitions(
    flow: FlowLike,
    demos: Demos,
    ignore_terminations: bool | None = None,
    gamma: float | None = None,
    reward_scale: float | None = None,
) -> FeatureTransitions:
    """
    Chunk transitions of demos in the flow's features, with its horizons.

    :param flow: the policy, or its folder
    :param demos: the demos
    :param ignore_terminations: as in ManiSkill; the same as in stage 2. None is
        :func:`~sb3_dsrl.steering.contract.ignores_terminations` of the demos' reward mode
    :param gamma: discount per env step; None is the flow's
    :param reward_scale: factor on the rewards; None is the flow's
    :return: the transitions, on the flow's device
    :raises ValueError: if demos and flow do not fit, or the demos hold no rewards
    """
    flow, ignore_terminations = resolve_flow(flow), ignores_terminations(demos.reward_mode, ignore_terminations)
    gamma = flow.gamma if gamma is None else gamma
    reward_scale = flow.reward_scale if reward_scale is None else reward_scale
    raw = chunk_transitions(encode_demos(flow, demos), 1, flow.act_horizon, gamma, ignore_terminations, reward_scale)
    columns = (raw.obs[:, 0], raw.chunk, raw.reward, raw.discount, raw.next_obs[:, 0])
    return FeatureTransitions(*map(th.from_numpy, columns)).to(flow.device)


def check_demos_fit(flow: SteerablePolicy, demos: Demos) -> None:
    """
    :param flow: the policy
    :param demos: the demos
    :raises ValueError: if demos and flow differ in observation mode, shapes of observations, action size, control mode or
        env id; what one of them does not know differs from nothing
    """
    for what, found, expected in (
        ("obs_mode", demos.obs_mode, flow.obs_mode),
        ("the shape of an observation", demos.obs_shapes, flow.obs_shapes),
        ("action dimensions", demos.action_dim, flow.action_dim),
        ("control_mode", demos.control_mode, flow.control_mode),
        ("env_id", demos.env_id, flow.env_id),
    ):
        if None not in (expected, found) and found != expected:
            raise ValueError(f"{demos.path} does not fit the flow: {what} is {found!r} in the demos, {expected!r} in the flow")
