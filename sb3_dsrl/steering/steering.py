"""What both forms of the wrapper share: the way from noise to chunk and from observation to features."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import CloudpickleWrapper

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.utils.observations import map_frames

SteerMode = Literal["full", "act_horizon", "shared"]


def check_flow(flow: Any) -> None:
    """
    :raises TypeError: if this is not a flow, but the name of one, say
    """
    if not isinstance(flow, SteerablePolicy):
        raise TypeError(
            f"flow must be a FlowPolicy or another SteerablePolicy, found {type(flow).__name__}; "
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
        flow: SteerablePolicy,
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


def check_env_fits(
    flow: SteerablePolicy, obs_space: spaces.Space, action_space: spaces.Space, env_id: str | None, control_mode: str | None
) -> None:
    if None not in (env_id, flow.env_id) and env_id != flow.env_id:
        raise ValueError(
            f"The flow was trained on {flow.env_id}, but the env is {env_id}; if that is meant, set flow.env_id = None first"
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


def to_numpy(x: th.Tensor) -> np.ndarray:
    return x.cpu().numpy().copy()  # copied: what is handed out may be written to
