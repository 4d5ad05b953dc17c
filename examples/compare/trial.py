"""A task with its frozen flow, and a trial: one run of a method on it, which keeps the books of env steps."""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import FlowPolicy, SuccessEvalCallback, WorkerSettings, make_chunk_env, make_latent_env
from sb3_dsrl.steering.contract import SteerMode

GAMMA = 0.99


@dataclass(frozen=True)
class Task:
    """
    A task and the frozen flow that is steered in it.

    :param env_id: ManiSkill environment
    :param max_episode_steps: time limit in env steps
    :param budget: env steps that a method may spend
    :param horizon: T = H
    :param demo_flags: of make_demos.py
    :param flow_iters: optimiser steps of stage 0
    """

    env_id: str
    max_episode_steps: int
    budget: int
    horizon: int
    demo_flags: dict[str, Any]
    flow_iters: int


TASKS = {
    task.env_id: task
    for task in (
        Task("PushCube-v1", 50, 100_000, 4, dict(num_demos=50, speedup=5, noise=0.45), 1_000),
        Task("PickCube-v1", 50, 150_000, 8, dict(num_demos=200, speedup=4, noise=0.2), 4_000),
        Task("LiftPegUpright-v1", 100, 200_000, 8, dict(num_demos=200, speedup=4, noise=0.12), 10_000),
    )
}


@dataclass
class Trial:
    """
    One run: a method on a task with a seed.

    :param task: the task
    :param seed: of everything but the flow
    :param budget: env steps
    :param flow: the frozen flow of the task
    :param demo_path: the demos that it learned from
    :param n_envs: simulated envs
    :param eval_points: evaluations while SB3 learns
    :param eval_point_episodes: episodes of each of them
    :param ticket_rounds: of the search for a golden ticket
    :param rollout_episodes: that stage 1 learns from
    :param stage1_iters: optimiser steps of stage 1; None is its default
    :param env_steps: spent so far
    :param measuring_seconds: wall time of these evaluations, which is not the method's
    :param curve: what they found, by deterministic play
    :param env: env of the method, once it made one
    :param eval_env: env of the evaluations, dense and without termination for all methods
    """

    task: Task
    seed: int
    budget: int
    flow: FlowPolicy
    demo_path: Path
    n_envs: int = 8
    eval_points: int = 8
    eval_point_episodes: int = 32
    ticket_rounds: tuple[tuple[int, int], ...] = ((32, 8), (5, 32))
    rollout_episodes: int = 256
    stage1_iters: int | None = None
    env_steps: int = 0
    measuring_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    env: VecEnv = field(init=False)
    eval_env: VecEnv = field(init=False)

    def steered(self, noise_bound: float = 4.0, steer_mode: SteerMode = "full") -> VecEnv:
        """Makes the env of a method that steers the flow; dense reward without termination."""
        make = partial(
            make_latent_env,
            self.task.env_id,
            self.flow,
            self.n_envs,
            max_episode_steps=self.task.max_episode_steps,
            noise_bound=noise_bound,
            steer_mode=steer_mode,
            workers=WorkerSettings(1),
            gamma=GAMMA,
        )
        self.env, self.eval_env = make(), make()
        return self.env

    def raw(self, act_horizon: int, sparse: bool, gamma: float) -> VecEnv:
        """Makes the env of a method that knows nothing of the flow. Sparse rewards end at success, dense ones do not."""
        make = partial(
            make_chunk_env,
            self.task.env_id,
            self.n_envs,
            act_horizon=act_horizon,
            control_mode=self.flow.control_mode,
            max_episode_steps=self.task.max_episode_steps,
            workers=WorkerSettings(1),
            gamma=gamma,
        )
        self.env = make(reward_mode="sparse" if sparse else "normalized_dense", ignore_terminations=not sparse)
        self.eval_env = make()
        return self.env

    def learn(self, model: BaseAlgorithm, act_horizon: int) -> BaseAlgorithm:
        """
        Spends what is left of the budget, in whole rollouts.

        :raises ValueError: if that is not one rollout
        """
        left = self.budget - self.env_steps
        macro_steps = left // act_horizon
        rollout = model.n_steps * model.n_envs if isinstance(model, PPO) else 1
        macro_steps -= macro_steps % rollout
        if macro_steps < 1:
            raise ValueError(
                f"--budget is {self.budget} env steps, but {self.env_steps} are spent before SB3 learns and one rollout takes "
                f"{rollout * act_horizon} more"
            )
        freq = max(1, left // self.eval_points)
        curve = SuccessEvalCallback(self.eval_env, freq, self.eval_point_episodes, env_steps=self.env_steps)
        start = time.time()
        model.learn(macro_steps, curve)
        self.measuring_seconds += time.time() - start - (curve.env_steps - self.env_steps) / curve.env_steps_per_second
        self.env_steps = curve.env_steps
        self.curve = [
            dict(env_steps=steps, success_once=result.success_once, success_at_end=result.success_at_end)
            for steps, result, _ in curve.history
        ]
        return model

    def rollout_steps(self, size: int, act_horizon: int) -> int:
        """Macro-steps of each env in a rollout of ``size`` in all, or of less where the budget is small."""
        return max(8, min(size, self.budget // (4 * act_horizon)) // self.n_envs)

    def close(self) -> None:
        """Closes the envs."""
        for env in [value for value in vars(self).values() if isinstance(value, VecEnv)]:
            env.close()
