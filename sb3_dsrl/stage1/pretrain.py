"""Stage 1 in one call: learns the latent policy offline, from whatever data there is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.evaluation.search_result import SearchResult
from sb3_dsrl.policies.loading import FlowLike
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage1.aw_mle import FitCallback
from sb3_dsrl.stage1.fit import fit_candidates, fit_executed, fit_inverted, fit_searched
from sb3_dsrl.stage1.gate import Gate
from sb3_dsrl.stage1.settings import CandidateSettings, ExecutedSettings, FitSettings, InvertedSettings, SearchedSettings
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.utils.checkpoint import TrainingCheckpoint

Weighting = Literal["auto", "candidates", "executed", "inverted"]
Settings = TypeVar("Settings", bound=FitSettings)


def pretrain_latent(
    target: FlowLike | BaseAlgorithm,
    demos: Demos | str | Path | None = None,
    rollouts: Rollouts | None = None,
    *,
    search: SearchResult | None = None,
    weighting: Weighting = "auto",
    policy_kwargs: dict[str, Any] | None = None,
    gate: Gate | None = None,
    callback: FitCallback | None = None,
    callback_freq: int = 100,
    log_interval: int = 100,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
    **settings: Any,
) -> LatentPolicy:
    """
    Stage 1: trains a latent policy offline, before PPO or into a model that exists.

    With ``weighting="executed"`` this is :func:`fit_executed`: the noises of rollouts, weighted by their advantages. With
    ``weighting="inverted"`` it is :func:`fit_inverted`: the noises that demos need, and those of rollouts, weighted by their
    advantages. With ``weighting="candidates"`` it is :func:`fit_candidates`: noises in the states of demos and rollouts,
    weighted by the critic. With ``search`` it is :func:`fit_searched`: noises that were tried in the simulator, weighted by
    what followed.

    Where the env has a residual, the noise alone is trained: the residual's outputs stay as they are, so those of a new
    policy keep their mean of 0.

    :param target: a flow or its folder (returns a new policy), or a model with "LatentPolicy" on a steered env (trained in
        place)
    :param demos: demos, or the path of an ``.h5`` file; not for "executed"
    :param rollouts: from :func:`~sb3_dsrl.collect_rollouts`
    :param search: from :func:`~sb3_dsrl.search_noise`; it is then all that stage 1 learns from
    :param weighting: see above; "auto" takes "executed" where there are rollouts
    :param policy_kwargs: of the new policy, beside the recommended ones; only when ``target`` is a flow. A model that it is
        copied into must have the same ``net_arch``
    :param gate: tests the result on fresh rollouts and keeps the start if that was better; None keeps the result
    :param callback: called with the number of iterations that are done and the policy, which is in evaluation mode meanwhile;
        what it draws or changes in the policy does not reach the training
    :param callback_freq: iterations between two calls
    :param log_interval: iterations between two records in TensorBoard
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :param settings: fields of :class:`ExecutedSettings`, :class:`InvertedSettings`, :class:`CandidateSettings` or
        :class:`SearchedSettings`, such as ``n_iterations``, ``beta`` or ``n_candidates``; None is the recommended value
    :return: the trained policy, in evaluation mode
    :raises TypeError: if the target is neither a flow nor a model, or the weighting does not know a setting
    :raises ValueError: if the data is missing, does not fit the flow or is not used by the weighting, or a setting is out of
        range
    """
    if search is not None and (demos is not None or rollouts is not None or weighting != "auto"):
        raise ValueError("pretrain_latent(search=...) learns from the search alone: leave out demos, rollouts and weighting")
    if search is None and demos is None and rollouts is None:
        raise ValueError("pretrain_latent needs demos, rollouts, or both, or a search")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting must be 'auto', 'candidates', 'executed' or 'inverted', found {weighting!r}")
    common: dict[str, Any] = dict(
        policy_kwargs=policy_kwargs,
        gate=gate,
        callback=callback,
        callback_freq=callback_freq,
        log_interval=log_interval,
        seed=seed,
        tensorboard_log=tensorboard_log,
        progress_bar=progress_bar,
        checkpoint=checkpoint,
    )
    if search is not None:
        return fit_searched(target, search, _settings(SearchedSettings, "searched", settings), **common)
    if weighting == "candidates" or (rollouts is None and weighting == "auto"):
        return fit_candidates(target, demos, rollouts, _settings(CandidateSettings, "candidates", settings), **common)
    if weighting == "inverted":
        if demos is None:
            raise ValueError("weighting='inverted' weighs the noises that demos need, but no demos were given")
        return fit_inverted(target, demos, rollouts, _settings(InvertedSettings, "inverted", settings), **common)
    if rollouts is None:
        raise ValueError("weighting='executed' weighs the noises of rollouts, but no rollouts were given")
    if demos is not None:
        raise ValueError(
            "weighting='executed' learns from rollouts alone, but demos were given, too: leave them out, or use both with "
            "weighting='candidates' or 'inverted'"
        )
    return fit_executed(target, rollouts, _settings(ExecutedSettings, "executed", settings), **common)


def _settings(cls: type[Settings], weighting: str, given: dict[str, Any]) -> Settings:
    known = [field.name for field in fields(cls)]
    what = "search=..." if cls is SearchedSettings else f"weighting={weighting!r}"
    for name in given:
        if name not in known:
            raise TypeError(f"{what} does not know the setting {name!r}; it knows {', '.join(known)}")
    return cls(**{name: value for name, value in given.items() if value is not None})
