"""Stage 2 that survives: checkpoints of an algorithm while it learns, and going on from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from sb3_dsrl.stage2.replay_file import add_replay, checked_buffer, cut_episodes, read_replay
from sb3_dsrl.steering.start_control import get_progress, set_progress
from sb3_dsrl.utils.checkpoint import atomic_file, newest_readable, rng_state, set_rng_state
from sb3_dsrl.utils.interrupt import StopSignals

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

#: The attribute of a model that carries the rest of the state into SB3's zip and out of it.
STATE = "training_state"

#: Options of a reset that builds a ManiSkill scene anew.
RECONFIGURE = MappingProxyType(dict(reconfigure=True))

#: What SB3's own EvalCallback has found out so far.
EVAL_CALLBACK = (
    "n_calls",
    "best_mean_reward",
    "last_mean_reward",
    "evaluations_timesteps",
    "evaluations_results",
    "evaluations_length",
    "evaluations_successes",
)


def resume(algorithm: type[Algorithm], path: str | Path, env: gym.Env | VecEnv, **kwargs: Any) -> Algorithm | None:
    """
    The model of the newest readable checkpoint of a :class:`ResumeCallback`, or None if there is no checkpoint::

        model = resume(PPO, path, env) or PPO("LatentPolicy", env, **ppo_kwargs(env))
        remaining = total_timesteps - model.num_timesteps
        model.learn(remaining, ResumeCallback(path), reset_num_timesteps=model.num_timesteps == 0)

    Like all of SB3's zips it contains pickles: load your own only.

    :param algorithm: PPO, A2C, TRPO, :class:`~sb3_dsrl.LatentSAC`, SAC or TQC
    :param path: of the checkpoint
    :param env: steered env, made as the one before
    :param kwargs: further arguments of ``algorithm.load``, such as the ``demos`` of LatentSAC
    :raises ValueError: if no file can be read, env and model do not fit, or the file is a model and nothing more
    """
    found = newest_readable(Path(path))
    if found is None:
        return None
    model = algorithm.load(found, env=env, **kwargs)  # type: ignore[arg-type]
    if STATE not in vars(model):
        raise ValueError(f"{found} is a model, but not a checkpoint of ResumeCallback: load it with {algorithm.__name__}.load")
    if isinstance(model, OffPolicyAlgorithm):
        read_replay(found, checked_buffer(model))
    return model


class ResumeCallback(BaseCallback):
    """
    Checkpoints from which :func:`resume` and ``learn`` go on: the model with its optimiser, prior mix and step count, the
    replay buffer of an off-policy algorithm, the generators of Python, NumPy and torch, env steps, statistics of
    ``VecNormalize``, how far recorded starts have moved, and the state of other callbacks.
    They are written between an update and the next rollout, and once more at the end of training: from that one
    :func:`resume` gives the finished model, for which there is nothing left to ``learn``. (List this callback after those
    that it keeps, so that their last state is in it.) Schedules and TensorBoard go on where they were. On SIGINT
    or SIGTERM the rollout and its update are finished, a checkpoint is written and
    :class:`~sb3_dsrl.utils.interrupt.Interrupted` ends the script with exit code 130 or 143; a second signal acts at once.

    The inside of a simulator is not kept: after a resume all envs start new episodes, seeded with the model's seed and the
    env steps so far. With ``restart_episodes`` an uninterrupted run does the same at every checkpoint, so a run that was
    killed and resumed has bit for bit the parameters of one that was not. (A checkpoint upon SIGINT or SIGTERM, or at the
    end of a training that is prolonged later, comes out of turn: the run goes on as validly, but with other episodes.) For
    GAE and in the replay the cut episodes are truncated, as at the end of any rollout; no metric counts them. Without it
    episodes are cut by a resume only.

    A rollout of an off-policy algorithm is what lies between two calls of ``train``, by default one step of all envs. Its
    whole replay is part of each checkpoint: with a long one choose ``save_freq`` accordingly.

    A simulated scene remembers the contacts of its last episodes in the last bits, so ManiSkill's envs are built anew with
    these resets (``reconfigure``), which takes about 0.4 s an env and checkpoint. Other envs ignore that option.

    :param path: of the checkpoint, a zip that ``PPO.load`` also reads; the previous one is kept beside it
    :param save_freq: env steps between two checkpoints, rounded up to whole rollouts; None is 3,000 of each env
    :param keep: callbacks whose state is kept: :class:`~sb3_dsrl.SuccessEvalCallback`, SB3's ``EvalCallback``, or any with
        ``state_dict`` and ``load_state_dict``
    :param restart_episodes: see above
    :param reset_options: options of the resets at a checkpoint, see above; ``{}`` saves the time and gives up the last bits
    :raises ValueError: if ``save_freq`` is below 1 or the state of a callback is unknown
    """

    def __init__(
        self,
        path: str | Path,
        save_freq: int | None = None,
        *,
        keep: Sequence[BaseCallback] = (),
        restart_episodes: bool = True,
        reset_options: Mapping[str, Any] = RECONFIGURE,
    ) -> None:
        super().__init__()
        if save_freq is not None and save_freq < 1:
            raise ValueError(f"save_freq must be at least 1 env step, found {save_freq}")
        for callback in keep:
            if not isinstance(callback, EvalCallback) and not hasattr(callback, "load_state_dict"):
                raise ValueError(
                    f"The state of {type(callback).__name__} is unknown: it has no state_dict and load_state_dict"
                )
        self.path, self.keep = Path(path), list(keep)
        self.restart_episodes, self.reset_options = restart_episodes, dict(reset_options)
        #: env steps between two checkpoints; 0 before training if none were given
        self.save_freq = save_freq or 0
        #: env steps so far
        self.env_steps = 0
        self._saved_at = 0  # env steps
        self._resumed: dict[str, Any] | None = None
        self._signals = StopSignals("the end of this rollout and its update")

    def _init_callback(self) -> None:
        # Here, not at the start of training: the other callbacks must have their state before they start.
        if isinstance(self.model, OffPolicyAlgorithm):
            checked_buffer(self.model)
        self.save_freq = self.save_freq or 3_000 * self.training_env.num_envs
        self._resumed = vars(self.model).pop(STATE, None)
        if self._resumed is None:
            return
        done = self._resumed["num_timesteps"]
        if self.model.num_timesteps != done:
            raise ValueError(
                f"This model is a checkpoint at {done} macro-steps, but learn starts at {self.model.num_timesteps}: call "
                f"learn(total_timesteps - model.num_timesteps, ..., reset_num_timesteps=False)"
            )
        states = self._resumed["callbacks"]
        if len(states) != len(self.keep):
            raise ValueError(f"{self.path} has the state of {len(states)} callbacks, but keep has {len(self.keep)}")
        for callback, state in zip(self.keep, states, strict=True):
            if isinstance(callback, EvalCallback):
                vars(callback).update(state)
            else:
                callback.load_state_dict(state)  # type: ignore[attr-defined]
        self.env_steps = self._saved_at = self._resumed["env_steps"]
        normalize = self.model.get_vec_normalize_env()
        if normalize is not None and self._resumed["vec_normalize"] is not None:
            obs_rms, normalize.ret_rms = self._resumed["vec_normalize"]
            if obs_rms is not None:
                normalize.obs_rms = obs_rms
        if self._resumed.get("start_progress") is not None:
            set_progress(self.training_env, self._resumed["start_progress"])
        for records, saved in zip(self._pending_records(), self._resumed["records"], strict=True):
            records.update(saved)
        self._hide_later_records(done)

    def _pending_records(self) -> tuple[dict[str, Any], ...]:
        """What the last update recorded; the logger writes it after the next rollout."""
        return self.logger.name_to_value, self.logger.name_to_count, self.logger.name_to_excluded

    def _hide_later_records(self, step: int) -> None:
        """What TensorBoard got between the checkpoint and the end of the process will come once more."""
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                start = SessionLog(status=SessionLog.START)
                output.writer._get_file_writer().add_event(Event(step=step + 1, session_log=start))

    def _on_training_start(self) -> None:
        self._signals = StopSignals("the end of this rollout and its update", owner=self.model)
        self._signals.listen()

    def _on_step(self) -> bool:
        self.env_steps += sum(info.get("chunk_length", 1) for info in self.locals["infos"])
        return True

    def _on_rollout_start(self) -> None:
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            if "action_space" in state:  # SAC and TQC draw their warm-up from it
                self.model.action_space.np_random.bit_generator.state = state["action_space"]
            self._restart(state["rng"])
            return
        if self._signals.received and not self.env_steps:
            self._signals.leave("nothing was done yet")
        if self._signals.received:
            self.save()
            self._signals.leave(f"a resume goes on from {self.path}")
        if self.env_steps // self.save_freq > self._saved_at // self.save_freq:
            generators = self.save()
            if self.restart_episodes:
                self._restart(generators)

    def _on_training_end(self) -> None:
        self._signals.ignore()
        if self.env_steps > self._saved_at:
            self.save()
        if self._signals.received:  # it came during the very last update
            self._signals.leave(f"training is complete, its last checkpoint is {self.path}")

    def save(self) -> dict[str, Any]:
        """
        Writes a checkpoint now. It is complete only between an update and the next rollout.

        :return: states of the generators in it
        """
        self._saved_at = self.env_steps
        normalize = self.model.get_vec_normalize_env()
        generators = rng_state()
        state = dict(
            num_timesteps=self.model.num_timesteps,
            env_steps=self.env_steps,
            rng=generators,
            action_space=self.model.action_space.np_random.bit_generator.state,
            # without norm_obs there are no statistics of observations
            vec_normalize=None if normalize is None else (getattr(normalize, "obs_rms", None), normalize.ret_rms),
            start_progress=get_progress(self.training_env),
            records=[dict(records) for records in self._pending_records()],
            callbacks=[
                {name: getattr(callback, name) for name in EVAL_CALLBACK if hasattr(callback, name)}
                if isinstance(callback, EvalCallback)
                else callback.state_dict()  # type: ignore[attr-defined]
                for callback in self.keep
            ],
        )
        vars(self.model)[STATE] = state
        try:
            with atomic_file(self.path, keep_previous=True) as file:
                self.model.save(file)
                if isinstance(self.model, OffPolicyAlgorithm):
                    add_replay(file, checked_buffer(self.model))
        finally:
            del vars(self.model)[STATE]
        return generators

    def _restart(self, generators: dict[str, Any]) -> None:
        """New episodes in all envs, which depend on the seed and the env steps and on nothing else."""
        model, env = self.model, self.training_env
        if isinstance(model, OffPolicyAlgorithm):
            cut_episodes(checked_buffer(model))
            if model.action_noise is not None:
                model.action_noise.reset()
        env.seed(int(np.random.SeedSequence([model.seed or 0, self.env_steps]).generate_state(1)[0] >> 1))
        env.set_options(self.reset_options)
        model._last_obs = env.reset()  # type: ignore[assignment]
        model._last_episode_starts = np.ones(env.num_envs, bool)
        normalize = model.get_vec_normalize_env()
        if normalize is not None:
            model._last_original_obs = normalize.get_original_obs()
        set_rng_state(generators)  # envs in this process may have used them
