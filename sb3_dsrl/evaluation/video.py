"""Videos of steered ManiSkill episodes, with every env step, also of those inside a chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
from tqdm import tqdm

from sb3_dsrl.envs.maniskill import maniskill_kwargs
from sb3_dsrl.evaluation.play import Actor, play
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.steering.latent_env import LatentSteeringWrapper


class FrameRecorder(gym.Wrapper):
    """
    Keeps a picture of every env step.

    :param env: a ManiSkill env with ``render_mode="rgb_array"``
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.frames: list[Any] = []

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One env step and its picture."""
        result = self.env.step(action)
        self.frames.append(np.array(self.env.render())[0])
        return result


def record_video(
    path: str | Path,
    env_id: str,
    flow: SteerablePolicy,
    actor: Actor,
    episodes: int = 2,
    *,
    seed: int = 1_000_000,
    size: int = 256,
    fps: int = 20,
    deterministic: bool = True,
    progress_bar: bool = False,
    **env_kwargs: Any,
) -> None:
    """
    Films episodes one after the other; the same seed starts the same episodes, whatever plays them.

    :param path: of the video, such as ``before.mp4``
    :param env_id: ManiSkill environment
    :param flow: the policy that is steered
    :param actor: see :func:`~sb3_dsrl.evaluate`
    :param episodes: number of episodes
    :param seed: of the first episode; the next ones follow
    :param size: width and height in pixels
    :param fps: frames per second; an env step of most tasks is 1/20 s
    :param deterministic: passed on to ``predict``
    :param progress_bar: show a progress bar
    :param env_kwargs: further arguments of ``gym.make``, such as ``max_episode_steps``
    """
    film_kwargs = dict(render_mode="rgb_array", human_render_camera_configs=dict(width=size, height=size))
    kwargs = maniskill_kwargs(env_id, flow.obs_mode, **film_kwargs, **(dict(control_mode=flow.control_mode) | env_kwargs))
    film = FrameRecorder(gym.make(env_id, **kwargs))
    env = LatentSteeringWrapper(film, flow, ignore_terminations=True)
    for episode in tqdm(range(episodes), desc=Path(path).name, disable=not progress_bar):
        for _ in play(actor, env, episodes=1, seed=seed + episode, deterministic=deterministic):
            pass
    env.close()
    imageio.mimsave(path, film.frames, fps=fps)
