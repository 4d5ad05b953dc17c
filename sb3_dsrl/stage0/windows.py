"""Training pairs of stage 0: what is seen, and the T actions from now on.

Letters in shapes: ``B`` batch, ``n`` windows, ``T`` = pred_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch as th

from sb3_dsrl.policies.encoders import random_shift
from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.stage0.demos import Demos, action_windows, chunks_from_now, seen_steps
from sb3_dsrl.stage0.features import check_demos_fit, encode_demos
from sb3_dsrl.utils.observations import map_frames, stack_frames

Batch = tuple[th.Tensor, th.Tensor, th.Tensor | None]


class FeatureWindows:
    """
    Windows whose features do not change: they are encoded once.

    :param flow: its encoder is used
    :param demos: the demos
    """

    def __init__(self, flow: FlowPolicy, demos: Demos) -> None:
        obs, chunk = action_windows(encode_demos(flow, demos), 1, flow.pred_horizon)
        self.cond, self.chunk = th.from_numpy(obs[:, 0]).to(flow.device), th.from_numpy(chunk).to(flow.device)
        #: weight of each window, (n,); None is 1
        self.weights: th.Tensor | None = None

    def sample(self, batch_size: int) -> Batch:
        """
        :param batch_size: B
        :return: features (B, C), chunks (B, T, A), weights (B,) or None
        """
        index = th.randint(len(self.chunk), (batch_size,), device=self.chunk.device)
        return self.cond[index], self.chunk[index], None if self.weights is None else self.weights[index]

    def state_dict(self) -> dict[str, Any]:
        """What is not computed from flow and demos."""
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state over."""
        self.weights = state_dict["weights"]


class ImageWindows:
    """
    Windows of demos with images, encoded anew in every batch while the encoder learns.

    Only some episodes are held in memory. If not all of them fit, the oldest one makes room for the next after every
    ``turnover`` batches, in an order that is shuffled once.

    :param flow: its encoder is used, with gradients
    :param demos: the demos
    :param random_shift_pad: largest random shift in pixels
    :param memory: bytes of images that may be held
    :param turnover: batches between two changes
    """

    def __init__(
        self, flow: FlowPolicy, demos: Demos, random_shift_pad: int = 4, memory: float = 2e9, turnover: int = 4
    ) -> None:
        check_demos_fit(flow, demos)
        self._flow, self._pad, self._turnover = flow, random_shift_pad, turnover
        self._episodes = demos.episodes
        self._chunks = [chunks_from_now(episode, demos.control_mode, flow.pred_horizon) for episode in demos.episodes]
        self._order: list[int] = th.randperm(len(self._episodes)).tolist()
        self._held: deque[tuple[int, Any]] = deque()
        self._loaded, self._batches = 0, 0
        used = 0
        while len(self._held) < len(self._order) and (not self._held or used < memory):
            used += self._load()

    def _load(self) -> int:
        i = self._order[self._loaded % len(self._order)]
        self._loaded += 1
        obs = self._episodes[i].read_obs()
        self._held.append((i, obs))
        return sum(x.nbytes for x in obs.values())

    def state_dict(self) -> dict[str, Any]:
        """Which episodes are held, and which come next."""
        return dict(order=self._order, held=len(self._held), loaded=self._loaded, batches=self._batches)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state over, and reads the episodes that were held."""
        self._order, self._batches = state_dict["order"], state_dict["batches"]
        self._loaded = state_dict["loaded"] - state_dict["held"]
        self._held.clear()
        for _ in range(state_dict["held"]):
            self._load()

    def sample(self, batch_size: int) -> Batch:
        """
        :param batch_size: B
        :return: features (B, C), chunks (B, T, A), None
        """
        self._batches += 1
        if len(self._held) < len(self._episodes) and self._batches % self._turnover == 0:
            self._held.popleft()
            self._load()
        ends = np.cumsum([len(self._chunks[i]) for i, _ in self._held])
        samples = th.randint(int(ends[-1]), (batch_size,)).numpy()
        owners = np.searchsorted(ends, samples, side="right")
        steps = samples - np.append(0, ends)[owners]
        frames, chunks = [], []
        for owner, step, history in zip(owners, steps, seen_steps(steps, self._flow.obs_horizon), strict=True):
            i, obs = self._held[owner]
            frames.append(map_frames(lambda x, history=history: x[history], obs))
            chunks.append(self._chunks[i][step])
        batch = map_frames(lambda x: th.from_numpy(x).to(self._flow.device), stack_frames(frames))
        if self._pad:
            images = random_shift({key: x for key, x in batch.items() if x.dim() == 5}, self._pad)
            batch |= images
        return self._flow.encode(batch), th.from_numpy(np.stack(chunks)).to(self._flow.device), None
