"""MuJoCo Playground (a GPU simulator on PyPI) as a vector env that can be steered.

    pip install playground "jax[cuda12]"
    python examples/playground.py --env_id PandaPickCube --n_envs 1024

Prints the env steps per second of the simulator and of the steered env, and trains PPO on noise for a moment. The flow is
untrained: this shows the way, not a result. PlaygroundVectorEnv is what you copy; your flow takes the place of ours.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import torch as th
from gymnasium.vector import AutoresetMode, VectorEnv
from jax import numpy as jnp
from mujoco_playground import registry
from stable_baselines3 import PPO

from sb3_dsrl import FlowPolicy, VecLatentSteering, VelocityMLP, ppo_kwargs
from sb3_dsrl.cli.common import cli
from sb3_dsrl.steering.batched import BatchedChunkEnv


class PlaygroundVectorEnv(VectorEnv):
    """
    N copies of a MuJoCo Playground env. Nothing resets by itself, so that every transition of a chunk is exact. Observations,
    rewards and flags are torch tensors that share the memory of JAX's arrays, on its device.

    :param env_id: a name in ``mujoco_playground.registry``, of an env whose observation is one vector
    :param num_envs: N
    :param max_episode_steps: time limit in env steps; None is the registered one
    :param config_overrides: of the registered configuration, such as ``{"impl": "jax"}``
    :raises ValueError: if the observation is a dict
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        max_episode_steps: int | None = None,
        config_overrides: dict[str, Any] | None = None,
    ) -> None:
        env = registry.load(env_id, config_overrides=config_overrides)
        if not isinstance(env.observation_size, int):
            raise ValueError(f"{env_id} observes {env.observation_size}: expected one vector")
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (env.observation_size,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (env.action_size,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.spec = gym.envs.registration.EnvSpec(env_id)
        self.max_episode_steps = max_episode_steps or int(registry.get_default_config(env_id).episode_length)
        self._reset: Callable[..., Any] = jax.jit(jax.vmap(env.reset))
        self._step: Callable[..., Any] = jax.jit(jax.vmap(env.step))
        self._merge: Callable[..., Any] = jax.jit(_merged)
        self._keys = jax.random.split(jax.random.PRNGKey(0), num_envs)
        self._state: Any = None
        self._split: Callable[..., Any] = jax.jit(jax.vmap(lambda key: tuple(jax.random.split(key))))
        self._elapsed = jnp.zeros(num_envs, jnp.int32)
        self.device = _to_torch(self._elapsed).device

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[th.Tensor, dict[str, Any]]:
        """
        :param seed: env i is seeded with seed + i; None goes on
        :param options: "reset_mask", (N,): the envs that begin a new episode; without it all do
        :return: observations (N, D), info
        """
        if seed is not None:
            self._keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seed, seed + self.num_envs))
        self._keys, keys = self._split(self._keys)
        new = self._reset(keys)
        mask = (options or {}).get("reset_mask")
        if mask is None:
            self._state, self._elapsed = new, jnp.zeros_like(self._elapsed)
        else:
            chosen = jnp.asarray(mask)
            self._state = self._merge(chosen, new, self._state)
            self._elapsed = jnp.where(chosen, 0, self._elapsed)
        return _to_torch(self._state.obs), {}

    def step(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, dict[str, Any]]:
        """
        :param actions: (N, A)
        :return: observations (N, D), rewards (N,), terminated (N,), truncated (N,), and the env's metrics as info
        """
        self._state = self._step(self._state, jax.dlpack.from_dlpack(actions.contiguous()))
        self._elapsed = self._elapsed + 1
        state, outcome = self._state, (self._state.done > 0, self._elapsed >= self.max_episode_steps)
        info = {name: _to_torch(value) for name, value in state.metrics.items()}
        return _to_torch(state.obs), _to_torch(state.reward), *(_to_torch(flags) for flags in outcome), info  # type: ignore[return-value]


def _merged(mask: jax.Array, new: Any, old: Any) -> Any:
    """Of two states: the new one where the mask is set."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, old)


def _to_torch(array: jax.Array) -> th.Tensor:
    return th.from_dlpack(array)


@dataclass
class Args:
    """Steer an untrained flow on MuJoCo Playground."""

    env_id: str = "PandaPickCube"
    """Name in mujoco_playground's registry."""
    n_envs: int = 256
    """Simulated envs."""
    total_timesteps: int = 20_000
    """Macro-steps of PPO."""
    impl: str = "warp"
    """MuJoCo's implementation: "warp" (a GPU) or "jax" (a GPU or a CPU)."""


def _rate(step: Callable[[], Any], env_steps: int, repeats: int = 20) -> float:
    for _ in range(3):
        step()  # compiles, once more for what the first step returns
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return repeats * env_steps / (time.perf_counter() - start)


def main(args: Args) -> None:
    """Measures the simulator, steers it, and trains for a moment."""
    venv = PlaygroundVectorEnv(args.env_id, args.n_envs, config_overrides={"impl": args.impl})
    obs_dim, action_dim = venv.observation_space.shape[1], venv.action_space.shape[1]  # type: ignore[index]
    flow = FlowPolicy.create(obs_dim, action_dim, net_class=VelocityMLP, pred_horizon=8, act_horizon=4).freeze()
    flow.to(venv.device)
    venv.reset(seed=0)
    actions = th.zeros(args.n_envs, action_dim, device=venv.device)
    print(f"{args.env_id}, {args.n_envs} envs on {venv.device}")
    print(f"simulator: {_rate(lambda: venv.step(actions)[1].sum().item(), args.n_envs):,.0f} env steps/s")
    env = VecLatentSteering(BatchedChunkEnv(venv, flow.act_horizon, flow.obs_horizon), flow)
    env.reset()
    noise = np.zeros((args.n_envs, *flow.noise_shape), np.float32)
    print(f"steered: {_rate(lambda: env.step(noise), args.n_envs * flow.act_horizon):,.0f} env steps/s")
    model = PPO("LatentPolicy", env, **ppo_kwargs(env), seed=0)
    model.learn(args.total_timesteps, progress_bar=True)


if __name__ == "__main__":
    cli(main, Args)
