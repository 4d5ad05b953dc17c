"""The figure of a steerability report."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sb3_dsrl.evaluation.results import EvalResult


class Report(Protocol):
    """What the figure shows of a :class:`~sb3_dsrl.SteerabilityReport`."""

    ticket: EvalResult
    search: Any
    search_episodes: int
    spread: Any
    auc_first_chunk: float | None
    tries: np.ndarray

    @property
    def rows(self) -> list[EvalResult]: ...
    @property
    def reach(self) -> float: ...
    @property
    def luck_std(self) -> float: ...
    @property
    def potential(self) -> float: ...
    @property
    def verdict(self) -> str: ...


def draw(report: Report, path: str | Path) -> None:
    """
    :param report: what to draw
    :param path: the picture to write
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    stds = [("over noise", report.spread.noise), (f"of all {report.spread.source}", report.spread.overall)]
    if report.spread.similar is not None:
        stds.append(("of demos at similar states", report.spread.similar))
    # without pyplot: no window, no global state
    figure = Figure(figsize=(4 * len(stds) if len(stds) > 2 else 10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    success, tickets = upper.subplots(1, 2)

    rows = report.rows
    at_end = np.array([row.success_at_end for row in rows])
    errors = np.abs(at_end - [[row.ci_low for row in rows], [row.ci_high for row in rows]])
    success.bar(range(len(rows)), at_end, yerr=errors, capsize=4, color=["0.6", *["C0"] * (len(rows) - 1)])
    success.scatter(range(len(rows)), [row.success_once for row in rows], marker="_", s=300, color="C1", label="once")
    success.axhline(report.reach, color="C2", linestyle="--", label=f"reach: one of {report.tries.shape[1]} noises")
    success.set(xticks=range(len(rows)), xticklabels=[row.name for row in rows], ylim=(0, 1.02), ylabel="success at the end")
    success.set_title("flow and controls, 95% interval")
    success.legend(loc="best", fontsize="small")

    tried = report.search.tried
    mean = tried.mean()
    tickets.bar(range(1, len(tried) + 1), tried, color="C0")
    tickets.axhspan(
        mean - 2 * report.luck_std, mean + 2 * report.luck_std, color="0.5", alpha=0.25, label="mean, ±2 std of luck"
    )
    tickets.axhline(mean, color="0.4")
    tickets.axhline(report.ticket.success_at_end, color="C3", linestyle="--", label="the best on fresh episodes")
    tickets.set(xlabel="fixed noises, best first", ylim=(0, 1.02))
    tickets.set_title(f"golden tickets, {report.search_episodes} episodes each")
    tickets.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tickets.legend(loc="best", fontsize="small")

    axes = lower.subplots(1, len(stds), squeeze=False)[0]
    highest = max(float(std.max()) for _, std in stds)
    for axis, (name, std) in zip(axes, stds, strict=True):
        image = axis.imshow(std.T, vmin=0, vmax=highest, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set(title=f"action std {name}\nmean {std.mean():.3f}", xlabel="chunk step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_ylabel("action dimension")
    lower.colorbar(image, ax=list(axes))

    auc = "" if report.auc_first_chunk is None else f"; AUC of the critic {report.auc_first_chunk:.2f}"
    verdict = "\n".join(textwrap.wrap(report.verdict, 100))
    figure.suptitle(
        f"{verdict}\npotential {report.potential:+.2f}, spread ratio {report.spread.ratio:.2f}{auc}", fontsize="medium"
    )
    figure.savefig(path, dpi=110)
