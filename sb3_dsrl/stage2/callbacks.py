"""Evaluation of a steered policy while SB3 trains it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization, unwrap_vec_normalize

from sb3_dsrl.evaluation.play import count_env_steps, evaluate, share_a_simulator
from sb3_dsrl.evaluation.results import EvalResult
from sb3_dsrl.utils.checkpoint import atomic_file


class SuccessEvalCallback(BaseCallback):
    """
    Evaluates success with a fixed quota of episodes, keeps the learning curve and saves the model: ``latest.zip`` and, by the
    deterministic policy, ``best_success_at_end.zip`` and ``best_success_once.zip``.

    It is SB3's ``EvalCallback`` for success instead of reward, with three differences: it counts env steps instead of
    macro-steps, it measures between a rollout and the update that follows, and it can measure sampled play as well.

    :param eval_env: steered env, not the training env
    :param eval_freq: env steps between two evaluations, rounded up to whole rollouts
    :param n_eval_episodes: episodes of each evaluation, the same ones every time
    :param stochastic: evaluate sampled play, too
    :param save_path: folder for the models, or None
    :param seed: of the episodes
    :param env_steps: env steps that were consumed before, by stage 1, say
    :raises ValueError: when training begins, if ``eval_env`` is the training env
    """

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        eval_freq: int = 10_000,
        n_eval_episodes: int = 48,
        *,
        stochastic: bool = False,
        save_path: str | Path | None = None,
        seed: int = 1_010_000,
        env_steps: int = 0,
    ) -> None:
        super().__init__()
        self.eval_env, self.eval_freq, self.n_eval_episodes = eval_env, eval_freq, n_eval_episodes
        self.stochastic, self.seed = stochastic, seed
        self.save_path = None if save_path is None else Path(save_path)
        #: env steps so far, those given at the start included
        self.env_steps = env_steps
        #: (env steps, deterministic, sampled or None)
        self.history: list[tuple[int, EvalResult, EvalResult | None]] = []
        self._best: dict[str, float] = {}
        self._start = (time.time(), env_steps)
        self._measuring = 0.0
        self._learned = False

    @property
    def env_steps_per_second(self) -> float:
        """Env steps per second of training, without the time of evaluations."""
        start, steps = self._start
        return (self.env_steps - steps) / max(time.time() - start - self._measuring, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far, for :class:`~sb3_dsrl.ResumeCallback`."""
        return dict(env_steps=self.env_steps, history=self.history, best=self._best)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with a curve."""
        self.env_steps, self.history = state_dict["env_steps"], list(state_dict["history"])
        self._best = dict(state_dict["best"])

    def _init_callback(self) -> None:
        if share_a_simulator(self.eval_env, self.training_env):
            raise ValueError(
                "eval_env is the training env: evaluations would end the episodes that are being collected; make another env"
            )

    def _on_training_start(self) -> None:
        if not self.history:
            self.measure()
        self._start, self._measuring, self._learned = (time.time(), self.env_steps), 0.0, False

    def _on_step(self) -> bool:
        self._learned = True
        self.env_steps += count_env_steps(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("time/env_steps", self.env_steps)
        self.logger.record("time/env_steps_per_second", self.env_steps_per_second)
        if self.env_steps - self.history[-1][0] >= self.eval_freq:
            self.measure()

    def _on_training_end(self) -> None:
        if self._learned:  # not if a finished run is resumed
            self.measure()

    def measure(self) -> None:
        """
        Evaluates and saves the model now.

        :raises ValueError: if the training env is wrapped in VecNormalize and the evaluation env is not
        """
        start = time.time()
        if self.model.get_vec_normalize_env() is not None:
            if not isinstance(self.eval_env, VecEnv) or unwrap_vec_normalize(self.eval_env) is None:
                raise ValueError("The training env is wrapped in VecNormalize, eval_env is not: expected both or neither")
            sync_envs_normalization(self.training_env, self.eval_env)
        modes = (True, False) if self.stochastic else (True,)
        results = [
            evaluate(self.model, self.eval_env, self.n_eval_episodes, seed=self.seed, deterministic=deterministic)
            for deterministic in modes
        ]
        self.history.append((self.env_steps, results[0], results[1] if self.stochastic else None))
        for result, suffix in zip(results, ("", "_stochastic"), strict=False):
            for key in ("success_once", "success_at_end", "mean_return"):
                self.logger.record(f"eval/{key}{suffix}", getattr(result, key))
        self.logger.record("time/env_steps", self.env_steps)
        self.logger.dump(self.num_timesteps)
        if self.save_path is not None:
            self._save("latest")
            for key in ("success_at_end", "success_once"):
                value = getattr(results[0], key)
                if value > self._best.get(key, -1.0):
                    self._best[key] = value
                    self._save(f"best_{key}")
        self._measuring += time.time() - start

    def _save(self, name: str) -> None:
        assert self.save_path is not None
        with atomic_file(self.save_path / f"{name}.zip") as file:
            self.model.save(file)
