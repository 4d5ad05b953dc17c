"""What the critic of LatentSAC values: noise or chunks.

Letters in shapes: ``B`` batch, ``H`` = act_horizon, ``A`` action dim, ``C`` features, ``w`` noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch as th
from gymnasium import spaces
from torch.nn import functional as F

from sb3_dsrl.stage2.chunk_replay import ChunkSamples
from sb3_dsrl.stage2.sac_policy import LatentSACPolicy
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.observing import FEATURES
from sb3_dsrl.steering.steering import Steering

CriticName = Literal["noise", "action", "distilled"]


class Decoder:
    """
    From what an actor sees and chooses to the chunk that the env would get.

    :param steering: of the env
    :param observation_space: of the env
    :raises ValueError: if the observations do not hold the flow's features
    """

    def __init__(self, steering: Steering, observation_space: spaces.Space) -> None:
        self.steering = steering
        self._from_dict = isinstance(observation_space, spaces.Dict)
        part = observation_space[FEATURES] if self._from_dict and FEATURES in observation_space.spaces else observation_space  # type: ignore[attr-defined, index]
        if part != steering.observation_space:
            raise ValueError(
                f"A critic on actions decodes noise under the flow's features {steering.observation_space}, but the "
                f"observations are {observation_space}: make the env with obs='features' or 'both', or use critic='noise'"
            )
        self._high = th.as_tensor(steering.action_space.high)

    def __call__(self, obs: Any, actions: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """
        :param obs: features (B, C), or a dict with them
        :param actions: noise, and residual if there is one, in the box scaled to [-1, 1], flattened
        :param num_steps: decoding steps; None are those that are played
        :return: (B, H * A), with a gradient with respect to the actions
        """
        device = self.steering.flow.device
        cond = (obs[FEATURES] if self._from_dict else obs).to(device)
        action = actions.to(device).reshape(-1, *self._high.shape) * self._high.to(device)
        return self.steering.differentiable_chunk(cond, action, num_steps).flatten(1).to(actions.device)


class CriticKind(ABC):
    """What the critic values, and how the actor learns from it; see the subclasses."""

    #: whether it values chunks, so that those of demos count as well
    of_chunks: ClassVar[bool] = True
    #: whether the policy needs a second critic, on noise
    distils: ClassVar[bool] = False

    def space(self, action_space: NoiseSpace) -> spaces.Box:
        """
        :param action_space: of the steered env
        :return: what the critic takes beside the observation
        """
        return spaces.Box(-1.0, 1.0, (action_space.contract.act_horizon * action_space.shape[1],))

    def recorded(self, samples: ChunkSamples) -> th.Tensor:
        """
        :return: what was played, as the critic takes it
        """
        return samples.chunks

    def chosen(self, decoder: Decoder | None, obs: Any, actions: th.Tensor) -> th.Tensor:
        """
        :param decoder: None where nothing is decoded
        :param obs: of the policy
        :param actions: of the actor, in the box scaled to [-1, 1], flattened
        :return: what would be played, as the critic takes it
        """
        assert decoder is not None
        return decoder(obs, actions)

    @abstractmethod
    def actor_values(
        self, policy: LatentSACPolicy, decoder: Decoder | None, obs: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        """
        :return: values of the actor's actions, with their gradient, (B, 1) for each critic network
        """

    def distil(self, policy: LatentSACPolicy, decoder: Decoder | None, obs: Any, actions: th.Tensor) -> th.Tensor | None:
        """
        :return: loss of the critic on noise, or None if there is none
        """
        return None


@dataclass(frozen=True)
class NoiseCritic(CriticKind):
    """Q(s, w) on noise, as in the simplest form of DSRL (https://arxiv.org/abs/2506.15799): nothing is decoded for a loss."""

    of_chunks: ClassVar[bool] = False

    def space(self, action_space: NoiseSpace) -> spaces.Box:
        return action_space

    def recorded(self, samples: ChunkSamples) -> th.Tensor:
        return samples.actions

    def chosen(self, decoder: Decoder | None, obs: Any, actions: th.Tensor) -> th.Tensor:
        return actions

    def actor_values(
        self, policy: LatentSACPolicy, decoder: Decoder | None, obs: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        return policy.critic(obs, actions)


@dataclass(frozen=True)
class ActionCritic(CriticKind):
    """
    Q(s, chunk) on the chunks that were executed, by whomever; the actor's gradient goes through the frozen decode, as in
    latent policy steering (https://arxiv.org/abs/2603.05296).

    :param num_steps: decoding steps of the gradient, at most those that are played; 1 or 2 will do for a shortcut flow. None
        are those that are played. Targets are decoded as it is played.
    :raises ValueError: if it is below 1
    """

    num_steps: int | None = 2

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, found {self.num_steps}")

    def actor_values(
        self, policy: LatentSACPolicy, decoder: Decoder | None, obs: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        assert decoder is not None
        played = decoder.steering.contract.num_steps  # None is a decoder without steps
        fewer = played is not None and self.num_steps is not None and self.num_steps < played
        return policy.critic(obs, decoder(obs, actions, self.num_steps if fewer else None))


@dataclass(frozen=True)
class DistilledCritic(CriticKind):
    """
    Q(s, chunk) on the chunks that were executed, and a second critic Q(s, w) that imitates it under the decode. The actor
    learns from that one: DSRL with noise aliasing (https://arxiv.org/abs/2506.15799). Needs no gradient of the flow.

    It is distilled on half noises of the prior and half the actor's own.
    """

    distils: ClassVar[bool] = True

    def actor_values(
        self, policy: LatentSACPolicy, decoder: Decoder | None, obs: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        assert policy.noise_critic is not None
        return policy.noise_critic(obs, actions)

    def distil(self, policy: LatentSACPolicy, decoder: Decoder | None, obs: Any, actions: th.Tensor) -> th.Tensor | None:
        assert decoder is not None and policy.noise_critic is not None
        actions = actions.detach().clone()
        rows = slice(0, len(actions), 2)
        actions[rows] = policy.prior(len(actions[rows]))
        with th.no_grad():
            values = policy.critic(obs, decoder(obs, actions))
        pairs = zip(policy.noise_critic(obs, actions), values, strict=True)
        return 0.5 * sum((F.mse_loss(imitated, value) for imitated, value in pairs), start=actions.new_zeros(()))


KINDS: dict[str, type[CriticKind]] = dict(noise=NoiseCritic, action=ActionCritic, distilled=DistilledCritic)


def critic_kind(critic: CriticName | CriticKind) -> CriticKind:
    """
    :param critic: a name, for the defaults, or the thing itself
    :raises ValueError: if there is no such critic
    """
    if isinstance(critic, CriticKind):
        return critic
    if not isinstance(critic, str) or critic not in KINDS:
        raise ValueError(f"critic must be one of {', '.join(map(repr, KINDS))}, or an object of these, found {critic!r}")
    return KINDS[critic]()
