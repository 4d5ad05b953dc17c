"""What a search has found, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_dsrl.evaluation.results import EvalResult
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.utils.checkpoint import atomic_file
from sb3_dsrl.utils.integrity import check_zip, one_line

TENSORS = ("cond", "w", "scores", "returns_to_go")
ARRAYS = ("episode", "success_once", "success_at_end", "returns", "lengths")


@dataclass
class SearchResult:
    """
    Macro-steps that were searched, grouped by episode and in order.

    :param cond: features, (S, C)
    :param w: noises that were tried, (S, M, T, A), (S, M, H, A) or (S, M, 1, A), see ``steer_mode``; w = 0 comes first
    :param scores: their discounted rewards, (S, M); the highest was played
    :param returns_to_go: discounted macro rewards from the state to the end of its episode, as it was played, (S,)
    :param episode: index of the episode, (S,)
    :param env_steps: all env steps that the simulator executed, those of the look-aheads, too
    :param contract: of the env that was steered
    :param success_once: of each episode, (episodes,)
    :param success_at_end: of each episode, (episodes,)
    :param returns: undiscounted, of each episode, (episodes,)
    :param lengths: of each episode in env steps, (episodes,)
    """

    cond: th.Tensor
    w: th.Tensor
    scores: th.Tensor
    returns_to_go: th.Tensor
    episode: np.ndarray
    env_steps: int
    contract: Contract
    success_once: np.ndarray
    success_at_end: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.cond)

    @property
    def result(self) -> EvalResult:
        """Outcome of the episodes: what the search itself reaches. (All fail where the env does not report success.)"""
        return EvalResult.of("search", self.success_once, self.success_at_end, self.returns, self.lengths)

    def __add__(self, other: SearchResult) -> SearchResult:
        """
        Two searches as one, of any two proposals.

        :raises ValueError: if they are of different envs or flows, or have different numbers of candidates
        """
        different = self.contract.differences(other.contract)
        if different:
            raise ValueError(f"These searches differ in {', '.join(different)}")
        if self.w.shape[1:] != other.w.shape[1:]:
            raise ValueError(
                f"Both searches must have noises of the same shape (M, ...), found {tuple(self.w.shape[1:])} and "
                f"{tuple(other.w.shape[1:])}"
            )
        joined: dict[str, Any] = {name: th.cat([getattr(self, name), getattr(other, name)]) for name in TENSORS}
        joined |= {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in ARRAYS[1:]}
        joined["episode"] = np.concatenate([self.episode, other.episode + len(self.returns)])
        return SearchResult(**joined, env_steps=self.env_steps + other.env_steps, contract=self.contract)

    def save(self, path: str | Path) -> None:
        """
        Writes all of it to one file: NumPy's ``.npz``, with the contract in it.

        :param path: the file, of any name
        :raises OSError: if it cannot be written, because the disk is full, say
        """
        arrays: dict[str, Any] = {name: getattr(self, name).numpy() for name in TENSORS}
        arrays |= {name: getattr(self, name) for name in ARRAYS}
        rest = dict(env_steps=self.env_steps, contract=self.contract.as_dict())
        with atomic_file(Path(path)) as file:
            np.savez_compressed(file, rest=np.array(json.dumps(rest)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """
        Reads what :meth:`save` wrote. No code in the file is executed.

        :param path: the file
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if it is another file, or damaged
        """
        check_zip(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                tensors: dict[str, Any] = {name: th.from_numpy(file[name]) for name in TENSORS}
                arrays = {name: file[name] for name in ARRAYS}
                rest = json.loads(str(file["rest"]))
            rest["contract"] = Contract(**rest["contract"])
            return cls(**tensors, **arrays, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of SearchResult.save ({one_line(error)})") from error
