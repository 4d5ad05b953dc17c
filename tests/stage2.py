"""A small stage 2 that can be interrupted and resumed, in this process or in another one."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from torch import nn

from sb3_dsrl import FlowPolicy, ResumeCallback, SuccessEvalCallback, VecLatentSteering, ppo_kwargs, resume
from tests.envs import ScriptedEnv, tiny_flow, vec_steered

TOTAL = 16 * 8  # macro-steps: 8 rollouts
KWARGS: dict[str, Any] = dict(
    n_steps=8,
    batch_size=8,
    n_epochs=2,
    seed=3,
    learning_rate=LinearSchedule(1e-2, 0.0, 1.0),
    policy_kwargs=dict(net_arch=[16], prior_mix_decay=0.9),
)


def bits(*modules: nn.Module) -> bytes:
    """Every byte of the parameters and buffers."""
    return b"".join(x.detach().numpy().tobytes() for module in modules for x in module.state_dict().values())


class SeededEnv(ScriptedEnv):
    """What happens depends on the last seed, the episodes since then and the actions, as in a simulator."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self.episode = -1
        return super().reset(seed=seed, options=options)


def steered(flow: FlowPolicy, n_envs: int = 2, residual_scale: float = 0.0) -> VecLatentSteering:
    envs = [TimeLimit(SeededEnv(episode_lengths=(7, 99, 12), random_start=True), 20) for _ in range(n_envs)]
    env = vec_steered(flow, envs, residual_scale=residual_scale)
    env.seed(0)
    assert isinstance(env, VecLatentSteering)
    return env


class Stage2:
    """
    Stage 2 on toys: a run that may crash, and what is left of it.

    :param folder: for all its files
    :param flow: fits the default ScriptedEnv
    :param wrap: goes around the training env
    """

    def __init__(self, folder: Path, flow: FlowPolicy, wrap: Callable[[VecEnv], VecEnv] = VecMonitor) -> None:
        self.flow, self.wrap, self.folder, self.path = flow, wrap, folder, folder / "resume.zip"

    def run(self, goes_on: bool = False, crash: Sequence[BaseCallback] = (), seed: int = 3, **kwargs: Any) -> PPO:
        env = self.wrap(steered(self.flow))
        kwargs = dict(save_freq=80) | kwargs
        self.curve = SuccessEvalCallback(steered(self.flow), eval_freq=100, n_eval_episodes=2, save_path=self.folder)
        self.keeper = ResumeCallback(self.path, keep=[self.curve], **kwargs)
        model = resume(PPO, self.path, env) if goes_on else None
        overrides = KWARGS | dict(seed=seed, tensorboard_log=str(self.folder / "tb"))
        model = model or PPO("LatentPolicy", env, **ppo_kwargs(steered(self.flow), **overrides))
        callbacks = [self.curve, self.keeper, *crash]
        fresh = model.num_timesteps == 0
        return model.learn(TOTAL - model.num_timesteps, callbacks, tb_log_name="run", reset_num_timesteps=fresh)


class Slow(BaseCallback):
    """Gives a test the time to kill."""

    def _on_step(self) -> bool:
        time.sleep(0.02)
        return True


def run_slowly(folder: Path) -> None:
    """What a process does."""
    Stage2(folder, tiny_flow()).run(crash=[Slow()])
