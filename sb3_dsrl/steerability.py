"""Can latent steering help this flow? A report from a few hundred episodes, before anything is trained.

Letters in shapes: ``S`` states, ``M`` noises, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dsrl.best_of import BestOfM
from sb3_dsrl.demos import Demos, chunks_from_now, load_demos
from sb3_dsrl.evaluation import EvalResult, Player, Rollouts, collect_rollouts, evaluate, quota_per_env, results_table
from sb3_dsrl.features import check_demos_fit, encode_demos
from sb3_dsrl.networks import EnsembleChunkCritic
from sb3_dsrl.noise_policy import NoisePolicy
from sb3_dsrl.steering import Steering
from sb3_dsrl.tickets import Ticket, find_ticket
from sb3_dsrl.wrappers import find_steering

#: Base and controls play starts of their own: not those of the search for a ticket, of a gate or of a script's evaluation.
TEST_SEED = 2_000_000


@dataclass
class ActionSpread:
    """
    Standard deviations of the actions of a chunk, per chunk step and action dimension.

    :param noise: of decoded actions over noise, root mean square over states of the base episodes, (H, A)
    :param overall: of the actions over all states and noises, (H, A): the scale of the task's actions
    :param source: what ``overall`` is of, "demos" or "base episodes"
    :param similar: of the demos' actions at similar states, (H, A), or None without demos: around each state of the base
        episodes the nearest state of each of the 8 nearest demo episodes. It holds some of the difference between those
        states as well, so it is rather too large.
    """

    noise: np.ndarray
    overall: np.ndarray
    source: str
    similar: np.ndarray | None

    @property
    def ratio(self) -> float:
        """
        Mean of ``noise`` over mean of ``overall``: which part of the actions the noise decides. (Not over ``similar``: a flow
        fits its data, so that ratio is near 1 for clean demos just as for diverse ones.)
        """
        return float(self.noise.mean() / max(self.overall.mean(), 1e-3))


@dataclass
class SteerabilityReport:
    """
    What :func:`steerability` found. ``print`` shows it; :meth:`as_dict`, :meth:`save_json` and :meth:`plot` keep it.

    :param base: the flow as it is, w ~ N(0, I)
    :param zero: w = 0
    :param ticket: the best fixed noise, on episodes that did not choose it
    :param best_of: best of M by the critic at every macro-step; None without a critic
    :param search: the search for the ticket; ``search.w`` is the noise
    :param search_episodes: episodes of each noise in the first round of the search
    :param spread: of actions over noise
    :param auc_first_chunk: probability that the critic scores the first chunk of a successful base episode above that of a
        failed one; None without a critic, or if all base episodes ended alike
    :param auc_episode: the same with the mean score over the episode. It is easier: the critic also sees how far a state is.
    :param tries: success_at_end of several plays from the same starts, (starts, plays); the first play is a base episode.
        The starts are the same as far as :func:`~sb3_dsrl.evaluation.play` says.
    :param rollouts: the base episodes, which stage 1 can learn from
    :param env_steps: env steps that the simulator executed for all of this
    """

    base: EvalResult
    zero: EvalResult
    ticket: EvalResult
    best_of: EvalResult | None
    search: Ticket
    search_episodes: int
    spread: ActionSpread
    auc_first_chunk: float | None
    auc_episode: float | None
    tries: np.ndarray
    rollouts: Rollouts
    env_steps: int

    @property
    def rows(self) -> list[EvalResult]:
        """Base and controls."""
        return [row for row in (self.base, self.zero, self.ticket, self.best_of) if row is not None]

    @property
    def best(self) -> EvalResult:
        """The control that succeeds most."""
        return max((self.ticket, self.zero, *self.rows[3:]), key=lambda row: row.success_at_end)

    @property
    def best_helps(self) -> bool:
        """
        Whether the intervals of the best control and of the base are apart. (Less would not do: the best of three that are
        as good as the base has its interval above the base's success in one report of six.)
        """
        return self.best.ci_low > self.base.ci_high

    @property
    def luck_std(self) -> float:
        """Standard deviation that the success of the search's noises would have by luck, if all were equally good."""
        mean = self.search.tried.mean()
        return float(np.sqrt(mean * (1 - mean) / self.search_episodes))

    @property
    def ticket_std(self) -> float:
        """Standard deviation of the success of fixed noises beyond luck (moments of the beta-binomial)."""
        excess = self.search.tried.var(ddof=1) - self.luck_std**2
        return float(np.sqrt(max(0.0, excess) * self.search_episodes / (self.search_episodes - 1)))

    @property
    def reach(self) -> float:
        """Part of the starts that the flow solves with any of the noises that were tried from there."""
        return float(self.tries.any(axis=1).mean())

    @property
    def reachable_gain(self) -> float:
        """
        Part of the starts that a base episode failed and another noise solved. Steering of the frozen flow can solve them,
        as far as it is noise that made the difference and not chance in the simulator.
        """
        return self.reach - float(self.tries[:, 0].mean())

    @property
    def shown_gain(self) -> float:
        """
        Success that the best control gains on the base with nothing learned, shrunk by what luck could have made of it
        (positive-part James-Stein). That it is the best of up to three still flatters it a little.
        """
        gain = self.best.success_at_end - self.base.success_at_end
        error = sum(row.success_at_end * (1 - row.success_at_end) / row.episodes for row in (self.base, self.best))
        return gain * max(0.0, 1 - error / gain**2) if gain > 0 else 0.0

    @property
    def potential(self) -> float:
        """
        A guess of how much success stage 2 will gain, to rank flows by: halfway between :attr:`shown_gain`, a floor, and
        :attr:`reachable_gain`, which needs a policy that chooses the noise of every start.
        """
        return (self.shown_gain + self.reachable_gain) / 2

    @property
    def verdict(self) -> str:
        """One sentence."""
        return next(sentence for applies, sentence in RULES if applies(self)).format(r=self)

    @property
    def findings(self) -> str:
        """Everything but the table of results, as text."""
        tried, spread = self.search.tried, self.spread
        lines = [
            f"Golden tickets: {len(tried)} noises with {self.search_episodes} episodes each reached {tried.min():.2f} to "
            f"{tried.max():.2f}, std {tried.std(ddof=1):.2f}; luck alone gives {self.luck_std:.2f}, beyond it "
            f"{self.ticket_std:.2f}. The best reached {self.search.success_at_end:.2f} where it was chosen and "
            f"{self.ticket.success_at_end:.2f} on fresh episodes.",
            f"Actions: std over noise {spread.noise.mean():.3f}, {spread.ratio:.2f} of the std of all actions of the "
            f"{spread.source} ({spread.overall.mean():.3f})"
            + ("." if spread.similar is None else f"; demos at similar states {spread.similar.mean():.3f}."),
            *(
                f"    {name:>14}, by dimension: {' '.join(f'{value:.2f}' for value in std.mean(axis=0))}"
                for name, std in (("over noise", spread.noise), ("all", spread.overall), ("similar states", spread.similar))
                if std is not None
            ),
            "Critic: no trained critic."
            if self.best_of is None
            else "Critic: all base episodes ended alike, so its scores could not be judged."
            if self.auc_first_chunk is None
            else f"Critic: AUC of its score of the first chunk against success {self.auc_first_chunk:.2f}, of the mean score "
            f"of the episode {self.auc_episode:.2f} (0.5 is chance)."
            + (" What it chooses is worse than chance." if self.best_of.ci_high < self.base.success_at_end else ""),
            f"Reach: {self.reach:.2f} of {len(self.tries)} starts were solved by one of {self.tries.shape[1]} noises, "
            f"{self.tries[:, 0].mean():.2f} by the flow's first.",
            f"Potential: {self.potential:+.2f} (shown {self.shown_gain:.2f}, reachable {self.reachable_gain:.2f}). "
            f"Env steps used: {self.env_steps:,}.",
            f"Verdict: {self.verdict}",
        ]
        return "\n".join(lines)

    def text(self) -> str:
        """
        :return: the table of results and what they mean
        """
        return f"{results_table(self.rows)}\n\n{self.findings}"

    def __str__(self) -> str:
        return self.text()

    def as_dict(self) -> dict[str, Any]:
        """
        :return: everything but the rollouts, ready for JSON
        """
        spread = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self.spread).items()}
        return dict(
            verdict=self.verdict,
            potential=self.potential,
            shown_gain=self.shown_gain,
            reachable_gain=self.reachable_gain,
            reach=dict(
                starts=len(self.tries), plays=self.tries.shape[1], solved=self.reach, base=float(self.tries[:, 0].mean())
            ),
            rows=[row.as_row() for row in self.rows],
            tickets=dict(
                success_at_end=self.search.tried.tolist(),
                episodes_each=self.search_episodes,
                luck_std=self.luck_std,
                std_beyond_luck=self.ticket_std,
                best=dict(success_at_end=self.search.success_at_end, episodes=self.search.episodes, w=self.search.w.tolist()),
            ),
            action_std=spread | dict(ratio=self.spread.ratio),
            critic=None if self.best_of is None else dict(auc_first_chunk=self.auc_first_chunk, auc_episode=self.auc_episode),
            env_steps=self.env_steps,
        )

    def save_json(self, path: str | Path) -> None:
        """
        :param path: the ``.json`` file to write
        """
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def plot(self, path: str | Path) -> None:
        """
        :param path: the picture to write, ``.png`` or another type that matplotlib knows
        """
        from sb3_dsrl.steerability_figure import draw

        draw(self, path)


Rule = tuple[Callable[[SteerabilityReport], bool], str]

#: The verdict is the sentence of the first rule that applies.
RULES: tuple[Rule, ...] = (
    (
        lambda r: r.base.success_at_end >= 0.95,
        "The flow already succeeds in {r.base.success_at_end:.2f} of its episodes: little to gain.",
    ),
    (
        lambda r: r.reach == r.base.success_at_end == r.search.success_at_end == 0,
        "Nothing ever succeeded, neither the flow nor any noise tried: RL would see no success. Better demos or a better flow "
        "come first.",
    ),
    (
        lambda r: r.best_helps and r.best is r.ticket,
        "A fixed noise already reaches {r.ticket.success_at_end:.2f} (the flow alone {r.base.success_at_end:.2f}): start from "
        "it.",
    ),
    (
        lambda r: r.best_helps and r.best is r.zero,
        "w = 0 already reaches {r.zero.success_at_end:.2f} (the flow alone {r.base.success_at_end:.2f}): start from it, with "
        "a std below 1.",
    ),
    (
        lambda r: r.best_helps,
        "The best noise by the critic already reaches {r.best.success_at_end:.2f} (the flow alone "
        "{r.base.success_at_end:.2f}): let stage 1 weigh candidates by the critic.",
    ),
    (
        lambda r: r.spread.ratio < 0.1,
        "Noise barely changes the actions (ratio {r.spread.ratio:.2f}): train the flow on more diverse data.",
    ),
    (
        lambda r: r.reachable_gain >= 0.15,
        "No fixed noise helps for sure, but {r.reach:.2f} of the starts are solved by one noise or another "
        "({r.base.success_at_end:.2f} by the flow alone): stage 2, which chooses by state, has room.",
    ),
    (
        lambda r: True,
        "No noise tried helps ({r.best.success_at_end:.2f} at best, the flow alone {r.base.success_at_end:.2f}), and few "
        "starts depend on the noise: expect little from steering.",
    ),
)


def steerability(
    flow: NoisePolicy,
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
    first half of the base episodes. The rest searches the fixed noise, on other starts: with the defaults 16 noises play 7
    episodes and the best 3 of them 12 more.

    :param flow: the flow that the env steers
    :param env: steered env, gym or vectorised; let it ignore terminations, so that ``success_at_end`` is judged at the time
        limit
    :param critic: ensemble chunk critic; None is the flow's own, if that is trained
    :param demos: the flow's demos, or the path of an ``.h5`` file, to compare the spread of actions with; or None
    :param episodes: at most, in all
    :param n_tickets: K, fixed noises that are tried
    :param n_candidates: M of the best of M
    :param kappa: the critic's score is mean - kappa * std over the ensemble
    :param seed: of noises and episodes
    :param progress_bar: show progress bars
    :raises ValueError: if the env steers another flow or reports no success, the demos do not fit, or the episodes are too few
    """
    steering = find_steering(env)
    if steering.action_space.flow_hash != flow.fingerprint():
        raise ValueError(
            f"The env steers the flow {steering.action_space.flow_hash}, but flow is {flow.fingerprint()}: expected the same"
        )
    if isinstance(demos, (str, Path)):
        demos = load_demos(demos)
    if demos is not None:  # looked at last, but a file that does not fit should not cost the episodes before
        check_demos_fit(flow, demos)
        if len(demos.episodes) < 2:
            raise ValueError(f"{demos.path} holds one episode, expected at least 2 to compare with each other")
    n_base, n_control, rounds = _split(episodes, n_tickets)
    ledger = _Ledger(env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env]))
    if critic is None and flow.critic is not None and flow.critic.updates:
        critic = flow.critic
    best_of = None if critic is None else BestOfM(ledger, critic, n_candidates, kappa)
    tests_seed, passes = TEST_SEED + seed, []

    def test(name: str, player: Player, noise_seed: int | None = None) -> EvalResult:
        how: dict[str, Any] = dict(name=name, seed=tests_seed, noise_seed=noise_seed, progress_bar=progress_bar)
        result = evaluate(player, ledger, n_control, **how)
        passes.append(ledger.outcomes)
        return result

    rollouts = collect_rollouts(flow, ledger, n_base, seed=tests_seed, progress_bar=progress_bar)
    if rollouts.result is None:
        raise ValueError("The env's info holds no 'success_at_end' at the end of an episode: steerability is about success")
    passes.append(ledger.outcomes)
    zero = test("zero", "zero")
    search = find_ticket(ledger, rounds=rounds, include_zero=False, seed=seed, progress_bar=progress_bar)
    ticket = test("ticket", search.w)
    if best_of is None:
        other = test("prior again", "prior", noise_seed=seed)
    else:
        other = test(f"best_of_{n_candidates}", best_of)
    auc_first, auc_episode = (None, None) if critic is None else _critic_auc(critic, rollouts, kappa)
    return SteerabilityReport(
        base=replace(rollouts.result, name="prior"),
        zero=zero,
        ticket=ticket,
        best_of=None if best_of is None else other,
        search=search,
        search_episodes=rounds[0][1],
        spread=_action_spread(steering, rollouts, demos, seed),
        auc_first_chunk=auc_first,
        auc_episode=auc_episode,
        tries=_paired(passes, n_control),
        rollouts=rollouts,
        env_steps=ledger.env_steps,
    )


def rank_auc(score: np.ndarray, success: np.ndarray) -> float | None:
    """
    Area under the ROC curve: the probability that a success has a higher score than a failure; a tie counts half.

    :param score: (n,)
    :param success: (n,)
    :return: None if all are successes or all are failures
    """
    n_success = int(success.sum())
    n_failures = len(success) - n_success
    if not n_success or not n_failures:
        return None
    ranks = pd.Series(score).rank().to_numpy()[success.astype(bool)].sum()
    return float((ranks - n_success * (n_success + 1) / 2) / (n_success * n_failures))


class _Ledger(VecEnvWrapper):
    """
    Counts every env step that anything takes, and keeps the outcomes of the episodes since the last reset, by env and in
    order: the same seed starts the same episodes, so outcomes of two players can be compared start by start.

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
def _critic_auc(critic: EnsembleChunkCritic, rollouts: Rollouts, kappa: float) -> tuple[float | None, float | None]:
    device = next(critic.parameters()).device
    score = critic.get_ucb_q(rollouts.cond.to(device), rollouts.chunk.to(device), kappa).cpu().numpy()
    first = np.flatnonzero(np.diff(rollouts.episode, prepend=-1))
    mean = np.bincount(rollouts.episode, weights=score) / np.bincount(rollouts.episode)
    return rank_auc(score[first], rollouts.success_at_end), rank_auc(mean, rollouts.success_at_end)


@th.no_grad()
def _action_spread(
    steering: Steering,
    rollouts: Rollouts,
    demos: Demos | None,
    seed: int,
    n_states: int = 128,
    n_noises: int = 32,
    n_similar: int = 8,
) -> ActionSpread:
    flow, generator = steering.flow, th.Generator().manual_seed(seed)
    states = rollouts.cond[th.randperm(len(rollouts), generator=generator)[:n_states]].to(flow.device)
    w = steering.choices(len(states), n_noises, generator=generator)
    chunks = flow.executed(flow.decode(states, w.to(flow.device), steering.num_steps)).cpu()
    noise = chunks.var(dim=1).mean(dim=0).sqrt().numpy()
    if demos is None:
        return ActionSpread(noise, rollouts.chunk.std(dim=0, unbiased=False).numpy(), "base episodes", None)
    encoded = encode_demos(flow, demos).episodes
    of_demos = [chunks_from_now(episode, demos.control_mode, flow.act_horizon) for episode in demos.episodes]
    # One state an episode: its neighbours in time are no other choice that a demonstrator made.
    nearest = [th.cdist(states.cpu(), th.from_numpy(episode.obs[:-1])).min(dim=1) for episode in encoded]
    order = np.stack([found.values.numpy() for found in nearest]).argsort(axis=0)[:n_similar, :, None, None]
    candidates = np.stack([chunk[found.indices.numpy()] for chunk, found in zip(of_demos, nearest, strict=True)])
    similar = np.take_along_axis(candidates, order, axis=0)  # (8, S, H, A)
    return ActionSpread(
        noise,
        np.concatenate(of_demos).std(axis=0),
        "demos",
        np.sqrt(similar.var(axis=0, ddof=1).mean(axis=0)),
    )
