"""ManiSkill's envs as standard gym envs: unbatched, with flat images, seeded episode by episode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import numpy as np
from gymnasium import spaces
from mani_skill.utils.wrappers import CPUGymWrapper, FlattenRGBDObservationWrapper
from stable_baselines3.common.env_util import is_wrapped

from sb3_dsrl.envs.fast import make_fast, wants_fast
from sb3_dsrl.envs.sim_state import get_sim_state, set_recorded_state, set_sim_state
from sb3_dsrl.steering.sim_state import set_wrapper_counters, wrapper_counters


def unbatched(env: gym.Env, fast: bool | None = None) -> gym.Env:
    """
    A single CPU ManiSkill env as a standard gym env: NumPy, no batch dimension.

    :param env: as ``gym.make`` returns it; an env that ManiSkill's ``CPUGymWrapper`` already wraps keeps it, and one that
        this function has made is returned as it is
    :param fast: install the shortcuts of :mod:`sb3_dsrl.envs.fast`; None is where
        :func:`~sb3_dsrl.envs.fast.install.wants_fast` says so
    :raises ValueError: if it simulates several envs or runs on the GPU
    """
    base: Any = env.unwrapped
    if base.num_envs > 1 or base.gpu_sim_enabled:
        raise ValueError(
            f"This wrapper is for one CPU env, but {base.spec.id} simulates num_envs={base.num_envs} on {base.device}; "
            f"use make_latent_env({base.spec.id!r}, flow, n_envs={base.num_envs})"
        )
    fast = wants_fast() if fast is None else fast
    if is_wrapped(env, EpisodeSeeds):
        return env
    if not is_wrapped(env, CPUGymWrapper):
        env = CPUGymWrapper(flat_images(env))
    return EpisodeSeeds(make_fast(env) if fast else env)


def flat_images(env: gym.Env) -> gym.Env:
    """
    Image observations as a flat dict of ``state`` and ``rgb`` or ``depth`` or both, rendered only where they are seen. Other
    envs stay as they are.

    :param env: a ManiSkill env
    """
    base: Any = env.unwrapped
    space = base.single_observation_space
    if not isinstance(space, spaces.Dict) or base.obs_mode == "state_dict":
        return env
    env = RenderOnDemand(env)
    return FlattenRGBDObservationWrapper(env) if "sensor_data" in space.spaces else env


class RenderOnDemand(gym.Wrapper):
    """
    An env whose cameras can be switched off for a while. Meanwhile its images stay as they were; everything else is fresh.

    Inside a chunk nobody looks at most frames, and without a GPU a frame costs ten times what the physics of a step does.

    :param env: a ManiSkill env with image observations
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        base: Any = env.unwrapped
        self._rendering = True
        self._last: dict[str, Any] | None = None
        self._capture = base._get_obs_sensor_data
        base._get_obs_sensor_data = self._sensor_data

    def set_observing(self, observing: bool) -> None:
        """
        :param observing: whether the next observations are seen, and so need new images
        """
        self._rendering = observing

    def _sensor_data(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._rendering or self._last is None:
            self._last = self._capture(*args, **kwargs)
        return {camera: dict(images) for camera, images in self._last.items()}


#: Option of a reset: the seed of this one episode.
EPISODE_SEED = "episode_seed"


class EpisodeSeeds(gym.Wrapper):
    """
    Gives every episode a seed of its own, drawn from the one that the env was seeded with.

    ManiSkill starts an episode without a seed from torch's global generator, which forked workers share: their
    episodes would all start alike, and differently in every run.

    :param env: a ManiSkill env
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        The given seed, or the next one of those that follow from the last seed given; with ``options["episode_seed"]`` that
        one, which changes nothing of the seeds that follow.
        """
        options = dict(options or {})
        own = options.pop(EPISODE_SEED, None)
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        elif own is None:
            seed = int(self._rng.integers(2**31))
        return self.env.reset(seed=seed if own is None else own, options=options)

    def get_sim_state(self) -> dict[str, Any]:
        """See :mod:`sb3_dsrl.envs.sim_state`. Which episodes follow is no part of it."""
        return dict(base=get_sim_state(self.unwrapped), wrappers=wrapper_counters(self.env))  # type: ignore[arg-type]

    def set_sim_state(self, state: dict[str, Any]) -> None:
        """
        :param state: of :meth:`get_sim_state` of this env in this episode; or one that ManiSkill has recorded in an episode
            of the same seed, as :class:`~sb3_dsrl.DemoStarts` reads it
        :raises ValueError: if it is of another env, or the scene was built anew since then
        """
        if "env_states" in state:
            set_recorded_state(self.unwrapped, state["env_states"], state["elapsed_steps"])  # type: ignore[arg-type]
            return
        set_sim_state(self.unwrapped, state["base"])  # type: ignore[arg-type]
        set_wrapper_counters(self.env, state["wrappers"])
