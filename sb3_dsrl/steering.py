"""What both forms of the wrapper share: the noise space, and the way from noise to chunk and from observation to features."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dsrl.noise_policy import NoisePolicy
from sb3_dsrl.observations import map_frames

SteerMode = Literal["full", "act_horizon", "shared"]


class NoiseSpace(spaces.Box):
    """
    The action space of a steered env: a Box of flow noise, symmetric and finite as SB3 demands.

    Two things set it apart from a Box. :meth:`sample` draws from the prior N(0, I), clipped to the bounds, so that the
    random warm-up of SAC and TQC is the base policy (a uniform sample would not be). And it carries the flow's
    fingerprint and the macro-step discount and compares them, so that SB3's own check of spaces in ``PPO.load`` and
    ``set_env`` refuses another flow.

    :param shape: (T, A), (H, A) or (1, A), see ``steer_mode``
    :param noise_bound: each entry lies in [-noise_bound, noise_bound]
    :param flow_hash: :meth:`NoisePolicy.fingerprint`
    :param macro_gamma: discount of one macro-step, ``gamma ** H``
    :param seed: of the space's own generator
    """

    def __init__(
        self, shape: tuple[int, int], noise_bound: float, flow_hash: str, macro_gamma: float, seed: int | None = None
    ) -> None:
        super().__init__(-noise_bound, noise_bound, shape, np.float32, seed=seed)
        self.noise_bound, self.flow_hash, self.macro_gamma = float(noise_bound), flow_hash, float(macro_gamma)

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """Draws from the prior N(0, I), clipped to the bounds."""
        return self.np_random.standard_normal(self.shape).clip(self.low, self.high).astype(np.float32)

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, NoiseSpace)
            and super().__eq__(other)
            and self.flow_hash == other.flow_hash
            and bool(np.isclose(self.macro_gamma, other.macro_gamma))
        )

    def __repr__(self) -> str:
        return (
            f"NoiseSpace(shape={self.shape}, noise_bound={self.noise_bound:g}, flow_hash={self.flow_hash}, "
            f"macro_gamma={self.macro_gamma:.6g})"
        )


def check_flow(flow: Any) -> None:
    """
    :raises TypeError: if this is not a flow, but the name of one, say
    """
    if not isinstance(flow, NoisePolicy):
        raise TypeError(
            f"flow must be a FlowPolicy or another NoisePolicy, found {type(flow).__name__}; "
            f"load one with FlowPolicy.from_pretrained(folder)"
        )


class Steering:
    """
    A frozen flow together with how its noise is presented to RL.

    :param flow: the policy that is steered; it is frozen
    :param gamma: discount per env step
    :param noise_bound: bound of the noise space; at 4 the clipping touches 6 in 100,000 entries of the prior
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry that is repeated T times: T times fewer dimensions to explore. The code of DSRL does so with
        the long chunks of pi0 (https://arxiv.org/abs/2506.15799). Its prior is not the flow's, so start narrow:
        ``log_std_init=math.log(0.3)``
    :param num_steps: decoding steps; None is the flow's own
    :param seed: of the generator of the tail
    :raises ValueError: if an argument is out of range
    """

    def __init__(
        self,
        flow: NoisePolicy,
        gamma: float = 0.99,
        noise_bound: float = 4.0,
        steer_mode: SteerMode = "full",
        num_steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        check_flow(flow)
        if not 0 < noise_bound < np.inf:
            raise ValueError(f"noise_bound must be positive and finite, found {noise_bound}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is the discount per env step and must lie in (0, 1], found {gamma}")
        if steer_mode not in ("full", "act_horizon", "shared"):
            raise ValueError(f"steer_mode must be 'full', 'act_horizon' or 'shared', found {steer_mode!r}")
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, found {num_steps}")
        self.flow = flow.freeze()
        self.gamma, self.macro_gamma = gamma, gamma**flow.act_horizon
        self.steer_mode, self.num_steps = steer_mode, num_steps
        # the entries of the noise that RL decides
        self.rows = slice(0, flow.pred_horizon)
        if steer_mode == "act_horizon":
            self.rows = slice(flow.action_offset, flow.action_offset + flow.act_horizon)
        elif steer_mode == "shared":
            self.rows = slice(0, 1)
        steered = self.rows.stop - self.rows.start
        self.observation_space = spaces.Box(-np.inf, np.inf, (flow.cond_dim,), np.float32)
        self.action_space = NoiseSpace((steered, flow.action_dim), noise_bound, flow.fingerprint(), self.macro_gamma)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """
        :param seed: of the generator that draws the unsteered tail of the noise
        """
        self._generator = th.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

    @th.no_grad()
    def encode(self, obs: Any) -> th.Tensor:
        """
        :param obs: stacked observations, (N, obs_horizon, D), arrays or tensors
        :return: features on the flow's device, (N, C)
        :raises ValueError: if they are NaN or infinite
        """
        features = self.flow.encode(obs)
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
        :param w: noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``
        :return: the part of the decoded chunks that is executed, (N, H, A)
        :raises ValueError: if the noise has another shape, or noise or chunks are NaN or infinite
        """
        expected = (len(features), *self.action_space.shape)
        if tuple(w.shape) != expected:
            raise ValueError(f"Noise must have shape (N, ...) = {expected}, found {tuple(w.shape)}")
        cond = th.as_tensor(features, device=self.flow.device)
        noise = self.full_noise(th.as_tensor(w, dtype=th.float32, device=self.flow.device))
        chunk = self.flow.executed(self.flow.decode(cond, noise, self.num_steps))
        if not (noise.isfinite().all() & chunk.isfinite().all()):  # one question to a GPU
            if not noise.isfinite().all():
                raise ValueError("The noise to decode is NaN or infinite: the policy that chose it has diverged")
            raise ValueError("The flow decodes finite noise to NaN or infinite values: its weights are damaged")
        return chunk

    def full_noise(self, w: th.Tensor) -> th.Tensor:
        """
        Completes steered noise to all T entries, with the prior or by repetition.

        :param w: (N, T, A), (N, H, A) or (N, 1, A)
        :return: (N, T, A)
        """
        if self.steer_mode == "shared":
            return w.expand(-1, self.flow.pred_horizon, -1)
        missing = self.flow.pred_horizon - w.shape[1]
        if missing == 0:
            return w
        rest = th.randn(len(w), missing, self.flow.action_dim, generator=self._generator).to(w)
        return th.cat([rest[:, : self.rows.start], w, rest[:, self.rows.start :]], dim=1)

    def prior(self, *batch: int, generator: th.Generator | None = None, device: th.device | str = "cpu") -> th.Tensor:
        """
        Draws N(0, I) for what is steered, completed to all T entries; :attr:`rows` are what is steered.

        :param batch: leading dimensions
        :param generator: None is torch's global one of the device
        :param device: where it is drawn
        :return: (*batch, T, A)
        """
        noise = th.randn(*batch, *self.flow.noise_shape, generator=generator, device=device)
        return noise[..., self.rows, :].expand_as(noise) if self.steer_mode == "shared" else noise

    def choices(self, n_states: int, n_noises: int, generator: th.Generator | None = None) -> th.Tensor:
        """
        Noises that RL could choose from in each state: within the bounds, and alike in what is not steered.

        :param n_states: S
        :param n_noises: M
        :param generator: None is torch's global one of the CPU
        :return: (S, M, T, A)
        """
        bound = self.action_space.noise_bound
        noise = self.prior(n_states, n_noises, generator=generator)
        steered = noise[:, :, self.rows].clamp(-bound, bound)
        if self.steer_mode == "shared":
            return steered.expand_as(noise)
        noise = noise[:, :1].repeat(1, n_noises, 1, 1)
        noise[:, :, self.rows] = steered
        return noise
