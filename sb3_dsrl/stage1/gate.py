"""A test of stage 1 on fresh rollouts: what it learned stays only if it does at least as well as what it started from."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.evaluation.results import EvalResult
from sb3_dsrl.evaluation.rollouts import collect_rollouts
from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.stage2.latent_policy import LatentPolicy


class Gate:
    """
    Plays a policy as it was before stage 1 and as it is after it, on the same fresh episodes, and keeps the better one.

    Successes at the end decide, the mean return between equals. A difference of a few episodes is luck: with 64 episodes
    the gate catches a stage 1 that does harm, not one that is a little worse.

    :param env: steered env, gym or vectorised
    :param episodes: of either policy
    :param seed: of the episodes; by default neither those of rollouts with a small seed nor those of an evaluation or of
        :func:`~sb3_dsrl.steerability`
    :param deterministic: compare the policies' means; otherwise sampled play
    :raises ValueError: if there is no episode to play, or the env normalises features or rewards
    """

    def __init__(
        self, env: gym.Env | VecEnv, episodes: int = 64, *, seed: int = 3_000_000, deterministic: bool = True
    ) -> None:
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, found {episodes}")
        require_raw_features(env, "The gate", rewards=True)  # collect_rollouts needs both
        self.env, self.episodes, self.seed, self.deterministic = env, episodes, seed, deterministic
        #: outcome of the policy before and after stage 1
        self.before: EvalResult | None = None
        self.after: EvalResult | None = None
        #: whether stage 1's result was kept
        self.passed: bool | None = None
        #: env steps that the test took, to be counted
        self.env_steps = 0

    def decide(self, policy: LatentPolicy, start: dict[str, Any]) -> None:
        """
        Gives the policy its start back if that was better, with a warning that says so.

        :param policy: as stage 1 left it
        :param start: its state before
        :raises ValueError: if the env does not report success
        """
        learned = deepcopy(policy.state_dict())
        self.after = self._play(policy)
        policy.load_state_dict(start)
        self.before = self._play(policy)
        self.passed = _score(self.after) >= _score(self.before)
        if self.passed:
            policy.load_state_dict(learned)
        else:
            warnings.warn(
                f"Stage 1 is dropped: its policy succeeded in {self.after.success_at_end:.2f} of {self.episodes} fresh "
                f"episodes, the one that it started from in {self.before.success_at_end:.2f}",
                stacklevel=3,
            )

    def _play(self, policy: LatentPolicy) -> EvalResult:
        rollouts = collect_rollouts(policy, self.env, self.episodes, seed=self.seed, deterministic=self.deterministic)
        self.env_steps += rollouts.env_steps
        if rollouts.result is None:
            raise ValueError("The gate's env does not report success at the end of an episode")
        return rollouts.result


def _score(result: EvalResult) -> tuple[float, float]:
    return result.success_at_end, result.mean_return
