"""Vectorised simulators for tests: one that gives tensors, and scripted envs behind EnvPool's interface."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_dsrl.utils.observations import map_frames, stack_frames


class TorchVectorEnv(gym.vector.VectorWrapper):
    """A vector env that takes and gives tensors, and overwrites the observations that it handed out."""

    device = th.device("cpu")

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        self._obs = th.as_tensor(obs)
        return self._obs, info

    def step(self, actions: th.Tensor) -> Any:
        assert isinstance(actions, th.Tensor)
        obs, *outcome, info = self.env.step(actions.numpy())
        self._obs[:] = th.as_tensor(obs)
        return self._obs, *map(th.as_tensor, outcome), info


class ScriptedEnvPool(gym.vector.VectorEnv):
    """
    EnvPool's gymnasium interface: a part of the envs is stepped or reset by ``env_id``, an env that ended begins anew at its
    next step and ignores that action, results come in any order. It counts the resets that should not happen.

    :param envs: the envs; time limits are their own
    :param batch_size: as EnvPool has it
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    render_mode = None

    def __init__(self, envs: Sequence[gym.Env], batch_size: int = 0) -> None:
        self.envs, self.num_envs = list(envs), len(envs)
        self.config = dict(num_envs=self.num_envs, batch_size=batch_size or self.num_envs)
        self.observation_space = self.single_observation_space = envs[0].observation_space
        self.action_space = self.single_action_space = envs[0].action_space
        self.ended = np.zeros(self.num_envs, dtype=bool)
        self.resets_by_itself = 0
        self._order = np.random.default_rng(0)

    @property
    def all_env_ids(self) -> np.ndarray:
        return np.arange(self.num_envs, dtype=np.int32)

    def reset(self, env_id: np.ndarray | None = None, **_: Any) -> Any:  # type: ignore[override]
        ids = self.all_env_ids if env_id is None else env_id
        self.ended[ids] = False
        return self._batch(ids, [(_copied(self.envs[i].reset()[0]), 0.0, False, False, {}) for i in ids])[::4]

    def step(self, action: np.ndarray, env_id: np.ndarray | None = None) -> Any:  # type: ignore[override]
        ids = self._order.permutation(self.all_env_ids if env_id is None else env_id)
        rows = np.argsort(env_id)[np.searchsorted(np.sort(env_id), ids)] if env_id is not None else ids
        results = []
        for i, row in zip(ids, rows, strict=True):
            if self.ended[i]:
                self.resets_by_itself += 1
                results.append((_copied(self.envs[i].reset()[0]), 0.0, False, False, {}))
            else:
                obs, *outcome = self.envs[i].step(action[row])
                results.append((_copied(obs), *outcome))
            self.ended[i] = results[-1][2] or results[-1][3]
        return self._batch(ids, results)

    def _batch(self, ids: np.ndarray, results: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        obs, rewards, ends, limits, infos = (list(column) for column in zip(*results, strict=True))
        info: dict[str, Any] = {"env_id": ids, "players": {"env_id": ids}}
        if infos[0]:
            info |= {key: np.array([own[key] for own in infos]) for key in ("success", "elapsed_steps")}
            info["scene"] = np.array([own["scene"] for own in infos], dtype=object)
            info["gripper"] = dict(at=np.stack([own["gripper"]["at"] for own in infos]))
        batch = stack_frames(obs)
        return batch, np.array(rewards, np.float32), np.array(ends), np.array(limits), info

    def close_extras(self, **_: Any) -> None:
        pass


def _copied(obs: Any) -> Any:
    return map_frames(np.copy, obs)
