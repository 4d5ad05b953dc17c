"""An env whose step is a chunk of actions.

Letters in shapes: ``N`` envs, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features, ``D``
dimensions of one observation, ``k`` env steps really executed in a chunk (1..H), ``w`` noise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from copy import copy
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.steering.adapters import standard_env
from sb3_dsrl.steering.chunks import (
    ActionScaler,
    check_chunking,
    chunk_space,
    episode_summary,
    observing_switch,
    stacked_space,
)
from sb3_dsrl.steering.contract import ignores_terminations
from sb3_dsrl.steering.sim_state import can_restore, cannot_restore, get_sim_state, set_elapsed_steps, set_sim_state
from sb3_dsrl.steering.starts import Recorded, RecordedStarts, StartCurriculum
from sb3_dsrl.utils.observations import map_frames, stack_frames

#: Recorded episodes that may end while they are replayed, one after the other.
MAX_REPLAYS = 20


class ActionChunkWrapper(gym.Wrapper):
    """
    One step of this env is a macro-step: it executes a chunk of H actions and returns the SMDP transition.

    - The reward is ``sum_{i<k} gamma^i r_i`` (times ``reward_scale``).
    - A termination stops the chunk: nothing after it is executed or rewarded.
    - A time limit inside a chunk does not cut it. The chunk runs to its end and the episode is truncated there, so that every
      macro-step from which SB3 bootstraps lasts exactly H env steps and ``gamma ** H`` is its discount. An env that cannot be
      stepped past its time limit needs ``cut_at_time_limit``.
    - Observations are the last ``obs_horizon`` frames, oldest first, copied. A simulator that can leave out the others, with
      ``ignore_terminations``, does so (ManiSkill; see :class:`~sb3_dsrl.envs.fast.observations.ObserveOnDemand`).

    ``info`` holds ``chunk_length`` (k) and, if the env reports ``success`` (or ``is_success``), ``is_success``. At the
    end of an episode it holds ``success_once``, ``success_at_end``, ``episode_return`` (undiscounted, unscaled) and
    ``episode_length`` (env steps), all of which stop counting at the time limit, and SB3's ``episode``: sum of the macro
    rewards and number of macro-steps, as SB3's ``Monitor`` around this env would have it.

    :param env: env with a Box as action space and a Box, or a Dict of Boxes, as observation space; a ManiSkill CPU env as
        ``gym.make`` returns it is unbatched
    :param act_horizon: H
    :param obs_horizon: frames in an observation
    :param gamma: discount per env step
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit; None is
        :func:`~sb3_dsrl.steering.contract.ignores_terminations`
    :param reward_scale: factor on the macro reward
    :param cut_at_time_limit: end the chunk at a time limit, after k <= H env steps. SB3 then bootstraps with ``gamma ** H``
        in place of ``gamma ** k``, which :class:`~sb3_dsrl.ExactBootstrap` corrects
    :param starts: recorded episodes from which most episodes start, such as :class:`~sb3_dsrl.DemoStarts`; None starts as the
        env does. Metrics count from the start on, the time limit from the beginning of the recorded episode. ``info`` holds
        ``start_step``, the steps before the start, and ``start_progress``.
    :raises ValueError: if the env is batched, resets itself or is wrapped in SB3's ``Monitor``, or its spaces do not fit; in
        ``reset`` and ``step``, if an observation or a reward is NaN or infinite
    """

    def __init__(
        self,
        env: gym.Env,
        act_horizon: int,
        obs_horizon: int = 1,
        gamma: float = 0.99,
        ignore_terminations: bool | None = None,
        reward_scale: float = 1.0,
        cut_at_time_limit: bool = False,
        starts: RecordedStarts | None = None,
    ) -> None:
        if isinstance(env, (VecEnv, gym.vector.VectorEnv)):
            raise ValueError(
                f"This wrapper is for one env, found {type(env).__name__} with {env.num_envs}; for many envs use "
                f"make_latent_env, for an SB3 VecEnv of chunk envs VecLatentSteering"
            )
        _check_layers(env)
        env = standard_env(env)
        super().__init__(env)
        check_chunking(act_horizon, obs_horizon, gamma)
        self.act_horizon, self.obs_horizon, self.gamma = act_horizon, obs_horizon, gamma
        self.reward_mode: str | None = getattr(env.unwrapped, "reward_mode", None)
        self.ignore_terminations = ignores_terminations(self.reward_mode, ignore_terminations)
        self.reward_scale = reward_scale
        self.cut_at_time_limit = cut_at_time_limit
        self.action_space = chunk_space(env.action_space, act_horizon)
        self.observation_space = stacked_space(env.observation_space, obs_horizon)
        self._scale = ActionScaler(env.action_space)  # type: ignore[arg-type]
        self._action_dtype = env.action_space.dtype
        self._set_observing = observing_switch(env)
        self.env_id = env.spec.id if env.spec is not None else None
        self.control_mode: str | None = getattr(env.unwrapped, "control_mode", None)
        self._frames: deque[Any] = deque(maxlen=obs_horizon)
        self._episode, self._steps = _EpisodeMetrics(), 0
        self._holding, self._over = False, False
        self._curriculum, self._start_step = None, 0
        if starts is not None:
            starts.check_env(self.env_id, self.control_mode)
            if not can_restore(env):
                raise ValueError(cannot_restore(self.env_id or type(env.unwrapped).__name__))
            self._curriculum = StartCurriculum(starts, obs_horizon)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Starts an episode; the first observation fills all frames.

        :param seed: of the env; None goes on
        :param options: of the env's reset
        :return: observation (obs_horizon, D), or a dict of such; info
        """
        self._set_observing(True)  # a step that raised may have left it off
        curriculum = self._curriculum
        if curriculum is None:
            return self._begin(seed, options, None)
        if seed is not None:
            curriculum.seed(seed)
        for _ in range(MAX_REPLAYS):
            recorded = curriculum.draw()
            result = self._begin(seed, options, recorded)
            if not self._over:
                return result
            seed = None
        raise ValueError(
            f"{curriculum.starts.where}: {MAX_REPLAYS} episodes in a row ended while they were replayed to step "
            f"{self._start_step}: is the time limit of {self.env_id or type(self.env.unwrapped).__name__} shorter than theirs?"
        )

    def _begin(
        self, seed: int | None, options: dict[str, Any] | None, recorded: Recorded | None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode, at its beginning or from a recorded state; ``_over`` says whether that ended it."""
        obs, info = self.env.reset(seed=seed, options=options if recorded is None else (options or {}) | recorded.options)
        self._steps, self._over, self._start_step = 0, False, 0
        self._frames.extend([self._frame(obs)] * self.obs_horizon)
        if recorded is not None:
            self.env.get_wrapper_attr("set_sim_state")(recorded.state)
            set_elapsed_steps(self.env, recorded.elapsed_steps)
            for action in self._scale(recorded.actions).astype(self._action_dtype):
                obs, _, ended, timed_out, info = self.env.step(action)
                self._frames.append(self._frame(obs))
                self._over = self._over or bool(timed_out or (ended and not self.ignore_terminations))
            self._steps = self._start_step = recorded.elapsed_steps + len(recorded.actions)
        self._episode = _EpisodeMetrics()
        return stack_frames(self._frames), info

    @property
    def start_progress(self) -> float | None:
        """How far from the end of recorded episodes starts are, 1 is their beginning; None without ``starts``."""
        return None if self._curriculum is None else self._curriculum.progress

    def set_start_progress(self, progress: float) -> None:
        """
        :param progress: see :attr:`start_progress`
        """
        if self._curriculum is not None:
            self._curriculum.progress = progress

    def use_starts(self, on: bool) -> None:
        """
        Whether the next episodes start from recorded ones. Evaluation switches it off.

        :param on: on in a new env with ``starts``
        """
        if self._curriculum is not None:
            self._curriculum.on = on

    def step(self, chunk: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param chunk: (H, A), in [-1, 1]
        :return: observation (obs_horizon, D), or a dict of such; macro reward, terminated, truncated, info
        """
        steps = self.chunk_steps(chunk)
        try:
            action, observing = next(steps)
            while True:
                self._set_observing(observing)
                action, observing = steps.send(self.env.step(action))
        except StopIteration as end:
            return end.value

    @property
    def can_restore(self) -> bool:
        """Whether the env below can go back to a state, see :mod:`sb3_dsrl.steering.sim_state`."""
        return can_restore(self.env)

    def get_sim_state(self) -> dict[str, Any]:
        """
        :return: everything that the rest of the episode depends on, and its metrics so far; it can be pickled
        :raises ValueError: if the env cannot go back to a state
        """
        episode = copy(self._episode)
        return dict(
            env=get_sim_state(self.env), frames=list(self._frames), episode=episode, steps=self._steps, over=self._over
        )

    def set_sim_state(self, state: dict[str, Any]) -> None:
        """
        Goes back to a state of this episode, as exactly as the simulator can. Which episodes follow does not change.

        :param state: of :meth:`get_sim_state` of this env
        """
        set_sim_state(self.env, state["env"])
        self._frames.extend(state["frames"])
        self._episode, self._steps, self._over = copy(state["episode"]), state["steps"], state["over"]

    def hold_ends(self, hold: bool) -> None:
        """
        Whether to hold an episode at its end, for somebody who looks ahead and goes back afterwards: no ``terminated`` or
        ``truncated`` is returned, so that no ``VecEnv`` resets the env, and a chunk after the end has no env step:
        ``chunk_length`` 0, reward 0, the last observation again. ``info["episode_over"]`` says that the end was reached.

        :param hold: off in a new env
        """
        self._holding = hold

    def chunk_steps(self, chunk: np.ndarray) -> Generator[tuple[np.ndarray, bool], tuple[Any, ...], tuple[Any, ...]]:
        """
        The env steps of a chunk, whoever takes them: :meth:`step`, or somebody who steps several envs together.

        :param chunk: (H, A), in [-1, 1]
        :return: yields each action (A,), and whether the frame after it is seen; is sent what the ``step`` of the env
            returned; returns what :meth:`step` returns
        """
        if np.shape(chunk) != self.action_space.shape:
            raise ValueError(f"A chunk must have shape (H, A) = {self.action_space.shape}, found {np.shape(chunk)}")
        if self._holding and self._over:
            return stack_frames(self._frames), 0.0, False, False, self._held(dict(chunk_length=0) | self._episode.verdict())
        actions = self._scale(np.asarray(chunk))
        macro_reward, terminated, truncated, k = 0.0, False, False, 0
        info: dict[str, Any] = {}
        # A chunk that is always whole shows its last frames only; otherwise any frame may be the last.
        whole = self.ignore_terminations and not self.cut_at_time_limit
        first_seen = self.act_horizon - self.obs_horizon if whole else 0
        for action in actions.astype(self._action_dtype):
            obs, reward, ended, timed_out, info = yield action, k >= first_seen
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
                if self.cut_at_time_limit:
                    break
        macro_reward *= self.reward_scale
        self._episode.end_macro_step(macro_reward)
        info = dict(info, chunk_length=k) | self._episode.verdict()
        self._over = terminated or truncated
        if self._over:
            info.update(self._episode.summary())
            if self._curriculum is not None and not self._holding:
                info.update(start_step=self._start_step, start_progress=self._curriculum.progress)
                self._curriculum.record(info.get("success_once"))
        if self._holding:
            terminated, truncated, info = False, False, self._held(info)
        return stack_frames(self._frames), macro_reward, terminated, truncated, info

    def _held(self, info: dict[str, Any]) -> dict[str, Any]:
        return info | {"episode_over": self._over}

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


def _check_layers(env: gym.Env) -> None:
    if is_wrapped(env, gym.wrappers.Autoreset):
        raise ValueError(
            "Autoreset resets the env by itself, so that a chunk would run into the next episode: pass the env below it"
        )
    if is_wrapped(env, Monitor):
        raise ValueError(
            "Monitor below a chunk env would end an episode in the middle of a chunk: put it above, as in "
            "Monitor(LatentSteeringWrapper(env, flow)) or Monitor(ActionChunkWrapper(env, act_horizon))"
        )


class _EpisodeMetrics:
    """Return, length and success of one episode in env steps, up to the time limit, and what the algorithm saw of it."""

    def __init__(self) -> None:
        self.success: bool | None = None
        self._once = False
        self._return, self._length, self._closed = 0.0, 0, False
        self._macro_return, self._macro_steps = 0.0, 0
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

    def end_macro_step(self, macro_reward: float) -> None:
        self._macro_return += macro_reward
        self._macro_steps += 1

    def close(self) -> None:
        self._closed = True

    def verdict(self) -> dict[str, Any]:
        return {} if self.success is None else {"is_success": self.success}

    def summary(self) -> dict[str, Any]:
        once = self._once if self.success is not None else None
        seen = self._macro_return, self._macro_steps
        return episode_summary(self._return, self._length, *seen, self._start, once, self.success)
