"""Attempts of a scripted expert."""

from __future__ import annotations

import numpy as np

from sb3_dsrl.experts import EXPERTS
from sb3_dsrl.experts.recipe import Attempt, DemoRecipe, smooth_noise
from sb3_dsrl.experts.recording import make_recorded_env
from sb3_dsrl.experts.servo import Servo


class Scripted:
    """
    An expert that looks anew at every step, and moves with smooth noise that it has to make up for.

    :param recipe: of the attempts
    """

    def __init__(self, recipe: DemoRecipe) -> None:
        self.recipe, self.expert = recipe, EXPERTS[recipe.env_id]
        self.noise = self.expert.noise if recipe.noise is None else recipe.noise
        self.env = make_recorded_env(recipe)

    def rebuild(self) -> None:
        """Builds the scene anew."""
        self.env.rebuild()

    def attempt(self, seed: int) -> Attempt:
        """
        :param seed: of the episode; styles take turns by it
        """
        recipe, index = self.recipe, seed % self.recipe.styles
        style = self.expert.styles[index]
        self.env.reset(seed=seed)
        expert, servo = self.expert(self.env.base, style), Servo(self.env.base)
        noise = smooth_noise(np.random.default_rng([recipe.seed, seed]), self.noise, recipe.noise_rho)
        solved = 0  # steps in a row that the task has been solved
        for _ in range(self.env.max_episode_steps):
            goal = expert.goal()
            arm = servo.action_to(goal.tcp, style.speed)
            arm = servo.clip(arm + next(noise)[: len(arm)])
            info = self.env.step(np.append(arm, goal.gripper).astype(np.float32))[-1]
            solved = solved + 1 if info["success"] else 0
            if solved > recipe.extra_steps:
                break
        return self.env.attempt(solved > 0, style=index)
