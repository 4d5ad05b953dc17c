"""A replay buffer that mixes demos into every batch."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_dsrl import load_demos


class HalfDemos(ReplayBuffer):
    """
    Replay buffer of which half of every batch are demos.

    :param demos: ManiSkill trajectory file
    :param sparse: rewards are 1 at success, which ends the episode; otherwise those of the file, without an end
    """

    def __init__(self, buffer_size: int, observation_space: Any, action_space: Any, *args: Any, **kwargs: Any) -> None:
        demos, sparse = load_demos(kwargs.pop("demos")), kwargs.pop("sparse")
        super().__init__(buffer_size, observation_space, action_space, *args, **kwargs)
        size = sum(len(episode.actions) for episode in demos.episodes)
        self.demos = ReplayBuffer(size, observation_space, action_space, self.device, handle_timeout_termination=False)
        for episode in demos.episodes:
            assert episode.rewards is not None and episode.success is not None
            for i, action in enumerate(episode.actions):
                done = sparse and bool(episode.success[i])
                reward = float(done) if sparse else episode.rewards[i]
                obs, next_obs = episode.obs[i][None], episode.obs[i + 1][None]
                self.demos.add(obs, next_obs, action[None], np.array([reward]), np.array([done]), [{}])
                if done:
                    break

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Half of the batch from the demos."""
        own = super().sample(batch_size - batch_size // 2, env)
        demos = self.demos.sample(batch_size // 2, env)
        return ReplayBufferSamples(*(th.cat([a, b]) for a, b in zip(own[:5], demos[:5], strict=True)))
