"""Golden tickets: the one fixed noise with which a frozen flow succeeds most, as a control and as a start for RL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_dsrl.evaluation.outcomes import play_outcomes
from sb3_dsrl.evaluation.play import as_vec_env
from sb3_dsrl.steering.contract import PLAYING, Contract, check_agreement
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.vec_env import find_steering
from sb3_dsrl.utils.hub import About, HubModel, find_folder
from sb3_dsrl.utils.integrity import check_config, config_sha256, one_line

#: What a folder holds: all but the arrays, and those.
CONFIG, ARRAYS = "config.json", "ticket.safetensors"


@dataclass
class Ticket(HubModel, library_name="sb3_dsrl", tags=["robotics", "reinforcement-learning", "golden-ticket"]):
    """
    What :func:`find_ticket` found. ``save_pretrained``, ``push_to_hub`` and :meth:`from_pretrained` work as those of a flow.

    :param w: the noise, of the shape that the env steers, (T, A), (H, A) or (1, A)
    :param success_at_end: of the episodes that chose it; they flatter it, so evaluate it on others
    :param mean_return: of the same episodes
    :param episodes: episodes of this noise
    :param env_steps: env steps of the whole search
    :param first_round: success_at_end of every episode of the first round, (noises, episodes), best noise first; a column is
        one start
    :param contract: of the env that the noise was found in
    :param env_id: its task; None is unknown
    """

    w: np.ndarray
    success_at_end: float
    mean_return: float
    episodes: int
    env_steps: int
    first_round: np.ndarray
    contract: Contract
    env_id: str | None = None

    @property
    def tried(self) -> np.ndarray:
        """Mean success_at_end of every noise of the first round, (noises,), best first."""
        return self.first_round.mean(axis=1)

    def noise_for(self, env: gym.Env | VecEnv) -> np.ndarray:
        """
        The noise, for an env that steers the same flow in the same way: an actor of :func:`~sb3_dsrl.evaluate`, or ``centre``
        of a new :class:`~sb3_dsrl.LatentPolicy`.

        :param env: steered env, gym or vectorised
        :raises ValueError: if the same noise means something else there
        """
        check_agreement("ticket", self.contract, "env", find_steering(as_vec_env(env)).contract, PLAYING)
        return self.w

    def about(self) -> About:
        """What the model card tells of the ticket."""
        facts = dict(
            task=self.env_id or "unknown",
            noise=f"{self.w.shape}",
            success_in_the_search=f"{self.success_at_end:.2f} of {self.episodes} episodes, which chose it and flatter it",
            noises_tried=len(self.first_round),
            env_steps_of_the_search=self.env_steps,
            **self.contract.as_dict(),
        )
        text = (
            "One fixed noise for a frozen flow policy, the best of those that were tried: a control for what steers the flow, "
            "and a start for reinforcement learning. It is for the flow with the fingerprint below, and for no other."
        )
        load = f"""
from sb3_dsrl import FlowPolicy, Ticket, evaluate, make_latent_env

ticket = Ticket.from_pretrained("{{path}}")
flow = FlowPolicy.from_pretrained("path/to/its/flow")
env = make_latent_env("{self.env_id or "MyEnv-v0"}", flow, steer_mode="{self.contract.steer_mode}")
print(evaluate(ticket.noise_for(env), env))
"""
        return About("Golden ticket", text, self.env_id, facts, load)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_file(dict(w=self.w, first_round=self.first_round), save_directory / ARRAYS)
        config: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN} | dict(contract=self.contract.as_dict())
        self._hub_mixin_config = config | dict(sha256=config_sha256(config, save_directory / ARRAYS))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Ticket:  # type: ignore[override]
        """
        Loads what ``save_pretrained`` wrote.

        :param pretrained_model_name_or_path: folder, or repository of the Hugging Face hub
        :param kwargs: further arguments of ``huggingface_hub.snapshot_download``, such as ``revision``
        :raises FileNotFoundError: if there is no such folder or repository, or a file is missing
        :raises ValueError: if files are damaged
        """
        folder = find_folder(pretrained_model_name_or_path, (CONFIG, ARRAYS), "Ticket.save_pretrained", **kwargs)
        try:
            check_config(folder, ARRAYS)
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            content: dict[str, Any] = {name: config[name] for name in _PLAIN} | load_file(folder / ARRAYS)
            return cls(**content, contract=Contract(**config["contract"]))
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} does not hold a valid Ticket: {one_line(error)}") from error


_PLAIN = ("success_at_end", "mean_return", "episodes", "env_steps", "env_id")


def find_ticket(
    env: gym.Env | VecEnv,
    *,
    rounds: Sequence[tuple[int, int]] = ((32, 8), (5, 32)),
    include_zero: bool = True,
    seed: int = 0,
    progress_bar: bool = False,
) -> Ticket:
    """
    Successive halving over noises from the prior (https://arxiv.org/abs/1603.04638 has the general scheme): all of them
    play a few episodes, the best of them more. Success counts, the mean return decides between equals. (One round of
    8 episodes chooses by luck.)

    All noises of a round play the same starts, as far as :func:`~sb3_dsrl.evaluation.play.play` says, so none of them wins by
    easier ones; the next round plays others. Each noise plays in all envs at once: episodes that are a multiple of the
    number of envs leave none of them idle.

    :param env: steered env, gym or vectorised
    :param rounds: (noises, episodes of each) of every round, no more noises from one to the next
    :param include_zero: the first noise is w = 0, the prior's mode, instead of a drawn one
    :param seed: of the noises and of the episodes
    :param progress_bar: show a progress bar
    :return: the noise that succeeds most, and how it was found
    :raises ValueError: if a round has more noises than the one before, or there is none, or the env reports no success
    """
    counts = [n for n, _ in rounds]
    if not counts or min(counts) < 1 or counts != sorted(counts, reverse=True) or min(e for _, e in rounds) < 1:
        raise ValueError(f"rounds must be (noises, episodes) with no more noises from one to the next, found {rounds}")
    venv = as_vec_env(env)
    steering = find_steering(venv)
    noises = draw_noises(steering.action_space, counts[0], include_zero, seed)
    tally = _Tally(len(noises))
    order = np.arange(len(noises))
    first_round = np.zeros((0, 0))
    with tqdm(total=sum(n * episodes for n, episodes in rounds), desc="golden ticket", disable=not progress_bar) as bar:
        for number, (n, episodes) in enumerate(rounds):
            starts = seed + number * max(1_000, venv.num_envs)  # every round plays others
            for j in order[:n]:
                tally.play(j, noises[j], venv, episodes, starts)
                bar.update(episodes)
            order = np.array(sorted(order[:n], key=tally.score, reverse=True))
            if number == 0:
                first_round = np.array([tally.success[j] for j in order])
    best = order[0]
    found = noises[best], *tally.score(best), len(tally.success[best]), tally.env_steps, first_round
    return Ticket(*found, contract=steering.contract, env_id=steering.flow.env_id)


def draw_noises(space: NoiseSpace, n: int, include_zero: bool, seed: int) -> np.ndarray:
    """
    :param space: of the env
    :param n: noises
    :param include_zero: the first one is w = 0
    :param seed: of the others, which come from the prior
    :return: (n, T, A), (n, H, A) or (n, 1, A)
    """
    noises = np.random.default_rng(seed).standard_normal((n, *space.noise_shape)).astype(np.float32)
    noises = noises.clip(-space.contract.noise_bound, space.contract.noise_bound)
    if include_zero:
        noises[0] = 0.0
    return noises


class _Tally:
    """Success and return of every episode of every noise, and the env steps that they took."""

    def __init__(self, n_noises: int) -> None:
        self.success: list[list[float]] = [[] for _ in range(n_noises)]
        self.returns: list[list[float]] = [[] for _ in range(n_noises)]
        self.env_steps = 0

    def play(self, j: int, w: np.ndarray, venv: VecEnv, episodes: int, seed: int) -> None:
        """Plays noise j; a place in its outcomes stands for the same start in those of every noise."""
        played = play_outcomes(w, venv, episodes, seed, who="find_ticket")
        self.env_steps += played.env_steps
        self.success[j] += played.success_at_end.astype(float).tolist()
        self.returns[j] += played.returns.tolist()

    def score(self, j: int) -> tuple[float, float]:
        """Mean success_at_end and mean return of noise j so far."""
        return float(np.mean(self.success[j])), float(np.mean(self.returns[j]))
