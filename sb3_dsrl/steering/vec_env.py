"""Many envs whose actions are flow noise: the vectorised form.

Letters in shapes: ``N`` envs, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features, ``D``
dimensions of one observation, ``k`` env steps really executed in a chunk (1..H), ``w`` noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.contract import REWARDS, Contract, SteerMode
from sb3_dsrl.steering.steering import Steering, check_env_fits, check_flow, to_numpy
from sb3_dsrl.utils.observations import stack_frames


class VecLatentSteering(VecEnvWrapper):
    """
    The form of :class:`LatentSteeringWrapper` for many envs, named like ``VecNormalize``: below it lie chunk envs (one
    message a macro-step), above it the flow decodes all of them in one batch.

    :param venv: vectorised :class:`ActionChunkWrapper` envs (in this process, in worker processes, in Ray actors) or a
        :class:`BatchedChunkEnv`
    :param flow: the policy that is steered; it is frozen. For chunk envs of another H than its own, pass
        ``flow.with_act_horizon(H)``.
    :param noise_bound: the action space is ``Box(-noise_bound, noise_bound, (T, A))``
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry, which is repeated T times
    :param num_steps: decoding steps; None is the flow's own
    :param allow_other_task: accept envs with another id than the one that the flow was trained on
    :param residual_scale: RL also decides a residual chunk (H, A) in [-1, 1], and what is executed is
        ``clip(decode(w) + residual_scale * residual)``; 0.1, say, is a small correction. The action space then has H rows
        more, see :class:`~sb3_dsrl.NoiseSpace`. None or 0 steers the noise alone.
    :raises ValueError: if flow and envs do not fit
    """

    def __init__(
        self,
        venv: VecEnv,
        flow: SteerablePolicy,
        noise_bound: float = 4.0,
        steer_mode: SteerMode = "full",
        num_steps: int | None = None,
        allow_other_task: bool = False,
        residual_scale: float | None = None,
    ) -> None:
        check_flow(flow)
        if isinstance(venv, gym.vector.VectorEnv):
            raise ValueError(
                f"VecLatentSteering expects an SB3 VecEnv of chunk envs, found {type(venv).__name__}: put it into "
                f"BatchedChunkEnv"
            )
        try:
            settings = {name: venv.get_attr(name, indices=0)[0] for name in REWARDS}
        except AttributeError as error:
            raise ValueError(
                "VecLatentSteering expects vectorised ActionChunkWrapper envs; for one env use LatentSteeringWrapper, "
                "for ManiSkill envs make_latent_env"
            ) from error
        settings |= dict(noise_bound=noise_bound, steer_mode=steer_mode, num_steps=num_steps, residual_scale=residual_scale)
        contract = Contract.of(flow, **settings)
        self.steering = Steering(flow, contract)
        env_id, control_mode = (venv.get_attr(name, indices=0)[0] for name in ("env_id", "control_mode"))
        check_env_fits(flow, venv.observation_space, venv.action_space, env_id, control_mode, allow_other_task)
        super().__init__(venv, self.steering.observation_space, self.steering.action_space)
        # A batched simulator takes and gives tensors; nothing but features, rewards, dones and infos leaves its device.
        self._tensors = isinstance(venv.unwrapped, BatchedChunkEnv)
        self._cond = th.zeros(venv.num_envs, flow.cond_dim, device=flow.device)
        self._chunks = np.zeros((venv.num_envs, flow.act_horizon, flow.action_dim), np.float32)

    @property
    def macro_gamma(self) -> float:
        """Discount of one macro-step, ``gamma ** H``: pass it to PPO as ``gamma``."""
        return self.steering.contract.macro_gamma

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
        return to_numpy(self._cond)

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: noise, (N, T, A), (N, H, A) or (N, 1, A), see ``steer_mode``, and the H rows of the residual, if there
            is one
        """
        chunks = self.steering.chunk(self._cond, actions)
        self._chunks = to_numpy(chunks)
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
            for i, features in zip(ended, to_numpy(self.steering.encode(terminal)), strict=True):
                infos[i]["terminal_observation"] = features
        for info, chunk in zip(infos, self._chunks, strict=True):
            info["action_chunk"] = chunk
        return to_numpy(self._cond), rewards, dones, infos


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
