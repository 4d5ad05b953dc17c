"""A test of stage 1 on fresh rollouts: what it learned stays only if it does at least as well as what it started from."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.evaluation.choice import CHOICE_SEED, PolicyChoice, SequentialChoice, choose_policy
from sb3_dsrl.evaluation.results import EvalResult
from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.stage2.latent_policy import LatentPolicy

BEFORE, AFTER = "before", "after"


class Gate:
    """
    Plays a policy as it was before stage 1 and as it is after it, from the same fresh starts, and keeps the better one. The
    test looks after every block of episodes and stops as soon as the answer is clear.

    Successes at the end decide, the mean return between equals. Where the test does not become clear, a difference of a few
    episodes is luck: the gate catches a stage 1 that does harm, not one that is a little worse. If nothing may ever be worse
    than its start, use :func:`~sb3_dsrl.choose_policy`: it keeps the start unless another policy is shown to be better, and
    compares any number of them.

    :param env: steered env, gym or vectorised
    :param episodes: of either policy, at most. Seven starts that only one of them solves, and none that only the other one
        solves, are enough
    :param alpha: chance to stop with a wrong answer
    :param margin: stop as well if stage 1's policy cannot be better, or worse, by more than this
    :param seed: of the episodes; by default neither those of rollouts with a small seed nor those of an evaluation or of
        :func:`~sb3_dsrl.steerability`
    :param deterministic: compare the policies' means; otherwise sampled play
    :raises ValueError: if there is no episode to play, alpha or margin is out of range, or the env normalises features or
        rewards
    """

    def __init__(
        self,
        env: gym.Env | VecEnv,
        episodes: int = 200,
        *,
        alpha: float = 0.05,
        margin: float = 0.05,
        seed: int = CHOICE_SEED,
        deterministic: bool = True,
    ) -> None:
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, found {episodes}")
        SequentialChoice([BEFORE, AFTER], alpha, margin)  # before anything is trained, not after it
        require_raw_features(env, "The gate", rewards=True)
        self.env, self.episodes, self.alpha, self.margin = env, episodes, alpha, margin
        self.seed, self.deterministic = seed, deterministic
        #: what the test found
        self.choice: PolicyChoice | None = None

    @property
    def before(self) -> EvalResult | None:
        """Outcome of the policy before stage 1; None before the test."""
        return None if self.choice is None else self.choice.results[BEFORE]

    @property
    def after(self) -> EvalResult | None:
        """Outcome of the policy after stage 1."""
        return None if self.choice is None else self.choice.results[AFTER]

    @property
    def passed(self) -> bool | None:
        """Whether stage 1's result was kept."""
        if self.before is None or self.after is None:
            return None
        return _score(self.after) >= _score(self.before)

    @property
    def env_steps(self) -> int:
        """Env steps that the test took, to be counted."""
        return 0 if self.choice is None else self.choice.env_steps

    def decide(self, policy: LatentPolicy, start: dict[str, Any]) -> None:
        """
        Gives the policy its start back if that was better, with a warning that says so.

        :param policy: as stage 1 left it
        :param start: its state before
        :raises ValueError: if the env does not report success
        """
        before = policy.copy()
        before.load_state_dict(start)
        self.choice = choose_policy(
            {BEFORE: before.eval(), AFTER: policy},
            self.env,
            alpha=self.alpha,
            margin=self.margin,
            max_episodes=self.episodes,
            seed=self.seed,
            deterministic=self.deterministic,
        )
        if not self.passed:
            policy.load_state_dict(start)
            old, new = self.choice.results[BEFORE], self.choice.results[AFTER]
            warnings.warn(
                f"Stage 1 is dropped: its policy succeeded in {new.success_at_end:.2f} of {new.episodes} fresh episodes, the "
                f"one that it started from in {old.success_at_end:.2f}",
                stacklevel=3,
            )


def _score(result: EvalResult) -> tuple[float, float]:
    return result.success_at_end, result.mean_return
