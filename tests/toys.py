"""Flows whose decode is known in closed form, a critic likewise, and a one-step env whose best noise is known."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_dsrl import EnsembleChunkCritic, FlowPolicy, StateEncoder
from sb3_dsrl.policies.networks import VelocityNet


class LinearVelocity(VelocityNet):
    """v = a x + b, elementwise; a = b = 0 decodes every noise to itself."""

    def __init__(self, action_dim: int, pred_horizon: int, cond_dim: int, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__(action_dim, pred_horizon, cond_dim, a=a, b=b)
        self.a, self.b = nn.Parameter(th.tensor(float(a))), nn.Parameter(th.tensor(float(b)))

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        return self.a * x + self.b


class MeanVelocity(LinearVelocity):
    """Decodes noise to its mean over all rows, in one step."""

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        return x.mean(dim=1, keepdim=True) - x


def mean_flow() -> FlowPolicy:
    """A frozen flow of 4 rows of noise, the mean of which is its action. T = 4, H = 1."""
    return FlowPolicy(StateEncoder(2, 1), MeanVelocity(2, 4, 2), act_horizon=1, num_steps=1).freeze()


def linear_flow(
    obs_dim: int = 2, action_dim: int = 2, horizon: int = 1, a: float = 0.0, b: float = 0.0, n_heads: int = 2, **kwargs: Any
) -> FlowPolicy:
    """A frozen flow with :class:`LinearVelocity`, one frame, T = H = ``horizon``."""
    critic = EnsembleChunkCritic(obs_dim, horizon, action_dim, n_heads=n_heads, width=32)
    velocity = LinearVelocity(action_dim, horizon, obs_dim, a, b)
    return FlowPolicy(StateEncoder(obs_dim, 1), velocity, critic, act_horizon=horizon, **kwargs).freeze()


class KnownCritic(EnsembleChunkCritic):
    """
    A trained critic in closed form.

    :param heads: Q of each head, from cond (B, C) or (B, 1, C) and chunk (B, H, A) or (B, M, H, A)
    """

    def __init__(self, *heads: Callable[[th.Tensor, th.Tensor], th.Tensor]) -> None:
        super().__init__(cond_dim=2, act_horizon=1, action_dim=2, n_heads=len(heads), width=2)
        self.heads = heads
        self.updates += 1

    def forward(self, cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
        cond = cond[:, None] if chunk.dim() == 4 else cond
        return th.stack([head(cond, chunk) for head in self.heads])


class BanditEnv(gym.Env):
    """One step; the reward is -||action - target||^2 and the observation is noise that says nothing."""

    def __init__(self, target: np.ndarray, obs_dim: int = 2) -> None:
        self.target = target
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, target.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        distance = float(np.square(action - self.target).sum())
        return self._obs(), -distance, True, False, {"success": distance < 0.1}

    def _obs(self) -> np.ndarray:
        return self.np_random.standard_normal(self.observation_space.shape).astype(np.float32)


class GuideEnv(gym.Env):
    """
    Four steps; at each of them x is drawn anew and seen, and the reward is -||4 action - best(x)||^2. With
    ``linear_flow(a=-0.75, num_steps=1)``, which divides noise by 4, ``best(x)`` is the best noise. It can go back to a state.
    """

    def __init__(self, length: int = 4) -> None:
        self.length = length
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.made = 0

    @staticmethod
    def best(x: np.ndarray) -> np.ndarray:
        """The best noise, whose mean over all states is 0."""
        return 0.8 * x * np.array([1, -1], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._drawn(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.made += 1
        distance = float(np.square(4 * action - self.best(self.x)).sum())
        return self._drawn(), -distance, self.t == self.length, False, {"success": distance < 0.1}

    def get_sim_state(self) -> dict[str, Any]:
        return dict(x=self.x, t=self.t, rng=self.np_random.bit_generator.state)

    def set_sim_state(self, state: dict[str, Any]) -> None:
        self.x, self.t, self.np_random.bit_generator.state = state["x"], state["t"], state["rng"]

    def _drawn(self) -> np.ndarray:
        self.x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.x


def guide_flow() -> FlowPolicy:
    """Divides noise by 4."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        return linear_flow(a=-0.75, num_steps=1)
