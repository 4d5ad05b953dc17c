"""Vector envs of gymnasium, and EnvPool, behind ManiSkill's batched interface."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.vector import SyncVectorEnv, VectorEnv

from sb3_dsrl.utils.observations import map_frames


class VectorAdapter(gym.Env):
    """
    ManiSkill's batched interface over a vector env, NumPy or torch: tensors with a leading axis N on one device, a reset of
    some envs by ``options={"env_idx": ...}``, and no episode that begins before it is asked for.

    :param venv: the vector env; tensors stay on its ``device``, arrays become tensors on the CPU
    """

    #: Whether an episode cannot go on past its time limit, so that a chunk is cut there.
    cut_at_time_limit: ClassVar[bool] = True
    #: Whether the reset of all envs takes seeds.
    takes_seeds: ClassVar[bool] = True

    def __init__(self, venv: Any) -> None:
        self.venv, self.num_envs = venv, int(venv.num_envs)
        self.single_observation_space, self.single_action_space = venv.single_observation_space, venv.single_action_space
        self.device = th.device(_found(venv, "device", "cpu"))
        self.reward_mode, self.control_mode = (_found(venv, name) for name in ("reward_mode", "control_mode"))
        self.spec = venv.spec if isinstance(venv.spec, gym.envs.registration.EnvSpec) else None
        self.render_mode = venv.render_mode
        self._torch = False

    def _tensors(self, obs: Any) -> Any:
        return map_frames(lambda x: th.as_tensor(x, device=self.device), obs)

    def _actions(self, actions: th.Tensor) -> Any:
        return actions if self._torch else actions.cpu().numpy().astype(self.single_action_space.dtype, copy=False)

    def _step_all(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.venv.step(self._actions(actions))
        outcome = (th.as_tensor(column, device=self.device) for column in (reward, terminated, truncated))
        return self._tensors(obs), *outcome, info  # type: ignore[return-value]

    def _reset_all(self, seed: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # a list of seeds is not known to every vector env; its first one means the same: env i gets seed + i
        obs, info = self.venv.reset(seed=None if seed is None else int(seed[0]), options=options or None)
        self._torch = isinstance(next(iter(obs.values())) if isinstance(obs, dict) else obs, th.Tensor)
        return self._tensors(obs), info

    def get_wrapper_attr(self, name: str) -> Any:
        """An attribute of this adapter or of the vector env, from the outermost wrapper inwards."""
        missing = object()
        value = getattr(self, name) if hasattr(self, name) else _found(self.venv, name, missing)
        if value is missing:
            raise AttributeError(f"{type(self.venv.unwrapped).__name__} has no attribute {name!r}")
        return value

    def render(self) -> Any:
        """One picture an env, (N, height, width, 3)."""
        return np.stack(self.venv.render())

    def close(self) -> None:
        """Closes the vector env."""
        self.venv.close()


class ManualResetAdapter(VectorAdapter):
    """
    Over a vector env that resets nothing by itself (``AutoresetMode.DISABLED``). As with ManiSkill, envs whose episode ended
    are stepped on, past time limits as well, until they are reset together by ``options={"reset_mask": ...}``.
    """

    cut_at_time_limit = False

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: N seeds, of which the first counts: env i gets it plus i; None goes on
        :param options: of the vector env's reset; "env_idx" are the envs that are reset
        :return: observations of all envs, info
        """
        others = dict(options or {})
        index = others.pop("env_idx", None)
        if index is None:
            return self._reset_all(seed, others)
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[np.asarray(index.cpu())] = True
        obs, info = self.venv.reset(options=others | {"reset_mask": mask})
        return self._tensors(obs), info

    def step(self, action: th.Tensor) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """
        :param action: (N, A)
        :return: observations, rewards, terminated, truncated, info
        """
        base = self.venv.unwrapped
        if isinstance(base, SyncVectorEnv):  # alone among them, it asserts that no env has ended
            base._autoreset_envs = np.zeros(self.num_envs, dtype=bool)
        return self._step_all(action)


class LockstepAdapter(VectorAdapter):
    """
    Over a vector env that resets itself and steps all its envs or none (``NEXT_STEP`` and ``SAME_STEP``). An env that ended
    could be kept from its next episode only by keeping all others from going on. So their episodes must end in the same step,
    as they do in tasks that end by nothing but a time limit. Then everything is exact.

    :raises RuntimeError: in ``step``, if an env ends while others go on
    """

    def __init__(self, venv: Any) -> None:
        super().__init__(venv)
        self._same_step = _mode(venv) == "SAME_STEP"
        self._ended = False
        self._steps = 0
        self._action = th.zeros(0)
        self._last: tuple[Any, dict[str, Any]] = (None, {})
        self._fresh: tuple[Any, dict[str, Any]] | None = None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: N seeds, of which the first counts: env i gets it plus i; None goes on
        :param options: of the vector env's reset; "env_idx" can be nothing but all envs
        :return: observations of all envs, info
        """
        others = {key: value for key, value in (options or {}).items() if key != "env_idx"}
        resets_itself, fresh = self._ended and seed is None, self._fresh
        self._ended, self._fresh, self._steps = False, None, 0
        if not resets_itself:
            return self._reset_all(seed, others)
        if fresh is None:  # NEXT_STEP: the next step is the reset, whatever its actions are
            obs, *_, info = self._step_all(self._action)
            fresh = obs, info
        return fresh

    def step(self, action: th.Tensor) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """
        :param action: (N, A)
        :return: observations, the last ones of the episode where it ended; rewards, terminated, truncated, info
        """
        if self._ended:
            zero = th.zeros(self.num_envs, device=self.device)
            return self._last[0], zero, zero.bool(), zero.bool(), self._last[1]
        obs, reward, terminated, truncated, info = self._step_all(action)
        self._steps += 1
        ended = terminated.bool() | truncated.bool()
        if ended.any():
            if not ended.all():
                which = th.nonzero(ended).flatten().tolist()
                raise RuntimeError(
                    f"{self.venv}: after step {self._steps} of their episodes envs {which} ended and others did not; it "
                    f"resets itself and cannot leave them out of the rest of a chunk: make it with "
                    f"autoreset_mode=AutoresetMode.DISABLED, or put ActionChunkWrapper envs into a SubprocVecEnv"
                )
            self._ended, self._action = True, action
            if self._same_step:
                last, last_info = info.pop("final_obs"), info.pop("final_info", {})
                info = {key: value for key, value in info.items() if key not in ("_final_obs", "_final_info")}
                self._fresh = obs, info
                obs, info = self._tensors(_stacked(last)), last_info
        self._last = obs, info
        return obs, reward, terminated, truncated, info


class EnvPoolAdapter(VectorAdapter):
    """
    Over EnvPool, which can step and reset a part of its envs: one whose episode ended is left out until it is reset. EnvPool
    would begin its next episode at its next step, time limit or not, so that chunks are cut there.
    """

    takes_seeds = False  # they are an argument of envpool.make

    def __init__(self, venv: Any) -> None:
        if not hasattr(venv, "single_action_space") or not hasattr(venv, "render_mode"):
            raise ValueError(f'EnvPool must be made with env_type="gymnasium", found {type(venv).__name__}')
        if venv.config["batch_size"] not in (0, venv.config["num_envs"]):
            raise ValueError(
                f"EnvPool must be made with batch_size = num_envs, found {venv.config['batch_size']} and {venv.num_envs}"
            )
        super().__init__(venv)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        self._obs: Any = None
        self._info: dict[str, Any] = {}

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: without effect: EnvPool takes seeds when it is made
        :param options: "env_idx" are the envs that are reset; None are all
        :return: observations of all envs, info
        """
        index = (options or {}).get("env_idx")
        envs = np.arange(self.num_envs) if index is None else np.asarray(index.cpu())
        obs, info = self.venv.reset(envs.astype(np.int32))
        self._ended[envs] = False
        self._keep(obs, info)
        return self._tensors(self._obs), self._info

    def step(self, action: th.Tensor) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """
        :param action: (N, A); those of envs that ended are ignored
        :return: observations, rewards, terminated, truncated, info; of envs that ended, what was last known, and a reward of 0
        """
        outcome = np.zeros((3, self.num_envs), np.float32)
        going = np.flatnonzero(~self._ended).astype(np.int32)
        if len(going):
            obs, reward, terminated, truncated, info = self.venv.step(self._actions(action)[going], going)
            envs = self._keep(obs, info)
            outcome[:, envs] = reward, terminated, truncated
            self._ended[envs] = terminated | truncated
        rewards, ends, limits = th.as_tensor(outcome, device=self.device)
        return self._tensors(self._obs), rewards, ends.bool(), limits.bool(), self._info

    def render(self) -> Any:
        """One picture an env, (N, height, width, 3)."""
        return self.venv.render(env_ids=self.venv.all_env_ids)

    def _keep(self, obs: Any, info: dict[str, Any]) -> np.ndarray:
        """Writes the rows of some envs over those of before, and says which envs they are of."""
        envs = info["env_id"]
        info = {key: value for key, value in info.items() if key not in ("env_id", "players")}
        old = map_frames(lambda _: None, obs) if self._obs is None else self._obs
        self._obs = map_frames(lambda before, rows: self._written(before, rows, envs), old, obs)
        self._info = self._written_info(self._info, info, envs)
        return envs

    def _written(self, before: np.ndarray | None, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        kept = np.zeros((self.num_envs, *rows.shape[1:]), rows.dtype) if before is None else before.copy()
        kept[envs] = rows
        return kept

    def _written_info(self, before: dict[str, Any], info: dict[str, Any], envs: np.ndarray) -> dict[str, Any]:
        return before | {
            key: self._written_info(before.get(key, {}), rows, envs)
            if isinstance(rows, dict)
            else self._written(before.get(key), rows, envs)
            for key, rows in info.items()
        }


def batched_interface(env: Any) -> Any:
    """
    :param env: an env with ManiSkill's batched interface, a vector env of gymnasium, or EnvPool
    :return: a vector env in its adapter; any other env as it is
    :raises ValueError: if it is a vector env of which no adapter is exact
    """
    if hasattr(env, "all_env_ids"):
        return EnvPoolAdapter(env)
    if not isinstance(env, VectorEnv):
        return env
    if not isinstance(env.unwrapped, VectorEnv):
        raise ValueError(f"{type(env).__name__} resets the envs of a batched simulator by itself: pass what gym.make returned")
    mode = _mode(env)
    if mode == "DISABLED":
        return ManualResetAdapter(env)
    if mode in ("NEXT_STEP", "SAME_STEP"):
        return LockstepAdapter(env)
    found = env.metadata.get("autoreset_mode")
    raise ValueError(f'{env}: metadata["autoreset_mode"] must be an AutoresetMode of gymnasium, found {found!r}')


def _mode(venv: VectorEnv) -> str:
    mode = venv.metadata.get("autoreset_mode")
    return getattr(mode, "name", str(mode))


def _found(venv: Any, name: str, default: Any = None) -> Any:
    """An attribute of a vector env or of what it wraps."""
    layer = venv
    while layer is not None:
        if hasattr(layer, name):
            return getattr(layer, name)
        layer = getattr(layer, "env", None)
    return default


def _stacked(rows: Any) -> Any:
    """gymnasium's array of N observations as one batch; other simulators give the batch."""
    if not (isinstance(rows, np.ndarray) and rows.dtype == object):
        return rows
    return map_frames(lambda *parts: np.stack(parts), *rows)
