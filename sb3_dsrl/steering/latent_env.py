"""One env whose action is flow noise: the gym form.

Letters in shapes: ``N`` envs, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features, ``D``
dimensions of one observation, ``k`` env steps really executed in a chunk (1..H), ``w`` noise.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.monitor import Monitor

from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.steering.chunk_env import ActionChunkWrapper
from sb3_dsrl.steering.contract import REWARDS, Contract, SteerMode
from sb3_dsrl.steering.observing import Observer, ObsKind
from sb3_dsrl.steering.sim_state import get_sim_state, set_sim_state
from sb3_dsrl.steering.steering import Steering, check_env_fits, to_numpy
from sb3_dsrl.utils.observations import map_frames


class LatentSteeringWrapper(gym.Wrapper):
    """
    Turns an env into one whose action is the noise of a frozen flow, and whose observation is the flow's features.

    For one env; :class:`VecLatentSteering` is the form for many. It passes SB3's ``check_env`` and goes wherever a gym
    env goes (``make_vec_env``, ``Monitor``, rl-zoo3).

    :param env: a CPU ManiSkill env as ``gym.make`` returns it, any gym env with Box spaces, or an :class:`ActionChunkWrapper`.
        SB3's ``Monitor`` may lie directly below, where ``make_vec_env`` puts it; it then records macro-steps.
    :param flow: the policy that is steered, or its folder (:func:`~sb3_dsrl.policies.loading.resolve_flow`); it is frozen
    :param gamma: discount per env step; None is that of an ActionChunkWrapper below, or the flow's
    :param noise_bound: the action space is ``Box(-noise_bound, noise_bound, (T, A))``
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry, which is repeated T times
    :param num_steps: decoding steps; None is the flow's own
    :param ignore_terminations: as in ManiSkill: go on after success or failure, until the time limit; None is as in an
        ActionChunkWrapper below, or :func:`~sb3_dsrl.steering.contract.ignores_terminations`
    :param reward_scale: factor on the macro reward; None is that of an ActionChunkWrapper below, or the flow's
    :param cut_at_time_limit: end a chunk at a time limit, for envs that cannot be stepped past it, see
        :class:`ActionChunkWrapper`; None is as in an ActionChunkWrapper below, or False
    :param allow_other_task: accept an env with another id than the one that the flow was trained on
    :param act_horizon: H, see :meth:`~sb3_dsrl.policies.base.SteerablePolicy.with_act_horizon`; None is the flow's own
    :param residual_scale: RL also decides a residual chunk (H, A) in [-1, 1], and what is executed is
        ``clip(decode(w) + residual_scale * residual)``; 0.1, say, is a small correction. The action space then has H rows
        more, see :class:`~sb3_dsrl.NoiseSpace`. None or 0 steers the noise alone.
    :param obs: what is seen: "features" of the flow, the "env"'s frames, or "both" as a dict. Stage 1, rollouts and
        :class:`~sb3_dsrl.SteeredPolicy` need "features".
    :raises ValueError: if flow and env do not fit
    """

    def __init__(
        self,
        env: gym.Env,
        flow: FlowLike,
        gamma: float | None = None,
        noise_bound: float = 4.0,
        steer_mode: SteerMode = "full",
        num_steps: int | None = None,
        ignore_terminations: bool | None = None,
        reward_scale: float | None = None,
        cut_at_time_limit: bool | None = None,
        allow_other_task: bool = False,
        act_horizon: int | None = None,
        residual_scale: float | None = None,
        obs: ObsKind = "features",
    ) -> None:
        flow = resolve_flow(flow)
        flow = flow if act_horizon is None else flow.with_act_horizon(act_horizon)
        asked = dict(
            gamma=gamma,
            ignore_terminations=ignore_terminations,
            reward_scale=reward_scale,
            cut_at_time_limit=cut_at_time_limit,
        )
        asked = {name: value for name, value in asked.items() if value is not None}
        monitor = env if isinstance(env, Monitor) else None
        inner = env if monitor is None else monitor.env
        if isinstance(inner, ActionChunkWrapper):
            chunk_env = inner
        else:
            own = dict(gamma=flow.gamma, reward_scale=flow.reward_scale)
            chunk_env = ActionChunkWrapper(inner, flow.act_horizon, flow.obs_horizon, **(own | asked))  # type: ignore[arg-type]
        for name, value in asked.items():
            if getattr(chunk_env, name) != value:
                raise ValueError(
                    f"{name}={value} was asked for, but the ActionChunkWrapper below has {getattr(chunk_env, name)}"
                )
        if monitor is not None:
            monitor.env = chunk_env  # above the chunks: below them it would end an episode in the middle of one
        super().__init__(chunk_env if monitor is None else monitor)
        settings = {name: getattr(chunk_env, name) for name in REWARDS}
        settings |= dict(noise_bound=noise_bound, steer_mode=steer_mode, num_steps=num_steps, residual_scale=residual_scale)
        contract = Contract.of(flow, **settings)
        self.steering = Steering(flow, contract)
        fits = chunk_env.observation_space, chunk_env.action_space, chunk_env.env_id, chunk_env.control_mode
        check_env_fits(flow, *fits, allow_other_task)
        self._observer = Observer(obs, self.steering.observation_space, chunk_env.observation_space)
        self.observation_space, self.action_space = self._observer.space, self.steering.action_space
        self._cond = th.zeros(1, flow.cond_dim, device=flow.device)

    @property
    def macro_gamma(self) -> float:
        """Discount of one macro-step, ``gamma ** H``: pass it to PPO as ``gamma``."""
        return self.steering.contract.macro_gamma

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Starts an episode.

        :param seed: of the env and of the unsteered tail of the noise; None goes on
        :param options: of the env's reset
        :return: features (C,), or what ``obs`` asked for; info
        """
        if seed is not None:
            self.steering.seed(seed)
        obs, info = self.env.reset(seed=seed, options=options)
        return self._seen(obs), info

    def step(self, w: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param w: noise, (T, A), (H, A) or (1, A), see ``steer_mode``, and the H rows of the residual, if there is one
        :return: features (C,), or what ``obs`` asked for; macro reward, terminated, truncated, info
        """
        chunk = to_numpy(self.steering.chunk(self._cond, w[None]))[0]
        obs, reward, terminated, truncated, info = self.env.step(chunk)
        return self._seen(obs), float(reward), terminated, truncated, dict(info, action_chunk=chunk)

    def get_sim_state(self) -> dict[str, Any]:
        """
        :return: everything that the rest of the episode depends on, see :meth:`ActionChunkWrapper.get_sim_state
            <sb3_dsrl.ActionChunkWrapper.get_sim_state>`
        :raises ValueError: if the env cannot go back to a state
        """
        return dict(below=get_sim_state(self.env), cond=to_numpy(self._cond), tail=self.steering.tail_state())

    def set_sim_state(self, state: dict[str, Any]) -> None:
        """
        :param state: of :meth:`get_sim_state` of this env in this episode
        """
        set_sim_state(self.env, state["below"])
        self._cond = th.from_numpy(state["cond"].copy()).to(self.steering.flow.device)
        self.steering.set_tail_state(state["tail"])

    def _seen(self, obs: Any) -> Any:
        self._cond = self.steering.encode(map_frames(lambda x: x[None], obs))
        return self._observer(self._cond[0], obs)
