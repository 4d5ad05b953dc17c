"""Records episodes as ManiSkill's ``RecordEpisode`` does, but keeps them in memory, step by step in constant time."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import sapien
import torch as th
from mani_skill import get_commit_info
from mani_skill.utils import gym_utils
from mani_skill.utils.wrappers import CPUGymWrapper
from mani_skill.utils.wrappers.record import parse_env_info

from sb3_dsrl.envs.fast import make_fast, wants_fast
from sb3_dsrl.envs.state_layout import layout_of
from sb3_dsrl.experts.recipe import Attempt, DemoRecipe


def make_recorded_env(recipe: DemoRecipe) -> Recorder:
    """
    :param recipe: of the attempts
    :return: one CPU env, as fast as it gets, whose episodes are recorded
    """
    given: dict[str, Any] = {} if recipe.max_episode_steps is None else dict(max_episode_steps=recipe.max_episode_steps)
    if recipe.camera_size is not None:
        given["sensor_configs"] = dict(width=recipe.camera_size, height=recipe.camera_size)
    made = gym.make(
        recipe.env_id,
        obs_mode=recipe.obs_mode,
        reward_mode=recipe.reward_mode,
        control_mode=recipe.control_mode,
        render_backend=recipe.render_backend or ("none" if recipe.obs_mode.startswith("state") else "cpu"),
        sim_backend="physx_cpu",
        num_envs=1,
        **given,
    )
    env = CPUGymWrapper(made)
    return Recorder(make_fast(env) if wants_fast() else env)


class Recorder(gym.Wrapper):
    """
    Keeps what happens in an episode.

    :param env: one CPU ManiSkill env, unbatched
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.base: Any = env.unwrapped
        self.max_episode_steps = gym_utils.find_max_episode_steps_value(env)
        self.steps: dict[str, list[Any]] = {}
        self.reset_kwargs: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._forget_contacts()
        obs, info = self.env.reset(seed=seed, options=options)
        self.reset_kwargs = dict(options=options, seed=seed)
        self.steps = dict(obs=[copied(obs)], env_states=[self._state()], actions=[], terminated=[], truncated=[], rewards=[])
        return obs, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        result = self.env.step(action)
        obs, reward, terminated, truncated, info = result
        found: dict[str, Any] = dict(obs=copied(obs), env_states=self._state(), actions=np.array(action, np.float32))
        found |= dict(terminated=bool(terminated), truncated=bool(truncated), rewards=np.float32(reward))
        found |= {key: bool(info[key]) for key in ("success", "fail") if key in info}
        for key, value in found.items():
            self.steps.setdefault(key, []).append(value)
        return result

    def rebuild(self) -> None:
        """Builds the scene anew: the next episodes then depend on what is played from here on only."""
        self.env.reset(seed=0, options=dict(reconfigure=True))
        self.steps = {}

    def _forget_contacts(self) -> None:
        """Lifts the objects apart for a moment: ``is_grasping`` would report the last episode's contacts at first."""
        if self.steps:
            actors = self.base.scene.actors.values()
            for i, actor in enumerate(actor for actor in actors if actor.px_body_type == "dynamic"):
                actor.set_pose(sapien.Pose([0.0, 0.0, 10.0 + 2.0 * i]))
            self.base.scene.step()

    def _state(self) -> dict[str, Any]:
        return copied(self.base.get_state_dict(), batched=True)

    def attempt(self, success: bool, **about: Any) -> Attempt:
        """
        The episode so far.

        :param success: whether it ended in success
        :param about: further entries of the episode in the JSON
        """
        episode: dict[str, Any] = dict(
            episode_seed=int(self.reset_kwargs["seed"]),
            control_mode=self.base.control_mode,
            elapsed_steps=len(self.steps["actions"]),
            reset_kwargs=self.reset_kwargs,
            **{key: self.steps[key][-1] for key in ("success", "fail") if key in self.steps},
            **about,
        )
        order = ("obs", "actions", "terminated", "truncated", "success", "fail", "env_states", "rewards")
        arrays = {key: stacked(self.steps[key]) for key in order if key in self.steps}
        complaint = "" if success else "the episode did not end in success"
        return Attempt(success, complaint, episode, arrays, self.file)

    @cached_property
    def file(self) -> dict[str, Any]:
        """What is the same for all episodes of this env."""
        env_info: dict[str, Any] = parse_env_info(self.env)
        about = dict(env_info=env_info | dict(max_episode_steps=self.max_episode_steps), commit_info=get_commit_info())
        if self.base.obs_mode == "state":
            about["state_layout"] = layout_of(self.base._get_obs_state_dict(self.base.get_info()))
        return about


def copied(value: Any, batched: bool = False) -> Any:
    """
    :param value: an array or tensor, or nested dicts of such; simulators go on using their memory
    :param batched: take the first of a batch of one
    """
    if isinstance(value, dict):
        return {key: copied(part, batched) for key, part in value.items()}
    array = value.cpu().numpy() if isinstance(value, th.Tensor) else np.asarray(value)
    return (array[0] if batched else array).copy()


def stacked(steps: list[Any]) -> Any:
    """
    :param steps: arrays or numbers, or nested dicts of such, one a step
    """
    if isinstance(steps[0], dict):
        return {key: stacked([step[key] for step in steps]) for key in steps[0]}
    return np.stack(steps)
