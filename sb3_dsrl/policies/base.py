"""What a policy must have to be steered."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th
from torch import nn

from sb3_dsrl.policies.encoders import FrameShapes
from sb3_dsrl.policies.fingerprint import digest, probe, state_of
from sb3_dsrl.policies.networks import EnsembleChunkCritic

Self = TypeVar("Self", bound="SteerablePolicy")


class SteerablePolicy(nn.Module, ABC):
    """
    Base class of policies that turn noise into action chunks, always the same noise into the same chunk. A subclass with
    :meth:`encode` and :meth:`decode` can be steered; with a critic, stage 1 can also score candidates.
    All arguments go by name.

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
    :raises TypeError: if ``obs_shapes`` or ``noise_shape`` are no shapes
    :raises ValueError: if the horizons do not fit each other or gamma is out of range
    """

    #: steps of :meth:`decode`, unless it is asked for another number; None is a decoder without steps
    num_steps: int | None = None

    def __init__(
        self,
        *,
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
        check_frame_shapes(obs_shapes)
        if not (_is_shape(noise_shape) and len(noise_shape) == 2):
            raise TypeError(f"noise_shape must be the shape (T, A) of one noise, found {noise_shape!r}")
        self.pred_horizon, self.action_dim = noise_shape
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is the discount per env step and must lie in (0, 1], found {gamma}")
        if action_offset < 0:
            raise ValueError(f"action_offset must be >= 0, found {action_offset}")
        self.obs_shapes, self.obs_horizon, self.cond_dim = obs_shapes, obs_horizon, cond_dim
        self.action_offset, self.act_horizon = action_offset, act_horizon
        self._check_act_horizon()
        self.critic = critic
        self.env_id, self.obs_mode, self.control_mode = env_id, obs_mode, control_mode
        self.gamma, self.reward_scale = gamma, reward_scale
        self._fingerprint: tuple[Any, str] | None = None

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
        """Device that the weights or buffers are on; a policy without any is on the CPU."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return th.device("cpu") if tensor is None else tensor.device

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape (T, A) of one noise."""
        return (self.pred_horizon, self.action_dim)

    def with_act_horizon(self: Self, act_horizon: int) -> Self:
        """
        The same policy with another H. How many of the T actions are executed can be chosen after training: with fewer it
        reacts sooner, at the price of more decodes. Latent policies and rollouts of one H are refused with another, since a
        noise means something else there, and so is a critic that was trained for another H.

        :param act_horizon: H
        :return: a view with the same networks and critic; this policy stays as it is
        :raises ValueError: if the chunks are not that long
        """
        view = copy.copy(self)
        view._modules = self._modules.copy()  # a critic of its own that the view gets later is not the policy's
        view.act_horizon = act_horizon
        view._check_act_horizon()
        return view

    def _check_act_horizon(self) -> None:
        longest = self.pred_horizon - self.action_offset
        if not 1 <= self.act_horizon <= longest:
            raise ValueError(f"act_horizon must lie in 1..{longest} (pred_horizon - action_offset), found {self.act_horizon}")

    def check_critic(self, critic: EnsembleChunkCritic) -> None:
        """
        :param critic: ensemble chunk critic
        :raises ValueError: if it scores chunks of another length than what is executed
        """
        if critic.act_horizon != self.act_horizon:
            raise ValueError(
                f"The critic scores chunks of {critic.act_horizon} actions, but {self.act_horizon} of each chunk are "
                f"executed: train one for act_horizon={self.act_horizon} (EnsembleChunkCritic, train_critic)"
            )

    def executed(self, chunk: th.Tensor) -> th.Tensor:
        """
        The part of a chunk that is sent to the env. This slice convention exists nowhere else.

        :param chunk: (..., T, A)
        :return: (..., H, A)
        """
        return chunk[..., self.action_offset : self.action_offset + self.act_horizon, :]

    def scored(self, chunk: th.Tensor, critic: EnsembleChunkCritic) -> th.Tensor:
        """
        The part of a chunk that a critic scores: what is executed, unless the critic says where its part begins.

        :param chunk: (..., T, A)
        :param critic: ensemble chunk critic
        :return: (..., H, A)
        :raises ValueError: if the critic is for another H
        """
        self.check_critic(critic)
        begin = self.action_offset if critic.first_action is None else critic.first_action
        return chunk[..., begin : begin + critic.act_horizon, :]

    @th.no_grad()
    def sample(self, obs: Any, num_steps: int | None = None) -> th.Tensor:
        """
        Chunks of the unsteered policy: decodes fresh noise w ~ N(0, I).

        :param obs: (B, obs_horizon, D), or a dict of such
        :param num_steps: see :meth:`decode`
        :return: (B, T, A)
        """
        cond = th.as_tensor(self.encode(obs))  # a user's policy may compute in NumPy
        return th.as_tensor(self.decode(cond, th.randn(len(cond), *self.noise_shape, device=cond.device), num_steps))

    def freeze(self: Self) -> Self:
        """Evaluation mode and no gradients, for good. Returns the policy itself."""
        return self.eval().requires_grad_(False)

    def _apply(self: Self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> Self:
        self._fingerprint = None  # other weights may come to lie where these were
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See ``torch.nn.Module.load_state_dict``."""
        self._fingerprint = None
        return super().load_state_dict(*args, **kwargs)

    def fingerprint(self) -> str:
        """
        Hash of what makes a policy this policy: weights and horizons. The number of decoding steps is not part of it, so
        that a latent policy may be moved to a cheaper decode of the same flow. The critic is not part of it, since steering
        does not run it. A policy without weights is told from others by its class and by what it makes of a fixed input.

        Weights are hashed once, and again when torch knows that they were written to or replaced; writing into ``.data``
        goes unnoticed.

        :return: 16 hexadecimal digits
        :raises ValueError: if a policy without weights fails on that input
        """
        about = repr((self.noise_shape, self.act_horizon, self.obs_horizon, self.action_offset))
        weights = {key: value for key, value in self.state_dict().items() if not key.startswith("critic.")}
        if not weights:
            behaviour = probe(self.encode, self.decode, self.obs_shapes, self.obs_horizon, self.cond_dim, self.noise_shape)
            return digest(about + type(self).__qualname__, weights, behaviour)
        state = state_of(weights)
        key = (about, state)
        if state is None or self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = (key, digest(about, weights))
        return self._fingerprint[1]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, (tuple, list)) and all(isinstance(n, int) for n in shape)


def check_frame_shapes(obs_shapes: Any) -> None:
    """
    :raises TypeError: if these are no :data:`~sb3_dsrl.policies.encoders.FrameShapes`
    """
    shapes = list(obs_shapes.values()) if isinstance(obs_shapes, dict) else [obs_shapes]
    if not shapes or not all(map(_is_shape, shapes)):
        raise TypeError(
            f"obs_shapes must be the shape of one frame, such as (3,), or a dict of the shapes of its entries, "
            f"found {obs_shapes!r}"
        )
