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
from sb3_dsrl.utils.observations import map_frames

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

    The frames lie in one ring of tensors. If not all of them fit, the oldest episodes make room for the next one after every
    ``turnover`` batches, in an order that is shuffled once.

    :param flow: its encoder is used, with gradients
    :param demos: the demos
    :param random_shift_pad: largest random shift in pixels
    :param memory: bytes of images that may be held; the longest episode is held in any case
    :param turnover: batches between two changes
    :param repeats: how often each encoded window appears in a batch: each time the loss draws another noise for it
    """

    def __init__(
        self,
        flow: FlowPolicy,
        demos: Demos,
        random_shift_pad: int = 4,
        memory: float = 2e9,
        turnover: int = 4,
        repeats: int = 1,
    ) -> None:
        check_demos_fit(flow, demos)
        self._flow, self._pad, self._turnover, self._repeats = flow, random_shift_pad, turnover, repeats
        self._episodes = demos.episodes
        chunks = [chunks_from_now(episode, demos.control_mode, flow.pred_horizon) for episode in demos.episodes]
        self._chunks = th.from_numpy(np.concatenate(chunks))
        self._lengths = np.array([len(episode) for episode in demos.episodes])
        self._starts = np.cumsum(self._lengths) - self._lengths  # of each episode in the chunks
        self._order: list[int] = th.randperm(len(self._episodes)).tolist()
        first = self._episodes[self._order[0]].read_obs()
        frame_bytes = sum(x[0].nbytes for x in first.values())
        n_frames = self._lengths + 1
        self._capacity = min(int(n_frames.sum()), max(int(n_frames.max()), int(memory / frame_bytes)))
        self._frames = map_frames(lambda x: th.from_numpy(np.zeros((self._capacity, *x.shape[1:]), x.dtype)), first)
        self._held: deque[tuple[int, int]] = deque()  # episode, and where in the ring its frames begin
        self._end, self._loaded, self._batches = 0, 0, 0
        while len(self._held) < len(self._order) and self._fits(self._order[self._loaded]):
            self._load()

    def _fits(self, i: int) -> bool:
        return sum(self._lengths[j] + 1 for j, _ in self._held) + self._lengths[i] + 1 <= self._capacity

    def _load(self) -> None:
        i = self._order[self._loaded % len(self._order)]
        while not self._fits(i):
            self._held.popleft()
        rows = (self._end + th.arange(int(self._lengths[i]) + 1)) % self._capacity
        for key, x in self._episodes[i].read_obs().items():
            self._frames[key][rows] = th.from_numpy(x)
        self._held.append((i, self._end))
        self._end, self._loaded = (self._end + len(rows)) % self._capacity, self._loaded + 1

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
        :param batch_size: B, a multiple of ``repeats``
        :return: features (B, C), chunks (B, T, A), None
        """
        self._batches += 1
        if len(self._held) < len(self._episodes) and self._batches % self._turnover == 0:
            self._load()
        episodes, offsets = np.array(self._held).T
        ends = np.cumsum(self._lengths[episodes])
        samples = th.randint(int(ends[-1]), (batch_size // self._repeats,)).numpy()
        owners = np.searchsorted(ends, samples, side="right")
        steps = samples - (ends - self._lengths[episodes])[owners]
        seen = seen_steps(steps, self._flow.obs_horizon)
        rows = th.from_numpy((offsets[owners][:, None] + seen) % self._capacity)
        batch = map_frames(lambda x: x[rows].to(self._flow.device), self._frames)
        if self._pad:
            images = random_shift({key: x for key, x in batch.items() if x.dim() == 5}, self._pad)
            batch |= images
        chunks = self._chunks[self._starts[episodes][owners] + steps].to(self._flow.device)
        return self._flow.encode(batch).repeat(self._repeats, 1), chunks.repeat(self._repeats, 1, 1), None
