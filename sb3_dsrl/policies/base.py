"""What a policy must have to be steered."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch as th
from torch import nn

from sb3_dsrl.policies.encoders import FrameShapes
from sb3_dsrl.policies.networks import EnsembleChunkCritic

Self = TypeVar("Self", bound="SteerablePolicy")


class SteerablePolicy(nn.Module, ABC):
    """
    Base class of policies that turn noise into action chunks, always the same noise into the same chunk. A subclass with
    :meth:`encode` and :meth:`decode` can be steered; with a critic, stage 1 can also score candidates.

    :param obs_shapes: shape of one frame of the flat observation, or of each entry of a dict observation
    :param obs_horizon: frames in an observation
    :param noise_shape: (T, A) of one noise; chunks have the same shape
    :param cond_dim: C
    :param act_horizon: H, env steps of each chunk that are executed
    :param action_offset: index of the chunk's entry that is the action for *now*; other than 0 in foreign policies only
    :param critic: ensemble chunk critic, or None
    :param env_id: environment that the demos came from
    :param obs_mode: ManiSkill observation mode
    :param control_mode: ManiSkill controller that the actions are for
    :param gamma: discount per env step that the critic was trained with
    :param reward_scale: factor on the rewards that the critic was trained with
    :raises ValueError: if the horizons do not fit each other or gamma is out of range
    """

    #: steps of :meth:`decode`, unless it is asked for another number
    num_steps: int = 1

    def __init__(
        self,
        obs_shapes: FrameShapes,
        obs_horizon: int,
        noise_shape: tuple[int, int],
        cond_dim: int,
        act_horizon: int,
        action_offset: int = 0,
        critic: EnsembleChunkCritic | None = None,
        env_id: str | None = None,
        obs_mode: str = "state",
        control_mode: str | None = None,
        gamma: float = 0.99,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.pred_horizon, self.action_dim = noise_shape
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is the discount per env step and must lie in (0, 1], found {gamma}")
        if action_offset < 0:
            raise ValueError(f"action_offset must be >= 0, found {action_offset}")
        if not 1 <= act_horizon <= self.pred_horizon - action_offset:
            raise ValueError(
                f"act_horizon must lie in 1..{self.pred_horizon - action_offset} (pred_horizon - action_offset), "
                f"found {act_horizon}"
            )
        self.obs_shapes, self.obs_horizon, self.cond_dim = obs_shapes, obs_horizon, cond_dim
        self.act_horizon, self.action_offset = act_horizon, action_offset
        self.critic = critic
        self.env_id, self.obs_mode, self.control_mode = env_id, obs_mode, control_mode
        self.gamma, self.reward_scale = gamma, reward_scale

    @abstractmethod
    def encode(self, obs: Any) -> th.Tensor:
        """
        Features of stacked observations: what decoding is conditioned on and what the latent policy sees.

        :param obs: (B, obs_horizon, D), or a dict of such arrays or tensors; oldest frame first
        :return: (B, C), on the policy's device
        """

    @abstractmethod
    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """
        From noise to chunk.

        :param cond: (B, C)
        :param w: noise, (B, T, A), or M noises for each observation, (B, M, T, A)
        :param num_steps: steps of an iterative decoder; None is the policy's own number
        :return: chunks of the shape of w, clipped to [-1, 1]
        """

    @property
    def device(self) -> th.device:
        """Device that the weights are on."""
        return next(self.parameters()).device

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape (T, A) of one noise."""
        return (self.pred_horizon, self.action_dim)

    def executed(self, chunk: th.Tensor) -> th.Tensor:
        """
        The part of a chunk that is sent to the env. This slice convention exists nowhere else.

        :param chunk: (..., T, A)
        :return: (..., H, A)
        """
        return chunk[..., self.action_offset : self.action_offset + self.act_horizon, :]

    @th.no_grad()
    def sample(self, obs: Any, num_steps: int | None = None) -> th.Tensor:
        """
        Chunks of the unsteered policy: decodes fresh noise w ~ N(0, I).

        :param obs: (B, obs_horizon, D), or a dict of such
        :param num_steps: see :meth:`decode`
        :return: (B, T, A)
        """
        cond = self.encode(obs)
        return self.decode(cond, th.randn(len(cond), *self.noise_shape, device=cond.device), num_steps)

    def freeze(self: Self) -> Self:
        """Evaluation mode and no gradients, for good. Returns the policy itself."""
        return self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """
        Hash of what makes a policy this policy: weights and horizons. The number of decoding steps is not part of it, so
        that a latent policy may be moved to a cheaper decode of the same flow. The critic is not part of it, since steering
        does not run it.

        :return: 16 hexadecimal digits
        """
        digest = hashlib.sha256(repr((self.noise_shape, self.act_horizon, self.obs_horizon, self.action_offset)).encode())
        for key, value in sorted(self.state_dict().items()):
            if not key.startswith("critic."):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
