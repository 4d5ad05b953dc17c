"""Envs whose step is a chunk, and envs whose action is flow noise: one for a single gym env, one for many.

Letters in shapes: ``N`` envs, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features, ``D``
dimensions of one observation, ``k`` env steps really executed in a chunk (1..H), ``w`` noise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dsrl.batched import BatchedChunkEnv
from sb3_dsrl.chunks import ActionScaler, check_chunking, chunk_space, episode_summary, render_switch, stacked_space
from sb3_dsrl.noise_policy import NoisePolicy
from sb3_dsrl.observations import map_frames, stack_frames
from sb3_dsrl.steering import Steering, SteerMode, check_flow


class ActionChunkWrapper(gym.Wrapper):
    """
    One step of this env is a macro-step: it executes a chunk of H actions and returns the SMDP transition.

    - The reward is ``sum_{i<k} gamma^i r_i`` (times ``reward_scale``).
    - A termination stops the chunk: nothing after it is executed or rewarded.
    - A time limit inside a chunk does not cut it. The chunk runs to its end and the episode is truncated there, so that every
      macro-step from which SB3 bootstraps lasts exactly H env steps and ``gamma ** H`` is its discount.
    - Observations are the last ``obs_horizon`` frames, oldest first, copied.

    ``info`` holds ``chunk_length`` (k) and, if the env reports ``success`` (or ``is_success``), ``is_success``. At the
    end of an episode it holds ``success_once``, ``success_at_end``, ``episode_return`` (undiscounted, unscaled) and
    ``episode_length`` (env steps), all of which stop counting at the time limit, and SB3's ``episode`` with the same
    return and length.

    :param env: env with a Box as action space and a Box, or a Dict of Boxes, as observation space; a ManiSkill CPU env as
        ``gym.make`` returns it is unbatched
    :param act_horizon: H
    :param obs_horizon: frames in an observation
    :param gamma: discount per env step
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit
    :param reward_scale: factor on the macro reward
    :raises ValueError: if the env is batched, or its spaces do not fit; in ``reset`` and ``step``, if an observation or a
        reward is NaN or infinite
    """

    def __init__(
        self,
        env: gym.Env,
        act_horizon: int,
        obs_horizon: int = 1,
        gamma: float = 0.99,
        ignore_terminations: bool = False,
        reward_scale: float = 1.0,
    ) -> None:
        if isinstance(env, (VecEnv, gym.vector.VectorEnv)):
            raise ValueError(
                f"This wrapper is for one env, found {type(env).__name__} with {env.num_envs}; for many ManiSkill envs use "
                f"make_latent_env, for an SB3 VecEnv of chunk envs VecLatentSteering"
            )
        if hasattr(env.unwrapped, "single_action_space"):  # a ManiSkill env: torch tensors with a batch dimension
            from sb3_dsrl.maniskill import unbatched

            env = unbatched(env)
        super().__init__(env)
        check_chunking(act_horizon, obs_horizon, gamma)
        self.act_horizon, self.obs_horizon, self.gamma = act_horizon, obs_horizon, gamma
        self.ignore_terminations, self.reward_scale = ignore_terminations, reward_scale
        self.action_space = chunk_space(env.action_space, act_horizon)
        self.observation_space = stacked_space(env.observation_space, obs_horizon)
        self._scale = ActionScaler(env.action_space)  # type: ignore[arg-type]
        self._action_dtype = env.action_space.dtype
        self._set_rendering = render_switch(env)
        self.env_id = env.spec.id if env.spec is not None else None
        self.control_mode: str | None = getattr(env.unwrapped, "control_mode", None)
        self._frames: deque[Any] = deque(maxlen=obs_horizon)
        self._episode, self._steps = _EpisodeMetrics(), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; the first observation fills all frames."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._frames.extend([self._frame(obs)] * self.obs_horizon)
        self._episode = _EpisodeMetrics()
        return stack_frames(self._frames), info

    def step(self, chunk: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param chunk: (H, A), in [-1, 1]
        :return: observation (obs_horizon, D), or a dict of such; macro reward, terminated, truncated, info
        """
        if np.shape(chunk) != self.action_space.shape:
            raise ValueError(f"A chunk must have shape (H, A) = {self.action_space.shape}, found {np.shape(chunk)}")
        actions = self._scale(np.asarray(chunk))
        macro_reward, terminated, truncated, k = 0.0, False, False, 0
        info: dict[str, Any] = {}
        # Without terminations the policy sees the last frames of a chunk only; with them any frame may be the last.
        first_seen = self.act_horizon - self.obs_horizon if self.ignore_terminations else 0
        for action in actions.astype(self._action_dtype):
            self._set_rendering(k >= first_seen)
            obs, reward, ended, timed_out, info = self.env.step(action)
            self._steps += 1
            self._check_finite("reward", reward)
            macro_reward += self.gamma**k * float(reward)
            k += 1
            self._frames.append(self._frame(obs))
            self._episode.update(float(reward), info)
            terminated = bool(ended) and not self.ignore_terminations
            if terminated:
                break
            if timed_out:
                truncated = True
                self._episode.close()
        info = dict(info, chunk_length=k)
        if self._episode.success is not None:
            info["is_success"] = self._episode.success
        if terminated or truncated:
            info.update(self._episode.summary())
        return stack_frames(self._frames), self.reward_scale * macro_reward, terminated, truncated, info

    def _frame(self, obs: Any) -> Any:
        # copied: the arrays of a CPU simulator alias its memory
        frame = map_frames(lambda x: np.array(x, dtype=np.float32 if x.dtype.kind == "f" else x.dtype), obs)
        for part in frame.values() if isinstance(frame, dict) else (frame,):
            if part.dtype.kind == "f":
                self._check_finite("observation", part)
        return frame

    def _check_finite(self, what: str, value: Any) -> None:
        if not np.isfinite(value).all():
            name = self.env_id or type(self.env.unwrapped).__name__
            raise ValueError(f"{name}: the {what} after env step {self._steps} of the episode is NaN or infinite")


class _EpisodeMetrics:
    """Return, length and success of one episode in env steps, up to the time limit."""

    def __init__(self) -> None:
        self.success: bool | None = None
        self._once = False
        self._return, self._length, self._closed = 0.0, 0, False
        self._start = time.time()

    def update(self, reward: float, info: dict[str, Any]) -> None:
        if self._closed:
            return
        self._return += reward
        self._length += 1
        found = info.get("success", info.get("is_success"))
        if found is not None:
            self.success = bool(found)
            self._once = self._once or self.success

    def close(self) -> None:
        self._closed = True

    def summary(self) -> dict[str, Any]:
        once = self._once if self.success is not None else None
        return episode_summary(self._return, self._length, self._start, once, self.success)


class LatentSteeringWrapper(gym.Wrapper):
    """
    Turns an env into one whose action is the noise of a frozen flow, and whose observation is the flow's features.

    For one env; :class:`VecLatentSteering` is the form for many. It passes SB3's ``check_env`` and goes wherever a gym
    env goes (``make_vec_env``, ``Monitor``, rl-zoo3).

    :param env: a CPU ManiSkill env as ``gym.make`` returns it, any gym env with Box spaces, or an :class:`ActionChunkWrapper`
    :param flow: the policy that is steered; it is frozen
    :param gamma: discount per env step; None is that of an ActionChunkWrapper below, or 0.99
    :param noise_bound: the action space is ``Box(-noise_bound, noise_bound, (T, A))``
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry, which is repeated T times
    :param num_steps: decoding steps; None is the flow's own
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit; None is as in an
        ActionChunkWrapper below, or False
    :param reward_scale: factor on the macro reward; None is that of an ActionChunkWrapper below, or 1
    :raises ValueError: if flow and env do not fit
    """

    def __init__(
        self,
        env: gym.Env,
        flow: NoisePolicy,
        gamma: float | None = None,
        noise_bound: float = 4.0,
        steer_mode: SteerMode = "full",
        num_steps: int | None = None,
        ignore_terminations: bool | None = None,
        reward_scale: float | None = None,
    ) -> None:
        check_flow(flow)
        asked = dict(gamma=gamma, ignore_terminations=ignore_terminations, reward_scale=reward_scale)
        asked = {name: value for name, value in asked.items() if value is not None}
        if not isinstance(env, ActionChunkWrapper):
            env = ActionChunkWrapper(env, flow.act_horizon, flow.obs_horizon, **asked)  # type: ignore[arg-type]
        for name, value in asked.items():
            if getattr(env, name) != value:
                raise ValueError(f"{name}={value} was asked for, but the ActionChunkWrapper below has {getattr(env, name)}")
        super().__init__(env)
        self.steering = Steering(flow, env.gamma, noise_bound, steer_mode, num_steps)
        _check_env_fits(flow, env.observation_space, env.action_space, env.env_id, env.control_mode)
        self.observation_space, self.action_space = self.steering.observation_space, self.steering.action_space
        self._cond = th.zeros(1, flow.cond_dim, device=flow.device)

    @property
    def macro_gamma(self) -> float:
        """Discount of one macro-step, ``gamma ** H``: pass it to PPO as ``gamma``."""
        return self.steering.macro_gamma

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; a seed also seeds the unsteered tail of the noise."""
        if seed is not None:
            self.steering.seed(seed)
        obs, info = self.env.reset(seed=seed, options=options)
        return self._encode(obs), info

    def step(self, w: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param w: noise, (T, A), (H, A) or (1, A), see ``steer_mode``
        :return: features (C,), macro reward, terminated, truncated, info
        """
        chunk = _to_numpy(self.steering.chunk(self._cond, w[None]))[0]
        obs, reward, terminated, truncated, info = self.env.step(chunk)
        return self._encode(obs), float(reward), terminated, truncated, dict(info, action_chunk=chunk)

    def _encode(self, obs: Any) -> np.ndarray:
        self._cond = self.steering.encode(map_frames(lambda x: x[None], obs))
        return _to_numpy(self._cond)[0]


class VecLatentSteering(VecEnvWrapper):
    """
    The form of :class:`LatentSteeringWrapper` for many envs, named like ``VecNormalize``: below it lie chunk envs (one
    message a macro-step), above it the flow decodes all of them in one batch.

    :param venv: vectorised :class:`ActionChunkWrapper` envs (in this process, in worker processes, in Ray actors) or a
        :class:`BatchedChunkEnv`
    :param flow: the policy that is steered; it is frozen
    :param noise_bound: the action space is ``Box(-noise_bound, noise_bound, (T, A))``
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry, which is repeated T times
    :param num_steps: decoding steps; None is the flow's own
    :raises ValueError: if flow and envs do not fit
    """

    def __init__(
        self,
        venv: VecEnv,
        flow: NoisePolicy,
        noise_bound: float = 4.0,
        steer_mode: SteerMode = "full",
        num_steps: int | None = None,
    ) -> None:
        try:
            gamma = float(venv.get_attr("gamma", indices=0)[0])
        except AttributeError as error:
            raise ValueError(
                "VecLatentSteering expects vectorised ActionChunkWrapper envs; for one env use LatentSteeringWrapper, "
                "for ManiSkill envs make_latent_env"
            ) from error
        self.steering = Steering(flow, gamma, noise_bound, steer_mode, num_steps)
        env_id, control_mode = (venv.get_attr(name, indices=0)[0] for name in ("env_id", "control_mode"))
        _check_env_fits(flow, venv.observation_space, venv.action_space, env_id, control_mode)
        super().__init__(venv, self.steering.observation_space, self.steering.action_space)
        # A batched simulator takes and gives tensors; nothing but features, rewards, dones and infos leaves its device.
        self._tensors = isinstance(venv.unwrapped, BatchedChunkEnv)
        self._cond = th.zeros(venv.num_envs, flow.cond_dim, device=flow.device)
        self._chunks = np.zeros((venv.num_envs, flow.act_horizon, flow.action_dim), np.float32)

    @property
    def macro_gamma(self) -> float:
        """Discount of one macro-step, ``gamma ** H``: pass it to PPO as ``gamma``."""
        return self.steering.macro_gamma

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        :param seed: of the envs (at their next reset) and of the unsteered tail of the noise
        """
        self.steering.seed(seed)
        return self.venv.seed(seed)

    def reset(self) -> VecEnvObs:
        """
        :return: features, (N, C)
        """
        self._cond = self.steering.encode(self.venv.reset())
        return _to_numpy(self._cond)

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``
        """
        chunks = self.steering.chunk(self._cond, actions)
        self._chunks = _to_numpy(chunks)
        self.venv.step_async(chunks if self._tensors else self._chunks)  # type: ignore[arg-type]

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: features (N, C), macro rewards (N,), dones (N,), infos
        """
        obs, rewards, dones, infos = self.venv.step_wait()
        self._cond = self.steering.encode(obs)
        ended = [i for i, info in enumerate(infos) if "terminal_observation" in info]
        if ended:
            terminal = stack_frames([infos[i]["terminal_observation"] for i in ended])
            for i, features in zip(ended, _to_numpy(self.steering.encode(terminal)), strict=True):
                infos[i]["terminal_observation"] = features
        for info, chunk in zip(infos, self._chunks, strict=True):
            info["action_chunk"] = chunk
        return _to_numpy(self._cond), rewards, dones, infos


def _to_numpy(x: th.Tensor) -> np.ndarray:
    return x.cpu().numpy().copy()  # copied: what is handed out may be written to


def find_steering(env: gym.Env | VecEnv) -> Steering:
    """
    The steering below any number of wrappers.

    :param env: a steered env, gym or vectorised
    :raises ValueError: if the env is not steered
    """
    layer: Any = env
    while isinstance(layer, VecEnvWrapper) and not isinstance(layer, VecLatentSteering):
        layer = layer.venv
    if isinstance(layer, VecLatentSteering):
        return layer.steering
    try:
        return layer.get_attr("steering", indices=0)[0] if isinstance(layer, VecEnv) else layer.get_wrapper_attr("steering")
    except AttributeError as error:
        raise ValueError(
            f"{type(env).__name__} is not steered: wrap it in LatentSteeringWrapper or VecLatentSteering, "
            f"or use make_latent_env"
        ) from error


def _check_env_fits(
    flow: NoisePolicy, obs_space: spaces.Space, action_space: spaces.Space, env_id: str | None, control_mode: str | None
) -> None:
    if None not in (env_id, flow.env_id) and env_id != flow.env_id:
        raise ValueError(
            f"The flow was trained on {flow.env_id}, but the env is {env_id}; if that is meant, set flow.env_id = None first"
        )
    if None not in (control_mode, flow.control_mode) and control_mode != flow.control_mode:
        raise ValueError(f"The env has control_mode={control_mode!r}, but the flow's actions are for {flow.control_mode!r}")
    obs_shapes = map_frames(lambda space: space.shape, obs_space.spaces if isinstance(obs_space, spaces.Dict) else obs_space)
    for what, found, expected in (
        ("chunks have shape (H, A)", action_space.shape, (flow.act_horizon, flow.action_dim)),
        (
            "observations have shape (obs_horizon, ...)",
            obs_shapes,
            map_frames(lambda shape: (flow.obs_horizon, *shape), flow.obs_shapes),
        ),
    ):
        if found != expected:
            raise ValueError(f"The env does not fit the flow: its {what} = {found}, but the flow's are {expected}")
