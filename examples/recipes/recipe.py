"""What a recipe says about a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    Settings of all stages for one task; what they leave out has the package's defaults.

    :param env_id: ManiSkill task
    :param variant: what sets the recipe apart from others for this task, such as ``rgb``
    :param demos: flags of ``make_demos.py``, such as ``num_demos``
    :param flow: arguments of :func:`sb3_dsrl.train_flow`; ``act_horizon`` steps of each chunk are executed
    :param spatial_features: features of where things are to each other, for state demos
    :param critic_iterations: optimiser steps of the critic; 0 trains none
    :param env: arguments of :func:`sb3_dsrl.make_latent_env`, such as ``max_episode_steps`` and ``residual_scale``
    :param demo_starts: arguments of :class:`sb3_dsrl.DemoStarts`, with which stage 2 starts along the demos; None does not
    :param n_envs: simulated envs
    :param ticket_rounds: of :func:`sb3_dsrl.find_ticket`, a control that no stage uses
    :param rollout_episodes: stage 1 learns from so many episodes of the frozen flow
    :param total_timesteps: budget of stages 1 and 2 in env steps
    :param deterministic: the result plays the latent policy's mean; otherwise it samples, which frees an arm that is stuck
    :param ppo: arguments of PPO that replace those of :func:`sb3_dsrl.ppo_kwargs`
    """

    env_id: str
    variant: str = ""
    flow: Mapping[str, Any]
    total_timesteps: int
    deterministic: bool = True
    demos: Mapping[str, Any] = field(default_factory=dict)
    spatial_features: bool = True
    critic_iterations: int = 0
    env: Mapping[str, Any] = field(default_factory=dict)
    demo_starts: Mapping[str, Any] | None = None
    n_envs: int = 8
    ticket_rounds: Sequence[tuple[int, int]] = ((32, 8), (5, 32))
    rollout_episodes: int = 256
    ppo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the recipe: the task, and the variant if there is one."""
        return f"{self.env_id} {self.variant}".strip()
