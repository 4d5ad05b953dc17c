"""Can latent steering help this flow? A few hundred episodes tell, before anything is trained.

Letters in shapes: ``S`` states, ``M`` noises, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dsrl.evaluation.best_of import BestOfM
from sb3_dsrl.evaluation.chunk_reach import chunk_reach
from sb3_dsrl.evaluation.play import Actor, as_vec_env, evaluate, quota_per_env, require_success
from sb3_dsrl.evaluation.results import EvalResult
from sb3_dsrl.evaluation.rollouts import Rollouts, collect_rollouts
from sb3_dsrl.evaluation.steerability_report import ActionSpread, SteerabilityReport
from sb3_dsrl.evaluation.tickets import find_ticket
from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.policies.networks import EnsembleChunkCritic
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import Demos, chunks_from_now
from sb3_dsrl.stage0.features import check_demos_fit, encode_demos
from sb3_dsrl.steering.contract import check_act_horizon
from sb3_dsrl.steering.scores import score_noises
from sb3_dsrl.steering.steering import Steering
from sb3_dsrl.steering.vec_env import find_steering

#: Base and controls play starts of their own: not those of the search for a ticket, of a gate or of a script's evaluation.
TEST_SEED = 2_000_000
#: Macro-steps that the critic scores at once.
BLOCK = 4_096


def steerability(
    flow: FlowLike,
    env: gym.Env | VecEnv,
    critic: EnsembleChunkCritic | None = None,
    demos: Demos | str | Path | None = None,
    *,
    episodes: int = 400,
    n_tickets: int = 16,
    n_candidates: int = 16,
    kappa: float = 1.0,
    seed: int = 0,
    progress_bar: bool = False,
) -> SteerabilityReport:
    """
    Tries what steering could do to a flow, before anything is trained.

    A quarter of the episodes is the flow itself. An eighth each goes to w = 0, to the best fixed noise, once it is chosen,
    and to the best of M by the critic (or, without a critic, to other noises of the prior), all from the same starts as the
    first half of the base episodes. The rest searches the fixed noise, on other starts: with the defaults 16 noises play the
    same 7 episodes and the best 3 of them 12 more.

    :param flow: the flow that the env steers, or its folder
    :param env: steered env, gym or vectorised; let it ignore terminations, so that ``success_at_end`` is judged at the time
        limit
    :param critic: ensemble chunk critic; None is the flow's own, if that is trained, and for the H that the env
        executes
    :param demos: the flow's demos, or the path of an ``.h5`` file, to compare the spread of actions with, and
        to see which part of their chunks the noise can reach; or None
    :param episodes: at most, in all
    :param n_tickets: fixed noises that are tried
    :param n_candidates: M of the best of M
    :param kappa: the critic's score is mean - kappa * std over the ensemble
    :param seed: of noises and episodes
    :param progress_bar: show progress bars
    :return: what was found; print it, plot it or save it
    :raises ValueError: if the env steers another flow or reports no success, the demos do not fit, or the episodes are too few
    """
    flow, steering = resolve_flow(flow), find_steering(env)
    check_act_horizon(flow, steering.contract)
    if steering.contract.flow_hash != flow.fingerprint():
        raise ValueError(
            f"The env steers the flow {steering.contract.flow_hash}, but flow is {flow.fingerprint()}: expected the same"
        )
    if isinstance(demos, (str, Path)):
        demos = load_demos(demos)
    if demos is not None:  # looked at last, but a file that does not fit should not cost the episodes before
        check_demos_fit(flow, demos)
        if len(demos.episodes) < 2:
            raise ValueError(f"{demos.path} holds one episode, expected at least 2 to compare with each other")
    n_base, n_control, rounds = _split(episodes, n_tickets)
    recorder = _OutcomeRecorder(as_vec_env(env))
    own = flow.critic
    if critic is None and own is not None and own.updates and own.act_horizon == flow.act_horizon:
        critic = own
    best_of = None if critic is None else BestOfM(recorder, critic, n_candidates, kappa)
    tests_seed, passes = TEST_SEED + seed, []

    def test(name: str, actor: Actor, noise_seed: int | None = None) -> EvalResult:
        how: dict[str, Any] = dict(name=name, seed=tests_seed, noise_seed=noise_seed, progress_bar=progress_bar)
        result = evaluate(actor, recorder, n_control, **how)
        passes.append(recorder.outcomes)
        return result

    rollouts = collect_rollouts(flow, recorder, n_base, seed=tests_seed, progress_bar=progress_bar)
    assert rollouts.result is not None  # the recorder has seen success
    passes.append(recorder.outcomes)
    zero = test("zero", "zero")
    search = find_ticket(recorder, rounds=rounds, include_zero=False, seed=seed, progress_bar=progress_bar)
    ticket = test("ticket", search.w)
    if best_of is None:
        other = test("prior again", "prior", noise_seed=seed)
    else:
        other = test(f"best_of_{n_candidates}", best_of)
    encoded = None if demos is None else encode_demos(flow, demos)
    auc_first, auc_episode = (None, None) if critic is None else _critic_auc(steering, critic, rollouts, kappa)
    return SteerabilityReport(
        base=replace(rollouts.result, name="prior"),
        zero=zero,
        ticket=ticket,
        best_of=None if best_of is None else other,
        search=search,
        search_episodes=rounds[0][1],
        spread=_action_spread(steering, rollouts, encoded, seed),
        auc_first_chunk=auc_first,
        auc_episode=auc_episode,
        tries=_paired(passes, n_control),
        rollouts=rollouts,
        env_steps=recorder.env_steps,
        act_horizon=flow.act_horizon,
        demo_chunks=None if encoded is None else chunk_reach(steering, rollouts, encoded, seed),
    )


class _OutcomeRecorder(VecEnvWrapper):
    """
    Counts the env steps of everything that is played, and keeps how the episodes since the last reset ended: a list for each
    env, in order. The same seed starts the same episodes, so that two actors can be compared start by start.

    :param venv: steered envs
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.env_steps = 0
        self.outcomes: list[list[bool]] = []

    def reset(self) -> VecEnvObs:
        self.outcomes = [[] for _ in range(self.num_envs)]
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        require_success(infos, "steerability")
        for outcomes, info in zip(self.outcomes, infos, strict=True):
            self.env_steps += info["chunk_length"]
            if "success_at_end" in info:
                outcomes.append(bool(info["success_at_end"]))
        return obs, rewards, dones, infos


def _paired(passes: list[list[list[bool]]], episodes: int) -> np.ndarray:
    """
    Start by start, what came of it in every pass, (episodes, passes). What an env played beyond its quota is left out:
    only short episodes leave time for that.
    """
    quotas = quota_per_env(episodes, len(passes[0]))
    of_envs = zip(quotas, zip(*passes, strict=True), strict=True)
    return np.array([tries for quota, played in of_envs for tries in zip(*(one[:quota] for one in played), strict=True)])


def _split(episodes: int, n_tickets: int) -> tuple[int, int, tuple[tuple[int, int], tuple[int, int]]]:
    """Base episodes, those of each control, and the rounds of the search."""
    if n_tickets < 2:
        raise ValueError(f"n_tickets must be at least 2, found {n_tickets}")
    search, finalists = episodes * 3 // 8, max(1, n_tickets // 5)
    each = search * 3 // 4 // n_tickets
    if each < 2:  # one episode tells nothing of luck
        fewest = next(n for n in range(episodes + 1, 8 * n_tickets + 1) if n * 3 // 8 * 3 // 4 >= 2 * n_tickets)
        raise ValueError(f"episodes must be at least {fewest} for {n_tickets} tickets, found {episodes}")
    return episodes // 4, episodes // 8, ((n_tickets, each), (finalists, (search - each * n_tickets) // finalists))


@th.no_grad()
def _critic_auc(
    steering: Steering, critic: EnsembleChunkCritic, rollouts: Rollouts, kappa: float
) -> tuple[float | None, float | None]:
    blocks = zip(rollouts.cond.split(BLOCK), rollouts.chunk.split(BLOCK), rollouts.w.split(BLOCK), strict=True)
    score = th.cat([_scores(steering, critic, cond, chunk, w, kappa).cpu() for cond, chunk, w in blocks]).numpy()
    first = np.flatnonzero(np.diff(rollouts.episode, prepend=-1))
    mean = np.bincount(rollouts.episode, weights=score) / np.bincount(rollouts.episode)
    return _auc(score[first], rollouts.success_at_end), _auc(mean, rollouts.success_at_end)


def _scores(
    steering: Steering, critic: EnsembleChunkCritic, cond: th.Tensor, chunk: th.Tensor, w: th.Tensor, kappa: float
) -> th.Tensor:
    """Of the chunks that were executed; a critic that scores another part of them sees the noises decoded again."""
    steering.flow.check_critic(critic)
    device = next(critic.parameters()).device
    if critic.first_action in (None, steering.flow.action_offset):
        return critic.get_ucb_q(cond.to(device), chunk.to(device), kappa)
    noise = steering.full_noise(w.to(device))[:, None]
    return score_noises(steering, critic, cond.to(device), noise, kappa)[:, 0]


def _auc(score: np.ndarray, success: np.ndarray) -> float | None:
    """Area under the ROC curve; None if all episodes ended alike."""
    from scipy.stats import mannwhitneyu  # a second of every import otherwise

    of_successes, of_failures = score[success], score[~success]
    if not len(of_successes) or not len(of_failures):
        return None
    statistic = mannwhitneyu(of_successes, of_failures, method="asymptotic").statistic
    return float(statistic / (len(of_successes) * len(of_failures)))


@th.no_grad()
def _action_spread(
    steering: Steering,
    rollouts: Rollouts,
    encoded: Demos | None,
    seed: int,
    n_states: int = 128,
    n_noises: int = 32,
    n_similar: int = 8,
) -> ActionSpread:
    flow, generator = steering.flow, th.Generator().manual_seed(seed)
    states = rollouts.cond[th.randperm(len(rollouts), generator=generator)[:n_states]].to(flow.device)
    w = steering.choices(len(states), n_noises, generator=generator)
    chunks = flow.executed(flow.decode(states, w.to(flow.device), steering.contract.num_steps)).cpu()
    noise = chunks.var(dim=1).mean(dim=0).sqrt().numpy()
    if encoded is None:
        return ActionSpread(noise, rollouts.chunk.std(dim=0, unbiased=False).numpy(), "base episodes", None)
    of_demos = [chunks_from_now(episode, encoded.control_mode, flow.act_horizon) for episode in encoded.episodes]
    # One state an episode: its neighbours in time are no other choice that a demonstrator made.
    nearest = [th.cdist(states.cpu(), th.from_numpy(episode.obs[:-1])).min(dim=1) for episode in encoded.episodes]
    order = np.stack([found.values.numpy() for found in nearest]).argsort(axis=0)[:n_similar, :, None, None]
    candidates = np.stack([chunk[found.indices.numpy()] for chunk, found in zip(of_demos, nearest, strict=True)])
    similar = np.take_along_axis(candidates, order, axis=0)  # (8, S, H, A)
    return ActionSpread(
        noise,
        np.concatenate(of_demos).std(axis=0),
        "demos",
        np.sqrt(similar.var(axis=0, ddof=1).mean(axis=0)),
    )
