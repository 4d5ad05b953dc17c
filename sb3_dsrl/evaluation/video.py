"""Videos of steered ManiSkill episodes, with every env step, also of those inside a chunk."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm import tqdm

from sb3_dsrl.envs.maniskill import maniskill_kwargs
from sb3_dsrl.evaluation.play import Actor, as_vec_env, play
from sb3_dsrl.evaluation.vec_normalize import normalizers
from sb3_dsrl.steering.latent_env import LatentSteeringWrapper
from sb3_dsrl.steering.vec_env import find_steering
from sb3_dsrl.utils.checkpoint import atomic_file

#: Arguments of ``gym.make`` that a video does not take over from the env: it has one env, on the CPU.
OWN_KWARGS = ("num_envs", "sim_backend", "render_backend", "render_mode")


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
    env: gym.Env | VecEnv,
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

    They are played in a copy of the env with a camera, on the CPU: the same task, time limit, flow and steering, and the same
    statistics of a VecNormalize. The env itself is left alone.

    :param path: of the video, such as ``before.mp4``; it is there when all episodes have been played
    :param env: steered ManiSkill env, gym or vectorised, that the actor plays
    :param actor: see :func:`~sb3_dsrl.evaluate`
    :param episodes: number of episodes
    :param seed: of the first episode; the next ones follow
    :param size: width and height in pixels
    :param fps: frames per second; an env step of most tasks is 1/20 s
    :param deterministic: passed on to ``predict``
    :param progress_bar: show a progress bar
    :param env_kwargs: arguments of ``gym.make`` that are other ones than the env's, such as ``max_episode_steps``
    :raises ValueError: if the env is not steered or not ManiSkill's, or there is no episode to play
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, found {episodes}")
    path = Path(path)
    recorder = _camera_env(env, size, env_kwargs)
    try:
        filmed = _steered_alike(recorder, env)
        for episode in tqdm(range(episodes), desc=path.name, disable=not progress_bar):
            for _ in play(actor, filmed, episodes=1, seed=seed + episode, deterministic=deterministic):
                pass
    finally:
        recorder.close()
    video: Any = imageio.mimsave(imageio.RETURN_BYTES, recorder.frames, format=path.suffix, fps=fps)
    with atomic_file(path) as file:
        file.write(video)


def _attribute(env: gym.Env | VecEnv, name: str) -> Any:
    return as_vec_env(env).get_attr(name, indices=0)[0]


def _camera_env(env: gym.Env | VecEnv, size: int, env_kwargs: dict[str, Any]) -> FrameRecorder:
    flow = find_steering(env).flow
    env_id = _attribute(env, "env_id")
    if env_id is None:
        raise ValueError(f"record_video films ManiSkill's envs, but {type(env).__name__} has no env id")
    spec = _attribute(env, "spec")
    own = {key: value for key, value in spec.kwargs.items() if key not in OWN_KWARGS}
    if as_vec_env(env).has_attr("_max_episode_steps"):  # ManiSkill's wrapper leaves the spec without the time limit
        own["max_episode_steps"] = _attribute(env, "_max_episode_steps")
    camera = dict(render_mode="rgb_array", human_render_camera_configs=dict(width=size, height=size))
    kwargs = dict(obs_mode=flow.obs_mode, control_mode=_attribute(env, "control_mode")) | own | camera | env_kwargs
    return FrameRecorder(gym.make(env_id, **maniskill_kwargs(env_id, **kwargs)))


def _steered_alike(recorder: FrameRecorder, env: gym.Env | VecEnv) -> VecEnv:
    steering = find_steering(env)
    names = ("gamma", "noise_bound", "steer_mode", "num_steps", "ignore_terminations", "reward_scale", "residual_scale")
    settings = {name: getattr(steering.contract, name) for name in names}
    latent = LatentSteeringWrapper(recorder, steering.flow, allow_other_task=True, **settings)
    venv: VecEnv = DummyVecEnv([lambda: latent])
    for layer in reversed(normalizers(env)):
        twin = deepcopy(layer)  # without its env, as when it is pickled
        twin.set_venv(venv)
        venv = twin
    return venv
