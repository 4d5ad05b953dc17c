"""What steerability found, as text, JSON and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dsrl.evaluation.chunk_reach import ChunkReach
from sb3_dsrl.evaluation.figure import draw
from sb3_dsrl.evaluation.results import EvalResult, results_table
from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.evaluation.tickets import Ticket


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
        The starts are the same as far as :func:`~sb3_dsrl.evaluation.play.play` says.
    :param rollouts: the base episodes, which stage 1 can learn from
    :param env_steps: env steps that the simulator executed for all of this
    :param act_horizon: H, env steps of each chunk that were executed
    :param demo_chunks: what the noise can reach of the demos' chunks; None without demos, or if chunks cannot be inverted
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
    act_horizon: int
    demo_chunks: ChunkReach | None = None

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
        """
        Standard deviation that the success of the search's noises would have by luck, if all were equally good. All played the
        same starts: what a start does to all of them alike is no luck of one (residuals of noise and start).
        """
        outcomes = self.search.first_round
        n_noises, n_starts = outcomes.shape
        of_noises, of_starts = outcomes.mean(axis=1, keepdims=True), outcomes.mean(axis=0, keepdims=True)
        residuals = outcomes - of_noises - of_starts + outcomes.mean()
        return float(np.sqrt((residuals**2).sum() / ((n_noises - 1) * (n_starts - 1)) / n_starts))

    @property
    def ticket_std(self) -> float:
        """Standard deviation of the success of fixed noises beyond luck, on the starts of the search, which are few."""
        return float(np.sqrt(max(0.0, self.search.tried.var(ddof=1) - self.luck_std**2)))

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
            f"Golden tickets: {len(tried)} noises with the same {self.search_episodes} starts reached {tried.min():.2f} to "
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
            *([] if self.demo_chunks is None else [str(self.demo_chunks)]),
            "Critic: no trained critic for this act_horizon."
            if self.best_of is None
            else "Critic: all base episodes ended alike, so its scores could not be judged."
            if self.auc_first_chunk is None
            else f"Critic: AUC of its score of the first chunk against success {self.auc_first_chunk:.2f}, of the mean score "
            f"of the episode {self.auc_episode:.2f} (0.5 is chance)."
            + (" What it chooses is worse than chance." if self.best_of.ci_high < self.base.success_at_end else ""),
            f"Reach: {self.reach:.2f} of {len(self.tries)} starts were solved by one of {self.tries.shape[1]} noises, "
            f"{self.tries[:, 0].mean():.2f} by the flow's first.",
            f"Potential: {self.potential:+.2f} (shown {self.shown_gain:.2f}, reachable {self.reachable_gain:.2f}). "
            f"Env steps used: {self.env_steps:,}, {self.act_horizon} of each chunk.",
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
            demo_chunks=None if self.demo_chunks is None else asdict(self.demo_chunks),
            critic=None if self.best_of is None else dict(auc_first_chunk=self.auc_first_chunk, auc_episode=self.auc_episode),
            env_steps=self.env_steps,
            act_horizon=self.act_horizon,
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
