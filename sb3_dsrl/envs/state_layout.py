"""What the entries of a flat ManiSkill state are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import torch as th
from mani_skill.utils.registration import REGISTERED_ENVS

from sb3_dsrl.policies.spatial_features import StateLayout


def state_layout(env_id: str, control_mode: str | None = None, **env_kwargs: Any) -> StateLayout:
    """
    Makes an env once to see what its flat state is made of, for ``train_flow(demos, state_layout=...)``. What records demos
    can write it as ``"state_layout"`` into their JSON, see :func:`~sb3_dsrl.load_demos`; then nobody needs to ask again.

    :param env_id: ManiSkill environment
    :param control_mode: ManiSkill controller, whose own state is a part for some; None is the task's own
    :param env_kwargs: further arguments of ``gym.make``
    :return: name and size of each part, such as ("extra/tcp_pose", 7), in the order of ``obs_mode="state"``
    :raises ValueError: if there is no such environment
    """
    if env_id not in REGISTERED_ENVS:
        raise ValueError(f"{env_id!r} is not a ManiSkill environment, so that the layout of its state is unknown")
    kwargs = dict(obs_mode="state_dict", sim_backend="physx_cpu", render_backend="none") | env_kwargs
    if control_mode is not None:
        kwargs["control_mode"] = control_mode
    env = gym.make(env_id, **kwargs)
    try:
        with th.random.fork_rng(devices=[]):  # ManiSkill seeds torch's global generator
            obs, _ = env.reset(seed=0)
    finally:
        env.close()
    return layout_of(obs)


def layout_of(obs: Any) -> StateLayout:
    """
    :param obs: of ``obs_mode="state_dict"``, batched
    :return: name and size of each part, in the order in which ManiSkill's ``flatten_state_dict`` joins them
    """
    return list(_parts("", obs))


def _parts(prefix: str, obs: Any) -> Iterator[tuple[str, int]]:
    for name, value in obs.items():
        if isinstance(value, dict):
            yield from _parts(f"{prefix}{name}/", value)
        elif value is not None and (size := th.as_tensor(value)[0].numel()):
            yield f"{prefix}{name}", size
