"""Writes demo files as ManiSkill's RecordEpisode does: an HDF5 with one group per episode, and a JSON beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np


def scripted_episode(
    length: int, obs_dim: int = 3, action_dim: int = 2, seed: int = 0, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """
    One episode with random contents; observation ``i`` starts with ``i``.

    :param ends: steps that carry ``terminated`` and ``success``
    """
    rng = np.random.default_rng([seed, length])
    obs = rng.standard_normal((length + 1, obs_dim)).astype(np.float32)
    obs[:, 0] = np.arange(length + 1)
    done = np.isin(np.arange(length), ends)
    return dict(
        obs=obs,
        actions=rng.uniform(-1, 1, (length, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(length).astype(np.float32),
        terminated=done,
        truncated=np.zeros(length, bool),
        success=done,
    )


def write_demos(
    path: Path,
    episodes: Sequence[dict[str, Any]],
    control_mode: str | Sequence[str] | None = "pd_joint_delta_pos",
    env_control_mode: str | None = "pd_joint_delta_pos",
    env_id: str = "PushCube-v1",
    obs_mode: str = "state",
) -> Path:
    """
    :param path: the ``.h5`` file to write; the JSON goes beside it
    :param episodes: what each ``traj_i`` holds; a dict is written as a group, and a missing key is missing in the file
    :param control_mode: of each episode in the JSON
    :param env_control_mode: in ``env_kwargs``
    """
    modes = [control_mode] * len(episodes) if control_mode is None or isinstance(control_mode, str) else list(control_mode)
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"traj_{i}")
            for key, value in episode.items():
                if isinstance(value, dict):
                    for name, entry in value.items():
                        group.create_dataset(f"{key}/{name}", data=entry, compression="gzip")
                else:
                    group.create_dataset(key, data=value)
    env_kwargs = dict(obs_mode=obs_mode, reward_mode="normalized_dense", control_mode=env_control_mode, num_envs=1)
    listed = [
        dict(
            episode_id=i,
            episode_seed=i,
            elapsed_steps=len(np.atleast_1d(episode.get("actions", ()))),
            reset_kwargs=dict(seed=i, options=None),
        )
        | ({} if mode is None else dict(control_mode=mode))
        for i, (episode, mode) in enumerate(zip(episodes, modes, strict=True))
    ]
    meta = dict(env_info=dict(env_id=env_id, env_kwargs=env_kwargs, max_episode_steps=50), commit_info=None, episodes=listed)
    path.with_suffix(".json").write_text(json.dumps(meta, indent=2))
    return path
