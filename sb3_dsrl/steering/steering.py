"""What both forms of the wrapper share: the way from noise and residual to chunk, and from observation to features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import CloudpickleWrapper

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.steering.chunks import clip_actions
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.utils.observations import map_frames


class Steering:
    """
    A frozen flow together with how its noise, and perhaps a residual, are presented to RL.

    :param flow: the policy that is steered, or its folder; it is frozen
    :param contract: which noise is steered, how it is decoded and what it is rewarded for; None is ``Contract.of(flow)``
    :param seed: of the generator that draws the unsteered tail of the noise
    :raises TypeError: if this is not a policy
    :raises ValueError: if the contract is of another flow
    """

    def __init__(self, flow: FlowLike, contract: Contract | None = None, seed: int | None = None) -> None:
        flow = self.flow = resolve_flow(flow).freeze()
        self.contract = contract or Contract.of(flow)
        if self.contract.flow_hash != flow.fingerprint():
            raise ValueError(f"The contract is of flow {self.contract.flow_hash}, but this is flow {flow.fingerprint()}")
        # the entries of the noise that RL decides
        self.rows = slice(0, flow.pred_horizon)
        if self.contract.steer_mode == "act_horizon":
            self.rows = slice(flow.action_offset, flow.action_offset + flow.act_horizon)
        elif self.contract.steer_mode == "shared":
            self.rows = slice(0, 1)
        steered = self.rows.stop - self.rows.start
        self.observation_space = spaces.Box(-np.inf, np.inf, (flow.cond_dim,), np.float32)
        self.action_space = NoiseSpace((steered, flow.action_dim), self.contract)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """
        :param seed: of the generator that draws the unsteered tail of the noise
        """
        self._generator = th.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

    def tail_state(self) -> np.ndarray:
        """
        :return: the state of the generator that draws the unsteered tail of the noise
        """
        return self._generator.get_state().numpy().copy()

    def set_tail_state(self, state: np.ndarray) -> None:
        """
        :param state: of :meth:`tail_state`: the same tails follow again
        """
        self._generator.set_state(th.from_numpy(state.copy()))

    # SubprocVecEnv's workers send this by plain pickle, which cannot name classes of ``__main__`` in another process.
    def __getstate__(self) -> CloudpickleWrapper:
        return CloudpickleWrapper(self.__dict__)

    def __setstate__(self, state: CloudpickleWrapper) -> None:
        self.__dict__.update(state.var)

    @th.no_grad()
    def encode(self, obs: Any) -> th.Tensor:
        """
        :param obs: stacked observations, (N, obs_horizon, D), arrays or tensors
        :return: features on the flow's device, (N, C)
        :raises ValueError: if they have another shape, or are NaN or infinite
        """
        features = th.as_tensor(self.flow.encode(obs), device=self.flow.device)
        expected = (len(next(iter(obs.values())) if isinstance(obs, dict) else obs), self.flow.cond_dim)
        if tuple(features.shape) != expected:
            raise ValueError(
                f"{type(self.flow).__name__}.encode must give features of shape (N, C) = {expected}, found "
                f"{tuple(features.shape)}"
            )
        features = features.float()
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            envs = (~finite).nonzero().flatten().tolist()
            seen = map_frames(lambda x: th.as_tensor(x)[envs].isfinite().all(), obs)
            if all(seen.values()) if isinstance(seen, dict) else seen:
                raise ValueError("The flow encodes finite observations as NaN or infinite values: its weights are damaged")
            raise ValueError(f"The observations of envs {envs} are NaN or infinite")
        return features

    @th.no_grad()
    def chunk(self, features: np.ndarray | th.Tensor, w: np.ndarray | th.Tensor) -> th.Tensor:
        """
        :param features: (N, C)
        :param w: noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``; with a residual the H rows of that follow, see
            :class:`~sb3_dsrl.NoiseSpace`
        :return: the part of the decoded chunks that is executed, (N, H, A); with a residual
            ``clip(decode(noise) + residual_scale * residual)``
        :raises ValueError: if the noise has another shape, or noise, residual or chunks are NaN or infinite
        """
        expected = (len(features), *self.action_space.shape)
        if tuple(w.shape) != expected:
            raise ValueError(f"{self._what} must have shape (N, ...) = {expected}, found {tuple(w.shape)}")
        cond = th.as_tensor(features, device=self.flow.device)
        steered, residual = self.action_space.split(th.as_tensor(w, dtype=th.float32, device=self.flow.device))
        noise = self.full_noise(steered.contiguous())  # as it is without a residual, to the last bit of a product
        decoded = th.as_tensor(self.flow.decode(cond, noise, self.contract.num_steps), device=self.flow.device)
        if decoded.shape != noise.shape:
            raise ValueError(
                f"{type(self.flow).__name__}.decode must give chunks of shape (N, T, A) = {tuple(noise.shape)}, found "
                f"{tuple(decoded.shape)}"
            )
        chunk = self.flow.executed(decoded.float())
        if not (noise.isfinite().all() & residual.isfinite().all() & chunk.isfinite().all()):  # one question to a GPU
            for part, values in (("noise to decode", noise), ("residual", residual)):
                if not values.isfinite().all():
                    raise ValueError(f"The {part} is NaN or infinite: the policy that chose it has diverged")
            raise ValueError("The flow decodes finite noise to NaN or infinite values: its weights are damaged")
        return self._corrected(chunk, residual)

    def differentiable_chunk(self, cond: th.Tensor, action: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """
        :meth:`chunk` with a gradient with respect to the action, for losses; nothing is checked but that there is one. The
        unsteered tail of the noise is drawn from torch's global generator.

        :param cond: features, (B, C), on the flow's device
        :param action: noise and residual, (B, ...) as in :meth:`chunk`, on the flow's device
        :param num_steps: decoding steps; None are those that are played
        :return: (B, H, A)
        :raises ValueError: if the flow decodes without a gradient
        """
        steered, residual = self.action_space.split(action)
        noise = self.full_noise(steered, th.default_generator)
        decoded = self.flow.decode(cond, noise, self.contract.num_steps if num_steps is None else num_steps)
        if th.is_grad_enabled() and noise.requires_grad and not decoded.requires_grad:
            raise ValueError(
                f"{type(self.flow).__name__}.decode gives no gradient with respect to the noise, which critic='action' needs: "
                f"compute it in torch and without no_grad, or use critic='distilled'"
            )
        return self._corrected(self.flow.executed(decoded), residual)

    def _corrected(self, chunk: th.Tensor, residual: th.Tensor) -> th.Tensor:
        return clip_actions(chunk + self.contract.residual_scale * residual) if self.contract.residual_scale else chunk

    @property
    def _what(self) -> str:
        return "Noise and residual" if self.contract.residual_scale else "Noise"

    def steered_part(self, w: th.Tensor) -> th.Tensor:
        """
        :param w: noise, (..., T, A), or its steered part already
        :return: the steered part, (..., T, A), (..., H, A) or (..., 1, A)
        """
        return w if w.shape[-2:] == self.action_space.noise_shape else w[..., self.rows, :]

    def full_noise(self, w: th.Tensor, generator: th.Generator | None = None) -> th.Tensor:
        """
        Completes steered noise to all T entries, with the prior or by repetition.

        :param w: (N, T, A), (N, H, A) or (N, 1, A)
        :param generator: draws the rest, on the CPU; None is the env's own
        :return: (N, T, A)
        """
        if self.contract.steer_mode == "shared":
            return w.expand(-1, self.flow.pred_horizon, -1)
        missing = self.flow.pred_horizon - w.shape[1]
        if missing == 0:
            return w
        rest = th.randn(len(w), missing, self.flow.action_dim, generator=generator or self._generator).to(w)
        return th.cat([rest[:, : self.rows.start], w, rest[:, self.rows.start :]], dim=1)

    def prior(self, *batch: int, generator: th.Generator | None = None, device: th.device | str = "cpu") -> th.Tensor:
        """
        Draws N(0, I) for what is steered, completed to all T entries; ``rows`` are what is steered.

        :param batch: leading dimensions
        :param generator: None is torch's global one of the device
        :param device: where it is drawn
        :return: ``(*batch, T, A)``
        """
        noise = th.randn(*batch, *self.flow.noise_shape, generator=generator, device=device)
        return noise[..., self.rows, :].expand_as(noise) if self.contract.steer_mode == "shared" else noise

    def choices(self, n_states: int, n_noises: int, generator: th.Generator | None = None) -> th.Tensor:
        """
        Noises that RL could choose from in each state: within the bounds, and alike in what is not steered.

        :param n_states: S
        :param n_noises: M
        :param generator: None is torch's global one of the CPU
        :return: (S, M, T, A)
        """
        bound = self.contract.noise_bound
        noise = self.prior(n_states, n_noises, generator=generator)
        steered = noise[:, :, self.rows].clamp(-bound, bound)
        if self.contract.steer_mode == "shared":
            return steered.expand_as(noise)
        noise = noise[:, :1].repeat(1, n_noises, 1, 1)
        noise[:, :, self.rows] = steered
        return noise


def check_env_fits(
    flow: SteerablePolicy,
    obs_space: spaces.Space,
    action_space: spaces.Space,
    env_id: str | None,
    control_mode: str | None,
    allow_other_task: bool = False,
) -> None:
    """
    :param flow: the policy that is steered
    :param obs_space: of the chunk env
    :param action_space: of the chunk env
    :param env_id: of the env; None if it has none
    :param control_mode: ManiSkill controller of the env; None if it has none
    :param allow_other_task: accept another env id than the flow's
    :raises ValueError: if flow and env differ in task, controller or shapes
    """
    if None not in (env_id, flow.env_id) and env_id != flow.env_id and not allow_other_task:
        raise ValueError(
            f"The flow was trained on {flow.env_id}, but the env is {env_id}; if that is meant, pass allow_other_task=True"
        )
    if None not in (control_mode, flow.control_mode) and control_mode != flow.control_mode:
        raise ValueError(f"The env has control_mode={control_mode!r}, but the flow's actions are for {flow.control_mode!r}")
    obs_shapes = map_frames(lambda space: space.shape, obs_space.spaces if isinstance(obs_space, spaces.Dict) else obs_space)
    for what, found, expected in (
        ("chunks have shape (H, A)", action_space.shape, (flow.act_horizon, flow.action_dim)),
        (
            "observations have shape (obs_horizon, ...)",
            obs_shapes,
            map_frames(lambda shape: (flow.obs_horizon, *shape), flow.obs_shapes),
        ),
    ):
        if found != expected:
            raise ValueError(f"The env does not fit the flow: its {what} = {found}, but the flow's are {expected}")


def to_numpy(x: th.Tensor | np.ndarray) -> np.ndarray:
    """A NumPy copy of a tensor on any device, or of an array."""
    return (x.cpu().numpy() if isinstance(x, th.Tensor) else x).copy()  # copied: what is handed out may be written to
