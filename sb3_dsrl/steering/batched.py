"""Chunks on a simulator that steps many copies of an env at once: tensors stay on its device until the chunk is done."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_dsrl.steering.batched_infos import last_counted, split_info
from sb3_dsrl.steering.batched_metrics import BatchedMetrics
from sb3_dsrl.steering.batched_state import can_restore_batch, get_batch_state, set_batch_state
from sb3_dsrl.steering.chunks import (
    ActionScaler,
    check_chunking,
    chunk_space,
    episode_summary,
    observing_switch,
    stacked_space,
)
from sb3_dsrl.steering.contract import ignores_terminations
from sb3_dsrl.steering.sim_state import cannot_restore
from sb3_dsrl.steering.vector_adapter import VectorAdapter, batched_interface
from sb3_dsrl.utils.observations import map_frames


class BatchedChunkEnv(VecEnv):
    """
    The form of :class:`~sb3_dsrl.ActionChunkWrapper` for a batched simulator, with the same semantics for each of its envs.

    Most batched simulators cannot leave one env out of a step. After a termination inside a chunk that env is stepped on with
    the middle of its action bounds, but nothing of it counts: its reward, frames and metrics stay as they were. Envs whose
    episode ended are reset together at the end of the chunk.

    Which simulators it takes, all with exact transitions:

    - ManiSkill's, and vector envs of gymnasium that reset nothing by themselves (``AutoresetMode.DISABLED``): they are stepped
      past an end, as said above. A time limit does not cut a chunk.
    - EnvPool (``env_type="gymnasium"``): envs that ended are left out of the steps. A time limit cuts a chunk, as
      ``cut_at_time_limit`` of ActionChunkWrapper does: k < H, and :class:`~sb3_dsrl.ExactBootstrap` corrects PPO.
    - vector envs that reset themselves (``NEXT_STEP``, ``SAME_STEP``), as long as all episodes end in the same step, as those
      of tasks without terminations do; the first env that ends alone is an error. A time limit cuts a chunk.

    Observations are tensors on the simulator's device, (N, obs_horizon, D) or a dict of such, and so are terminal
    observations; rewards and dones are NumPy. :class:`~sb3_dsrl.VecLatentSteering` turns observations into features. Infos
    hold what the simulator reported for that env at its last step that counts, and the keys of ActionChunkWrapper.

    :param env: a ``gymnasium.vector.VectorEnv``, EnvPool, or an env with ManiSkill's batched interface: ``num_envs``,
        ``device``, ``single_observation_space``, ``single_action_space``; ``step`` takes and gives tensors with a leading axis
        N; ``reset(options={"env_idx": ...})`` resets a part; nothing resets by itself
    :param act_horizon: H
    :param obs_horizon: frames in an observation
    :param gamma: discount per env step
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit; None is
        :func:`~sb3_dsrl.steering.contract.ignores_terminations`
    :param reward_scale: factor on the macro reward
    :raises ValueError: if the env has no such interface, an argument is out of range, or terminations are to be ignored of a
        simulator that resets itself
    """

    def __init__(
        self,
        env: gym.Env | gym.vector.VectorEnv,
        act_horizon: int,
        obs_horizon: int = 1,
        gamma: float = 0.99,
        ignore_terminations: bool | None = None,
        reward_scale: float = 1.0,
    ) -> None:
        simulator: Any = batched_interface(env)
        base: Any = simulator.unwrapped
        if not hasattr(base, "single_action_space"):
            raise ValueError(
                f"BatchedChunkEnv needs an env with ManiSkill's batched interface, found {type(base).__name__} without "
                f"single_action_space; for one env use ActionChunkWrapper"
            )
        check_chunking(act_horizon, obs_horizon, gamma)
        self.env, self.device = simulator, th.device(base.device)
        self.act_horizon, self.obs_horizon, self.gamma = act_horizon, obs_horizon, gamma
        self.reward_mode: str | None = getattr(base, "reward_mode", None)
        self.ignore_terminations = ignores_terminations(self.reward_mode, ignore_terminations)
        self.reward_scale = reward_scale
        self.cut_at_time_limit: bool = getattr(base, "cut_at_time_limit", False)
        if self.ignore_terminations and self.cut_at_time_limit:
            raise ValueError(
                f"ignore_terminations=True needs a simulator that can be stepped past a termination, found {base.venv}, "
                f"which resets itself"
            )
        self.env_id = simulator.spec.id if simulator.spec is not None else None
        self.control_mode: str | None = getattr(base, "control_mode", None)
        self.render_mode = simulator.render_mode
        single = base.single_action_space
        super().__init__(
            base.num_envs, stacked_space(base.single_observation_space, obs_horizon), chunk_space(single, act_horizon)
        )
        self._scale = ActionScaler(single, lambda bound: th.as_tensor(bound, device=self.device))
        self._idle = self._scale(th.zeros(single.shape, device=self.device))
        self._set_observing = observing_switch(simulator)
        self._rng = np.random.default_rng()
        self._frames: Any = None
        self._chunks = th.zeros(self.num_envs, *self.action_space.shape, device=self.device)  # type: ignore[misc]
        self._metrics = BatchedMetrics(self.num_envs, self.device)
        self._holding = False
        self._over = th.zeros(self.num_envs, dtype=th.bool, device=self.device)

    def reset(self) -> Any:
        """
        :return: (N, obs_horizon, D) or a dict of such; the first observation fills all frames
        """
        if any(seed is not None for seed in self._seeds):
            if not getattr(self.env, "takes_seeds", True):
                warnings.warn(
                    "EnvPool takes its seed when it is made, envpool.make(..., seed=...): seed() has no effect on it"
                )
            self._rng = np.random.default_rng(self._seeds[0])
        else:
            self._seeds = self._rng.integers(2**31, size=self.num_envs).tolist()
        obs, info = self.env.reset(seed=self._seeds, options=self._options[0] or {})  # type: ignore[arg-type]
        self.reset_infos = split_info(info, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        self._frames = map_frames(self._filled, obs)
        self._metrics.start(th.arange(self.num_envs, device=self.device))
        self._over = th.zeros_like(self._over)
        return self._frames

    def step_async(self, actions: th.Tensor | np.ndarray) -> None:  # type: ignore[override]
        """
        :param actions: chunks, (N, H, A), in [-1, 1]
        :raises ValueError: if the shape is another one
        """
        expected = (self.num_envs, *self.action_space.shape)  # type: ignore[misc]
        if tuple(actions.shape) != expected:
            raise ValueError(f"Chunks must have shape (N, H, A) = {expected}, found {tuple(actions.shape)}")
        self._chunks = th.as_tensor(actions, dtype=th.float32, device=self.device)

    @th.no_grad()
    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, macro rewards (N,), dones (N,), infos
        """
        metrics = self._metrics
        actions = self._scale(self._chunks)
        alive = ~self._over if self._holding else th.ones_like(self._over)
        terminated, truncated, k = th.zeros_like(alive), th.zeros_like(alive), th.zeros_like(alive, dtype=th.float32)
        macro_reward = th.zeros_like(k)
        report: dict[str, Any] = {}
        for i in range(self.act_horizon):
            if i and self.device.type == "cpu" and not alive.any():  # on a GPU the question would cost more than the answer
                break
            # without terminations the policy sees the last frames of a chunk only
            self._set_observing(not self.ignore_terminations or i >= self.act_horizon - self.obs_horizon)
            step: Any = self.env.step(th.where(alive[:, None], actions[:, i], self._idle))
            obs, reward, ended, timed_out, info = step
            reward = th.where(alive, reward.float(), 0.0)
            macro_reward += self.gamma**i * reward
            k += alive
            self._frames = map_frames(lambda old, new, alive=alive: self._pushed(old, new, alive), self._frames, obs)
            metrics.update(reward, info, alive)
            report = info if self.ignore_terminations else last_counted(report, info, alive)
            if not self.ignore_terminations:
                terminated |= ended & alive
                alive = alive & ~ended
            truncated |= timed_out & alive
            metrics.close(timed_out & alive)
            if self.cut_at_time_limit:
                alive = alive & ~timed_out
        return self._finish(report, self.reward_scale * macro_reward, terminated, truncated, k)

    def _finish(self, report: dict[str, Any], macro_reward: th.Tensor, *outcome: th.Tensor) -> VecEnvStepReturn:
        self._metrics.end_macro_step(macro_reward)
        columns = (macro_reward, *outcome, *self._metrics.rows())
        rows = th.stack([column.float() for column in columns]).cpu().numpy()  # one transfer
        rewards, ends, limits, lengths, returns, steps, seen, macro_steps, once, success = rows
        if not np.isfinite(rewards).all():
            envs = np.flatnonzero(~np.isfinite(rewards)).tolist()
            raise ValueError(f"{self.env_id or 'The simulator'}: rewards of envs {envs} are NaN or infinite")
        dones = (ends + limits) > 0
        if self._holding:
            self._over = self._over | th.as_tensor(dones, device=self.device)
        knows_success = self._metrics.knows_success
        infos = split_info(report, self.num_envs)
        for i, info in enumerate(infos):
            info |= {"chunk_length": int(lengths[i]), "TimeLimit.truncated": bool(limits[i] and not ends[i])}
            if knows_success:
                info["is_success"] = bool(success[i])
            if dones[i]:
                verdict = (bool(once[i]), bool(success[i])) if knows_success else (None, None)
                sums = float(returns[i]), int(steps[i]), float(seen[i]), int(macro_steps[i])
                info |= episode_summary(*sums, self._metrics.started[i], *verdict)
        if self._holding:
            for info, over in zip(infos, self._over.tolist(), strict=True):
                info |= {"episode_over": over, "TimeLimit.truncated": False}
            return self._frames, rewards.copy(), np.zeros_like(dones), infos
        finished = np.flatnonzero(dones)
        if len(finished):
            self._restart(finished, infos)
        return self._frames, rewards.copy(), dones, infos

    def _restart(self, finished: np.ndarray, infos: list[dict[str, Any]]) -> None:
        index = th.as_tensor(finished, device=self.device)
        terminal = map_frames(lambda frames: frames[index], self._frames)  # indexing copies
        for j, i in enumerate(finished):
            infos[i]["terminal_observation"] = map_frames(lambda frames, j=j: frames[j], terminal)
        # ManiSkill starts an episode without a seed from torch's global generator, whose state belongs to the caller.
        with th.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            th.manual_seed(int(self._rng.integers(2**31)))
            obs, info = self.env.reset(options={"env_idx": index})
        fresh_infos = split_info(info, self.num_envs)
        for i in finished:
            self.reset_infos[i] = fresh_infos[i]
        fresh = th.zeros(self.num_envs, dtype=th.bool, device=self.device)
        fresh[index] = True
        self._frames = map_frames(lambda old, new: _where(fresh, self._filled(new), old), self._frames, obs)
        self._metrics.start(index)

    def _filled(self, frame: th.Tensor) -> th.Tensor:
        return _as_frame(frame)[:, None].repeat_interleave(self.obs_horizon, dim=1)

    def _pushed(self, frames: th.Tensor, frame: th.Tensor, alive: th.Tensor) -> th.Tensor:
        # concatenation copies: the tensors of a simulator may alias its memory
        pushed = th.cat([frames[:, 1:], _as_frame(frame)[:, None]], dim=1)
        return pushed if self.ignore_terminations and not self._holding else _where(alive, pushed, frames)

    @property
    def can_restore(self) -> bool:
        """Whether the simulator can go back to a state, see :mod:`sb3_dsrl.steering.batched_state`."""
        return can_restore_batch(self.env)

    def get_sim_state(self) -> dict[str, Any]:
        """
        :return: everything that the rest of the episodes depends on, and their metrics so far, of all envs
        :raises ValueError: if the simulator cannot go back to a state
        """
        if not self.can_restore:
            raise ValueError(cannot_restore(self.env_id or str(self.env)))
        frames = map_frames(th.clone, self._frames)
        return dict(env=get_batch_state(self.env), frames=frames, metrics=self._metrics.state(), over=self._over.clone())

    def set_sim_state(self, state: dict[str, Any], indices: VecEnvIndices = None) -> None:
        """
        Goes back to a state of these episodes, as exactly as the simulator can. Which episodes follow does not change.

        :param state: of :meth:`get_sim_state`
        :param indices: of the envs that go back; None are all
        """
        index = th.as_tensor(sorted(self._get_indices(indices)), device=self.device)
        set_batch_state(self.env, state["env"], index)
        mask = th.zeros(self.num_envs, dtype=th.bool, device=self.device)
        mask[index] = True
        self._frames = map_frames(lambda old, new: _where(mask, old, new), state["frames"], self._frames)
        self._metrics.set_state(state["metrics"], index)
        self._over = th.where(mask, state["over"], self._over)

    def hold_ends(self, hold: bool) -> None:
        """
        See :meth:`ActionChunkWrapper.hold_ends <sb3_dsrl.ActionChunkWrapper.hold_ends>`.

        :param hold: off in a new env
        """
        self._holding = hold

    def close(self) -> None:
        """Closes the simulator."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture an env, if it was made with ``render_mode="rgb_array"``."""
        return list(np.asarray(th.as_tensor(self.env.render()).cpu()))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of this env or of the simulator, the same for each index."""
        value = getattr(self, attr_name) if hasattr(self, attr_name) else self.env.get_wrapper_attr(attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Sets an attribute of the simulator, which all its envs share.

        :raises ValueError: if it is meant for some of them only
        """
        self._all_or_none(f"set_attr({attr_name!r})", indices)
        simulator: Any = self.env.venv if isinstance(self.env, VectorAdapter) else self.env
        setattr(simulator.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Calls a method of the simulator once, for all its envs.

        :return: its result, repeated for each env
        :raises ValueError: if it is meant for some of them only
        """
        self._all_or_none(f"env_method({method_name!r})", indices)
        return [self.env.get_wrapper_attr(method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether the simulator is wrapped in this class, the same for each index."""
        return [is_wrapped(self.env, wrapper_class) for _ in self._get_indices(indices)]

    def _all_or_none(self, what: str, indices: VecEnvIndices) -> None:
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"{what} was asked for envs {indices}, but the envs of a batched simulator are one object")


def _as_frame(frame: th.Tensor) -> th.Tensor:
    return frame.float() if frame.is_floating_point() else frame


def _where(mask: th.Tensor, yes: th.Tensor, no: th.Tensor) -> th.Tensor:
    return th.where(mask.reshape(-1, *[1] * (yes.dim() - 1)), yes, no)
