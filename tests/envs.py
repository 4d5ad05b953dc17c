"""Scripted envs and tiny flows that all test files share. Import with ``from tests.envs import ...``."""

import os
import signal
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import ActionChunkWrapper, FlowPolicy, LatentSteeringWrapper, VecLatentSteering, VelocityMLP
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import ProcessWorker, WorkerSettings


class ScriptedEnv(gym.Env):
    """
    Deterministic env: observation and reward depend on the episode, the step and the action and nothing else. As a CPU
    simulator does, it hands out the same observation array every time and overwrites it: whoever keeps it must copy it.

    :param obs_dim: D
    :param action_dim: A
    :param episode_lengths: step of the termination, per episode, in turn; a large one is never reached
    :param success_steps: steps at which ``info["success"]`` is True; None is the step of the termination
    :param action_low: lower bound of the actions
    :param action_high: upper bound
    :param random_start: the seed decides what observations and rewards start from
    """

    def __init__(
        self,
        obs_dim: int = 3,
        action_dim: int = 2,
        episode_lengths: Sequence[int] = (5, 30, 11, 2),
        success_steps: Sequence[int] | None = None,
        action_low: float | Sequence[float] = -1.0,
        action_high: float | Sequence[float] = 1.0,
        random_start: bool = False,
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(
            np.broadcast_to(np.float32(action_low), (action_dim,)), np.broadcast_to(np.float32(action_high), (action_dim,))
        )
        self.episode_lengths, self.success_steps, self.random_start = tuple(episode_lengths), success_steps, random_start
        self.episode, self.t, self.start = -1, 0, 0.0
        self.steps_after_termination = 0
        self.actions: list[np.ndarray] = []  # of all episodes
        self.rewards: list[float] = []
        self.starts: list[float] = []
        self._obs = np.zeros(obs_dim, np.float32)

    @property
    def length(self) -> int:
        """Step at which the current episode terminates."""
        return self.episode_lengths[self.episode % len(self.episode_lengths)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.begin(self.episode + 1, float(self.np_random.uniform(-1, 1)) if self.random_start else 0.0)
        self.starts.append(self.start)
        return self._obs, {}

    def begin(self, episode: int, start: float) -> None:
        """Begins a certain episode."""
        self.episode, self.t, self.start = episode, 0, start
        self._write_obs(np.zeros(self.action_space.shape, np.float32))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action} is outside of {self.action_space}"
        self.steps_after_termination += self.t >= self.length
        self.t += 1
        self.actions.append(action.copy())
        self.rewards.append(float(np.sin(self.start + self.t + 10 * self.episode) + action.mean()))
        self._write_obs(action)
        success = self.t >= self.length if self.success_steps is None else self.t in self.success_steps
        return self._obs, self.rewards[-1], self.t >= self.length, False, {"success": success, **self.report()}

    def report(self) -> dict[str, Any]:
        """What a simulator's info holds besides success."""
        return dict(elapsed_steps=self.t, gripper=dict(at=self._obs[:2].copy()), scene="flat")

    def _write_obs(self, action: np.ndarray) -> None:
        phase = np.arange(len(self._obs)) + self.start + 0.3 * self.t + 7 * self.episode
        self._obs[:] = np.sin(phase) + 0.2 * action.mean()


class BatchedScriptedEnv(gym.Env):
    """
    Several envs behind ManiSkill's batched interface: tensors with a leading axis, partial resets, no reset by itself. It
    hands out the same tensors every time and overwrites them.

    :param envs: the envs; time limits are their own
    """

    def __init__(self, envs: Sequence[gym.Env]) -> None:
        self.envs, self.num_envs, self.device = list(envs), len(envs), th.device("cpu")
        self.single_observation_space, self.single_action_space = envs[0].observation_space, envs[0].action_space
        self._obs: Any = None

    def reset(self, *, seed: list[int] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert seed is None or len(seed) == self.num_envs
        index = (options or {}).get("env_idx", range(self.num_envs))
        for i in map(int, index):
            self._write(i, self.envs[i].reset(seed=None if seed is None else seed[i])[0])
        return self._obs, {}

    def step(self, actions: th.Tensor) -> tuple[Any, ...]:
        assert isinstance(actions, th.Tensor) and actions.shape == (self.num_envs, *self.single_action_space.shape)
        results = [env.step(action.numpy()) for env, action in zip(self.envs, actions, strict=True)]
        for i, result in enumerate(results):
            self._write(i, result[0])
        rewards, ended, limits = (th.tensor([result[c] for result in results]) for c in (1, 2, 3))
        infos = [result[4] for result in results]
        info = {key: th.tensor([own[key] for own in infos]) for key in ("success", "elapsed_steps")}
        at = th.from_numpy(np.stack([own["gripper"]["at"] for own in infos]))
        return self._obs, rewards, ended, limits, dict(info, gripper=dict(at=at), scene=infos[0]["scene"])

    def _write(self, i: int, obs: Any) -> None:
        parts = obs if isinstance(obs, dict) else {"": obs}
        if self._obs is None:
            empty = {key: th.zeros(self.num_envs, *x.shape, dtype=th.from_numpy(x).dtype) for key, x in parts.items()}
            self._obs = empty if isinstance(obs, dict) else empty[""]
        for key, x in parts.items():
            (self._obs[key] if isinstance(obs, dict) else self._obs)[i] = th.from_numpy(x)


class RestorableEnv(ScriptedEnv):
    """A :class:`ScriptedEnv` that can go back to a state, and counts all steps that it has ever made."""

    made = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.made += 1
        return super().step(action)

    def get_sim_state(self) -> dict[str, Any]:
        return dict(episode=self.episode, t=self.t, start=self.start, obs=self._obs.copy())

    def set_sim_state(self, state: dict[str, Any]) -> None:
        self.episode, self.t, self.start = state["episode"], state["t"], state["start"]
        self._obs[:] = state["obs"]


class RestorableBatch(BatchedScriptedEnv):
    """
    Several :class:`RestorableEnv` behind ManiSkill's batched interface, with its ``get_state_dict`` and ``set_state_dict``,
    which know the simulator and neither the elapsed steps nor the controllers.
    """

    def __init__(self, envs: Sequence[gym.Env]) -> None:
        super().__init__(envs)
        self.base: list[Any] = [env.unwrapped for env in envs]
        self._elapsed_steps = th.zeros(self.num_envs, dtype=th.int32)
        self.agent: Any = types.SimpleNamespace(controller=types.SimpleNamespace(target=th.zeros(self.num_envs, 2)))

    def reset(self, *, seed: list[int] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        for i in map(int, (options or {}).get("env_idx", range(self.num_envs))):
            self._elapsed_steps[i], self.agent.controller.target[i] = 0, 0.0
        return result

    def step(self, actions: th.Tensor) -> tuple[Any, ...]:
        """The env's own clock is the tensor that the simulator does not know."""
        for env, t in zip(self.envs, self._elapsed_steps.tolist(), strict=True):
            env.unwrapped.t = t  # type: ignore[attr-defined]
            if isinstance(env, TimeLimit):
                env._elapsed_steps = t
        self._elapsed_steps += 1
        self.agent.controller.target += actions
        obs, rewards, *rest = super().step(actions)
        return obs, rewards + self.agent.controller.target.sum(dim=1), *rest

    def get_state_dict(self) -> dict[str, Any]:
        rows = th.tensor([[env.episode, env.start] for env in self.base], dtype=th.float64)
        return {"actors": {"scripts": rows}, "articulations": {"obs": self._obs}}

    def set_state_dict(self, state: dict[str, Any], env_idx: th.Tensor) -> None:
        for i, (episode, start), obs in zip(
            env_idx.tolist(), state["actors"]["scripts"].tolist(), state["articulations"]["obs"], strict=True
        ):
            self.base[i].episode, self.base[i].start = int(episode), start
            self.base[i]._obs[:] = obs.numpy()


class Numbered(ScriptedEnv):
    """
    Knows its number, and fails.

    :param number: its own
    :param fail: "die" ends its process, "raise" raises, "hang" sleeps for a day, "nan obs" and "nan reward" return NaN
    :param fail_at: step of the episode
    :param marker: file that is made at the failure, which then does not happen again
    """

    def __init__(self, number: int = 0, fail: str | None = None, fail_at: int = 7, marker: Path | None = None) -> None:
        super().__init__(episode_lengths=(100,), random_start=True)
        self.number, self.fail, self.fail_at, self.marker = number, fail, fail_at, marker

    def step(self, action: np.ndarray):
        if self.fail and self.t + 1 == self.fail_at and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            if self.fail == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fail == "hang":
                time.sleep(86_400)
            if self.fail == "raise":
                raise ValueError(f"env {self.number} is out of order")
            obs, reward, *rest = super().step(action)
            return (obs * np.nan, reward, *rest) if self.fail == "nan obs" else (obs, np.nan, *rest)
        return super().step(action)

    def process(self) -> int:
        return os.getpid()

    def twice(self, x: int) -> int:
        return 2 * x + self.number

    @property
    def threads(self) -> int:
        return th.get_num_threads()

    @property
    def cuda(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    @property
    def unpicklable(self):
        return lambda: None


def numbered(
    n: int,
    n_workers: int | None,
    worker: type = ProcessWorker,
    on_failure: Any = "raise",
    timeout: float | None = 600.0,
    **failing: Any,
) -> WorkerVecEnv:
    """Chunk envs (H = 3, two frames, 12 env steps) in workers. The second one gets the arguments ``failing``."""

    def make(i: int) -> gym.Env:
        env = Numbered(i, **(failing if i == 1 else {}))
        return ActionChunkWrapper(gym.wrappers.TimeLimit(env, 12), act_horizon=3, obs_horizon=2)

    return WorkerVecEnv([lambda i=i: make(i) for i in range(n)], WorkerSettings(n_workers, on_failure, worker, timeout))


def scripted(time_limit: int | None = None, **kwargs: Any) -> gym.Env:
    """A :class:`ScriptedEnv`, with gymnasium's TimeLimit if asked for."""
    env = ScriptedEnv(**kwargs)
    return env if time_limit is None else TimeLimit(env, time_limit)


def tiny_flow(
    obs_dim: int = 3,
    action_dim: int = 2,
    pred_horizon: int = 4,
    act_horizon: int = 3,
    obs_horizon: int = 2,
    seed: int = 0,
    policy_class: type[FlowPolicy] = FlowPolicy,
    **kwargs: Any,
) -> FlowPolicy:
    """An untrained, frozen flow that decodes in 2 steps. Another seed is another flow; the global generator is left alone."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        flow = policy_class.create(
            obs_dim,
            action_dim,
            obs_horizon,
            pred_horizon,
            act_horizon,
            net_class=VelocityMLP,
            net_kwargs=dict(width=16, n_blocks=1, embed_dim=8),
            critic_kwargs=dict(width=16, n_heads=3),
            **(dict(num_steps=2) | kwargs),
        )
    return flow.freeze()


def gym_steered(flow: FlowPolicy, envs: Sequence[gym.Env], **kwargs: Any) -> VecEnv:
    """Every env in its own LatentSteeringWrapper, in a DummyVecEnv."""
    return DummyVecEnv([lambda env=env: LatentSteeringWrapper(env, flow, **kwargs) for env in envs])


def vec_steered(flow: FlowPolicy, envs: Sequence[gym.Env], **kwargs: Any) -> VecEnv:
    """VecLatentSteering over a DummyVecEnv of ActionChunkWrapper."""
    chunk_kwargs = {
        key: kwargs.pop(key) for key in ("gamma", "ignore_terminations", "reward_scale", "cut_at_time_limit") if key in kwargs
    }
    chunk_envs = [lambda env=env: ActionChunkWrapper(env, flow.act_horizon, flow.obs_horizon, **chunk_kwargs) for env in envs]
    return VecLatentSteering(DummyVecEnv(chunk_envs), flow, **kwargs)


#: Both forms of the wrapper behind one call, ``make(flow, envs, **kwargs)``.
FORMS = {"gym form": gym_steered, "vec form": vec_steered}
