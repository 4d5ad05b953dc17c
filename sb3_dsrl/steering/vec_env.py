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
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.contract import REWARDS, Contract, SteerMode
from sb3_dsrl.steering.observing import Observer, ObsKind
from sb3_dsrl.steering.sim_state import get_sim_states, set_sim_states
from sb3_dsrl.steering.steering import Steering, check_env_fits, to_numpy
from sb3_dsrl.utils.observations import map_frames, stack_frames


class VecLatentSteering(VecEnvWrapper):
    """
    The form of :class:`LatentSteeringWrapper` for many envs, named like ``VecNormalize``: below it lie chunk envs (one
    message a macro-step), above it the flow decodes all of them in one batch.

    :param venv: vectorised :class:`ActionChunkWrapper` envs (in this process, in worker processes, in Ray actors) or a
        :class:`BatchedChunkEnv`
    :param flow: the policy that is steered, or its folder; it is frozen. For chunk envs of another H than its own, pass
        ``flow.with_act_horizon(H)``.
    :param noise_bound: the action space is ``Box(-noise_bound, noise_bound, (T, A))``
    :param steer_mode: "full" steers all T entries of the noise; "act_horizon" the first H, the tail comes from the prior;
        "shared" one entry, which is repeated T times
    :param num_steps: decoding steps; None is the flow's own
    :param allow_other_task: accept envs with another id than the one that the flow was trained on
    :param residual_scale: RL also decides a residual chunk (H, A) in [-1, 1], and what is executed is
        ``clip(decode(w) + residual_scale * residual)``; 0.1, say, is a small correction. The action space then has H rows
        more, see :class:`~sb3_dsrl.NoiseSpace`. None or 0 steers the noise alone.
    :param obs: what is seen: "features" of the flow, the "env"'s frames, or "both" as a dict. Stage 1, rollouts and
        :class:`~sb3_dsrl.SteeredPolicy` need "features".
    :raises ValueError: if flow and envs do not fit
    """

    def __init__(
        self,
        venv: VecEnv,
        flow: FlowLike,
        noise_bound: float = 4.0,
        steer_mode: SteerMode = "full",
        num_steps: int | None = None,
        allow_other_task: bool = False,
        residual_scale: float | None = None,
        obs: ObsKind = "features",
    ) -> None:
        flow = resolve_flow(flow)
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
                "for many make_latent_env"
            ) from error
        settings |= dict(noise_bound=noise_bound, steer_mode=steer_mode, num_steps=num_steps, residual_scale=residual_scale)
        contract = Contract.of(flow, **settings)
        self.steering = Steering(flow, contract)
        env_id, control_mode = (venv.get_attr(name, indices=0)[0] for name in ("env_id", "control_mode"))
        check_env_fits(flow, venv.observation_space, venv.action_space, env_id, control_mode, allow_other_task)
        self._observer = Observer(obs, self.steering.observation_space, venv.observation_space)
        super().__init__(venv, self._observer.space, self.steering.action_space)
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
        :return: features (N, C), or what ``obs`` asked for
        """
        obs = self.venv.reset()
        self._cond = self.steering.encode(obs)
        return self._observer(self._cond, obs)

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
        :return: features (N, C), or what ``obs`` asked for; macro rewards (N,), dones (N,), infos
        """
        obs, rewards, dones, infos = self.venv.step_wait()
        self._cond = self.steering.encode(obs)
        ended = [i for i, info in enumerate(infos) if "terminal_observation" in info]
        if ended:
            terminal = stack_frames([infos[i]["terminal_observation"] for i in ended])
            seen = self._observer(self.steering.encode(terminal), terminal)
            for j, i in enumerate(ended):
                infos[i]["terminal_observation"] = map_frames(lambda x, j=j: x[j], seen)
        for info, chunk in zip(infos, self._chunks, strict=True):
            info["action_chunk"] = chunk
        return self._observer(self._cond, obs), rewards, dones, infos

    @property
    def can_restore(self) -> bool:
        """Whether all envs can go back to a state, see :mod:`sb3_dsrl.steering.sim_state`."""
        return all(self.venv.get_attr("can_restore"))

    def get_sim_state(self) -> dict[str, Any]:
        """
        :return: everything that the rest of the episodes depends on, see :meth:`ActionChunkWrapper.get_sim_state
            <sb3_dsrl.ActionChunkWrapper.get_sim_state>`
        :raises ValueError: if the envs cannot go back to a state
        """
        base = self.venv.unwrapped
        below = base.get_sim_state() if isinstance(base, BatchedChunkEnv) else get_sim_states(self.venv)
        return dict(below=below, cond=self._cond.clone(), tail=self.steering.tail_state())

    def set_sim_state(self, state: dict[str, Any], indices: VecEnvIndices = None) -> None:
        """
        :param state: of :meth:`get_sim_state`, of the episodes that are played now
        :param indices: of the envs that go back; None are all, and then the unsteered tail of the noise is drawn again, too
        """
        base, index = self.venv.unwrapped, list(self._get_indices(indices))
        if isinstance(base, BatchedChunkEnv):
            base.set_sim_state(state["below"], indices)
        else:
            set_sim_states(self.venv, [state["below"][i] for i in index], index)
        self._cond = self._cond.clone()
        self._cond[index] = state["cond"][index]
        if indices is None:
            self.steering.set_tail_state(state["tail"])

    def hold_ends(self, hold: bool) -> None:
        """
        See :meth:`ActionChunkWrapper.hold_ends <sb3_dsrl.ActionChunkWrapper.hold_ends>`.

        :param hold: off in new envs
        """
        base = self.venv.unwrapped
        if isinstance(base, BatchedChunkEnv):
            base.hold_ends(hold)
        else:
            self.venv.env_method("hold_ends", hold)


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
