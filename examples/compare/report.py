"""The report of the comparison: results.csv, report.md and plots, from the files of its runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from compare.methods import ALL, METHODS, RECIPES, Method
from compare.trial import TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from sb3_dsrl.evaluation.results import wilson_interval

INTRODUCTION = """# Comparison

One frozen flow a task, all methods on it. No method may spend more env steps than the task's budget, which count everything
that it ran in the simulator: golden tickets, rollouts of stage 1, warm-up; demos are besides. Final policies (not the best of
many evaluations), the same evaluation episodes for all, judged at the time limit without termination. Wall time of one core,
evaluations not counted, on a machine that other jobs shared. Every run is in [results.csv](results.csv).

How far to trust it: success is the mean over seeds with 95% bootstrap interval or, of one run, its 95% Wilson interval. A
bootstrap of few seeds is too narrow (of 3 normal values it covers the mean in 75%, of 5 in 84%), it tells nothing of other
evaluation episodes (with 100 a success of 0.9 is known to about 0.06) nor of other flows, and the seeds share most of the
starts that they learn from (SB3 gives env i the seed + i). Std, shared noise and bounds of the methods on noise, flows and
budgets were chosen on these tasks, by seed 0 and the same evaluation episodes. The baselines from scratch have nearly SB3's
settings and ManiSkill's discount of 0.8 for dense rewards, and are shown with both: dense rewards, which go on after success,
and sparse ones, which end there.

"""
RECIPES_OF_STAGE_1 = """
Recipes of stage 1, without ticket and stage 2 ("stage 1" is the default):

{table}
"""
STARTED = ("ticket_stage2", "stage1_stage2", "full", "shared_stage2", "shared_full")  # stage 2 has something to lose
DIP_EVALUATIONS = 5
DIP = """
Offline to online: deterministic success at end when stage 2 begins, and the mean of its first {n} evaluations (of about 8).

{table}
"""
COMMANDS = """
Made by

```bash
{commands}
```
"""
STAGE_0 = "Stage 0: {demos} demos ({demo_steps:,} env steps, besides), {wall_seconds:.0f} s."

TO_TARGET = """
Env steps after which an evaluation of deterministic play first found {target}, each seed. One evaluation has 32 episodes, so
that 0.8 may be 0.66 to 0.94; a curve begins where ticket and stage 1 end.

{table}
"""
TARGET = 0.8

COLUMNS = (
    *("method", "env_id", "seed", "env_steps", "episodes"),
    *("success_once", "success_at_end", "deterministic", "wall_seconds"),
)


def bootstrap_interval(values: np.ndarray, n: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over seeds."""
    samples = np.random.default_rng(0).choice(values, size=(n, len(values))).mean(axis=1)
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)


def write_report(output: Path) -> str:
    """
    :param output: folder of the runs
    :return: the report; it is in ``report.md``, too
    """
    paths = [path for path in sorted(output.glob("*/*/*.json")) if path.parent.name in ALL]
    runs = [json.loads(path.read_text()) for path in paths]
    if not runs:
        return f"{output} holds no finished run"
    settings = json.loads((output / "settings.json").read_text())
    frame = pd.DataFrame([row for run in runs for row in run["rows"]])[list(COLUMNS)]
    frame.to_csv(output / "results.csv", index=False)
    keys = ("env_id", "method", "seed")
    curves = pd.DataFrame([point | {key: run["rows"][0][key] for key in keys} for run in runs for point in run["curve"]])
    text = INTRODUCTION + summary(frame) + "\n"
    for env_id in [env_id for env_id in TASKS if env_id in set(frame.env_id)]:
        rows = frame[frame.env_id == env_id]
        stage0 = json.loads((output / env_id / "stage0.json").read_text())
        points = curves[curves.env_id == env_id] if len(curves) else curves
        text += f"\n## {env_id}\n\n{STAGE_0.format(**stage0)}\n\n{_table(rows, METHODS)}\n"
        if set(rows.method) & set(RECIPES):
            references = {name: METHODS[name] for name in ("prior", "zero", "stage1")}
            text += RECIPES_OF_STAGE_1.format(table=_table(rows, references | RECIPES))
        bars(output / f"{env_id}_final.png", rows)
        text += f"\n![final success]({env_id}_final.png)\n"
        if len(points):
            plot_curves(output / f"{env_id}_curves.png", points, rows)
            text += f"\n![success against env steps]({env_id}_curves.png)\n"
            text += _to_target(points) + _dip(points)
        text += COMMANDS.format(commands=_commands(rows, settings))
    (output / "report.md").write_text(text)
    return text


def summary(rows: pd.DataFrame) -> str:
    """
    :param rows: of ``results.csv``
    :return: Markdown table of all tasks: success at the end by deterministic play, or sampled where a method only samples
    """
    lines = []
    env_ids = [env_id for env_id in TASKS if env_id in set(rows.env_id)]
    for method in _found(METHODS, rows):
        line = {"success at the end (95% interval; seeds)": METHODS[method][0]}
        for env_id in env_ids:
            found = _played(rows[rows.env_id == env_id], method)
            line[env_id] = f"{_success(found)}; {len(found)}" if len(found) else "not run"
        lines.append(line)
    return _markdown(lines)


def _found(methods: Iterable[str], rows: pd.DataFrame) -> list[str]:
    """The methods that have rows, in the given order."""
    return [method for method in methods if method in set(rows.method)]


def _table(rows: pd.DataFrame, methods: dict[str, tuple[str, Method]]) -> str:
    lines = []
    for method in _found(methods, rows):
        found = rows[rows.method == method]
        line = {"method": methods[method][0], "seeds": found.seed.nunique(), "env steps": f"{found.env_steps.mean():,.0f}"}
        for deterministic, suffix in ((True, ""), (False, ", sampled")):
            mode = found[found.deterministic == deterministic]
            line[f"success at end{suffix}"] = _success(mode)
            line[f"once{suffix}"] = f"{mode.success_once.mean():.2f}" if len(mode) else ""
        lines.append(line | {"wall s": f"{found.wall_seconds.mean():,.0f}"})
    return _markdown(lines)


def _markdown(lines: list[dict[str, Any]]) -> str:
    return str(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True))


def _seeds(curves: pd.DataFrame, method: str) -> list[pd.DataFrame]:
    """The curve of each seed of a method."""
    return [one.sort_values("env_steps") for _, one in curves[curves.method == method].groupby("seed")]


def _to_target(curves: pd.DataFrame) -> str:
    """The env steps after which each seed's curve is first at the target, by both kinds of success."""
    lines = []
    for method in _found(METHODS, curves):
        line = {"method": METHODS[method][0]}
        for key in ("success_at_end", "success_once"):
            reached = [seed.env_steps[seed[key] >= TARGET] for seed in _seeds(curves, method)]
            steps = [f"{found.iloc[0]:,}" if len(found) else "never" for found in reached]
            line[f"{TARGET} {key.replace('_', ' ')}"] = "; ".join(steps)
        lines.append(line)
    return TO_TARGET.format(target=TARGET, table=_markdown(lines))


def _dip(curves: pd.DataFrame) -> str:
    lines = []
    for method in _found(STARTED, curves):
        seeds = [seed.success_at_end for seed in _seeds(curves, method)]
        start = np.array([seed.iloc[0] for seed in seeds])
        then = np.array([seed.iloc[1 : 1 + DIP_EVALUATIONS].mean() for seed in seeds])
        line = {"method": METHODS[method][0], "start": f"{start.mean():.2f}", "first evaluations": f"{then.mean():.2f}"}
        lines.append(line | {"difference": _mean_and_interval(then - start)})
    return DIP.format(n=DIP_EVALUATIONS, table=_markdown(lines)) if lines else ""


def _commands(rows: pd.DataFrame, settings: dict[str, Any]) -> str:
    methods: dict[tuple[int, ...], list[str]] = {}
    for method in _found(ALL, rows):
        seeds = tuple(sorted(int(seed) for seed in set(rows[rows.method == method].seed)))
        methods.setdefault(seeds, []).append(method)
    command = f"python examples/compare/run.py --env_ids {rows.env_id.iloc[0]}"
    flags = "".join(f" --{name} {value}" for name, value in settings.items() if value is not None)
    return "\n".join(
        f"{command} --methods {' '.join(names)} --seeds {' '.join(map(str, seeds))}{flags}" for seeds, names in methods.items()
    )


def _success(runs: pd.DataFrame) -> str:
    """Mean success at the end of the seeds of a method, with its interval."""
    if not len(runs):
        return ""
    if len(runs) > 1:
        return _mean_and_interval(runs.success_at_end.to_numpy())
    run = runs.iloc[0]
    low, high = wilson_interval(round(run.success_at_end * run.episodes), run.episodes)
    return f"{run.success_at_end:.2f} ({low:.2f} to {high:.2f})"


def _mean_and_interval(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values.mean():.2f}"
    low, high = bootstrap_interval(values)
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def _played(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """The rows of a method's deterministic play, or of sampled play where that is all there is."""
    found = rows[rows.method == method]
    return found[found.deterministic == found.deterministic.max()]


def best_of_variants(rows: pd.DataFrame) -> list[str]:
    """Of each baseline from scratch the better of dense and sparse reward; everything else as it is."""
    final = {method: _played(rows, method).success_at_end.mean() for method in _found(METHODS, rows)}
    best: dict[str, str] = {}
    for method in final:
        family = method.removesuffix("_dense").removesuffix("_sparse")
        if family not in best or final[method] > final[best[family]]:
            best[family] = method
    return list(best.values())


def bars(path: Path, rows: pd.DataFrame) -> None:
    """Final success of every method, deterministic and sampled play below each other."""
    methods = _found(METHODS, rows)
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(methods) + 1.2), constrained_layout=True)
    for offset, deterministic, colour in ((-0.2, True, "tab:blue"), (0.2, False, "tab:orange")):
        for i, method in enumerate(methods):
            values = rows[(rows.method == method) & (rows.deterministic == deterministic)].success_at_end
            if len(values):
                axis.barh(i + offset, values.mean(), 0.38, color=colour)
                axis.plot(values, np.full(len(values), i + offset), "k.", markersize=3)
    axis.set_yticks(range(len(methods)), [METHODS[method][0] for method in methods])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="success at end (dots: seeds)", title=rows.env_id.iloc[0])
    colours = [Patch(color="tab:blue"), Patch(color="tab:orange")]
    figure.legend(colours, ["deterministic", "sampled"], loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(path: Path, curves: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Success against env steps, mean and 95% bootstrap interval over seeds, deterministic play."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, constrained_layout=True)
    prior = rows[rows.method == "prior"]
    for axis, key in zip(axes, ("success_at_end", "success_once"), strict=True):
        learning = _found(best_of_variants(rows), curves)
        for colour, method in zip(plt.get_cmap("tab20")(range(20)), learning, strict=False):
            seeds = _seeds(curves, method)
            # a method's curve starts where its ticket and its stage 1 end
            grid = np.linspace(max(s.env_steps.min() for s in seeds), min(s.env_steps.max() for s in seeds), 50)
            values = np.stack([np.interp(grid, s.env_steps, s[key]) for s in seeds])
            intervals = np.array([bootstrap_interval(column, 1_000) for column in values.T])
            style = "--" if "scratch" in METHODS[method][0] else "-"
            axis.plot(grid / 1_000, values.mean(axis=0), style, color=colour, label=METHODS[method][0])
            axis.fill_between(grid / 1_000, intervals[:, 0], intervals[:, 1], color=colour, alpha=0.2)
        if len(prior):
            axis.axhline(prior[key].mean(), color="grey", linestyle=":", label=METHODS["prior"][0])
        axis.set(xlabel="thousand env steps", title=key.replace("_", " "), ylim=(0, 1))
    axes[0].set_ylabel(str(rows.env_id.iloc[0]))
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)
