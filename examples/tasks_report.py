"""The tables and the figure of all tasks, from the reports of run_recipe.py or meta_world.py.

    python examples/tasks_report.py

Reads the kept reports, brings the CSV up to date, which has a row for each evaluation, draws a figure of it, and puts the
tables into the README and the documentation. Rows of the CSV that no report has stay as they are.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pandas as pd
import tyro
from scipy.stats import trim_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sb3_dsrl.cli.common import cli
from sb3_dsrl.evaluation.results import wilson_interval

#: Columns of the table: name of the row in a report, and what the table calls it.
COLUMNS = {
    "prior": "w ~ N(0, I)",
    "zero": "w = 0",
    "ticket": "best fixed w",
    "narrow": "narrowed prior",
    "stage1": "stage 1",
    "stage2": "**stage 2**",
    "stage2_stochastic": "stage 2, sampled",
}


#: What needs no training: one of these is the bar for a steered policy.
CONTROLS = {name: COLUMNS[name] for name in ("zero", "ticket", "narrow")}

#: What tells evaluations apart.
KEYS = ["method", "env_id", "seed", "deterministic"]

#: Stands for what was not measured.
NONE = "not run"

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"

#: Where reports are kept; those of ``make demo`` have 200 episodes.
REPORTS = (RESULTS / "quickstart", RESULTS / "recipes", RESULTS / "metaworld")


@dataclass
class Args:
    """One table from the reports of run_recipe.py or meta_world.py."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = REPORTS
    """Folders of the reports."""
    output: Path = RESULTS / "tasks.csv"
    """The CSV, whose other rows are kept; the figure lies beside it."""


def is_sampled(name: str) -> bool:
    """
    :param name: of a row in a report
    :return: whether its noises were drawn, so that it is not a policy's mean or one noise
    """
    return name in ("prior", "narrow") or name.endswith("_stochastic")


def rows(folders: Iterable[Path] = REPORTS) -> pd.DataFrame:
    """
    :param folders: of the reports
    :return: every evaluation, in the columns of compare/results.csv, its interval, and whether the policy that comes out is
        played so
    """
    found: list[dict[str, Any]] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            name = row["name"].removesuffix("_stochastic")
            sampled = is_sampled(row["name"])
            spent = {"stage1": report["stage1_env_steps"], "stage2": report["env_steps"]}
            found.append(
                {
                    "method": name,
                    "env_id": report["env_id"],
                    "seed": report["seed"],
                    "env_steps": spent.get(name, 0),
                    "episodes": row["episodes"],
                    "success_once": row["success_once"],
                    "success_at_end": row["success_at_end"],
                    "deterministic": not sampled,
                    "wall_seconds": report["wall_seconds"],
                    "ci_low": row["ci_low"],
                    "ci_high": row["ci_high"],
                    "deployed": name == "stage2" and sampled != report.get("deterministic", True),
                }
            )
    if not found:
        raise ValueError(f"{' and '.join(map(str, folders))} hold no report.json of run_recipe.py or meta_world.py")
    return pd.DataFrame(found)


def evaluations(folders: Iterable[Path] = REPORTS, csv: Path = RESULTS / "tasks.csv") -> pd.DataFrame:
    """
    :param folders: of the reports
    :param csv: kept rows; those that a report has, too, are replaced
    :return: :func:`rows`, and the kept ones that no report has
    """
    found = rows(folders)
    if not csv.is_file():
        return found
    kept = pd.read_csv(csv, float_precision="round_trip")
    others = kept[~pd.MultiIndex.from_frame(kept[KEYS]).isin(pd.MultiIndex.from_frame(found[KEYS]))]
    return pd.concat([found, others], ignore_index=True) if len(others) else found


def select(task: pd.DataFrame, name: str) -> pd.DataFrame:
    """
    :param task: rows of one task
    :param name: of a row in a report, such as ``stage2_stochastic``
    :return: the row of each seed
    """
    return task[(task.method == name.removesuffix("_stochastic")) & (task.deterministic != is_sampled(name))]


def pooled(of: pd.DataFrame) -> tuple[float, float, float]:
    """
    :param of: the row of each seed
    :return: success at the end of all their episodes together, and its 95% Wilson interval
    """
    episodes = int(of.episodes.sum())
    successes = round((of.success_at_end * of.episodes).sum())
    return successes / episodes, *wilson_interval(successes, episodes)


def success(of: pd.DataFrame) -> str:
    """
    :param of: the row of each seed
    :return: :func:`pooled`, as a cell
    """
    if not len(of):
        return NONE
    mean, low, high = pooled(of)
    return f"{mean:.2f} ({low:.2f}–{high:.2f})"


def spread(of: pd.DataFrame) -> str:
    """
    :param of: the row of each seed
    :return: their mean and range, as a cell
    """
    if not len(of):
        return NONE
    mean, end = f"{pooled(of)[0]:.2f}", of.success_at_end
    return mean if len(of) == 1 else f"{mean} ({end.min():.2f}–{end.max():.2f})"


def best_control(task: pd.DataFrame) -> str | None:
    """
    :param task: rows of one task
    :return: the control with the highest success over all seeds; of equal ones the first; None if none was run
    """
    run = [name for name in CONTROLS if len(select(task, name))]
    return max(run, key=lambda name: pooled(select(task, name))[0], default=None)


def by_seeds(table: pd.DataFrame) -> str:
    """
    :param table: :func:`evaluations`
    :return: success at the end of every row of the reports, a line for each task: mean of the seeds and their range
    """
    lines = [f"| task | seeds | {' | '.join(COLUMNS.values())} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for env_id, task in table.groupby("env_id", sort=False):
        cells = [str(env_id), str(task.seed.nunique()), *(spread(select(task, name)) for name in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def headline(table: pd.DataFrame) -> str:
    """
    :param table: :func:`evaluations`
    :return: base, best control and steered policy, a line for each task: all seeds together, with Wilson intervals
    """
    lines = ["| task | base | best free control | **steered** | env steps | seeds |", "|---|---|---|---|---|---|"]
    for env_id, task in table.groupby("env_id", sort=False):
        control, steered = best_control(task), task[task.deployed]
        best = NONE if control is None else f"{CONTROLS[control]}: {success(select(task, control))}"
        steps = f"{steered.env_steps.max():,}" if len(steered) else NONE
        result = f"**{success(steered)}**" + ("" if steered.deterministic.all() else ", sampled")
        cells = [str(env_id), success(select(task, "prior")), best, result, steps, str(task.seed.nunique())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def demo(table: pd.DataFrame, env_id: str = "PushCube-v1") -> str:
    """
    :param table: :func:`evaluations`
    :param env_id: task, that of ``make demo``
    :return: a line for each seed: success at the end of base and steered policy with intervals, once / at the end of the rest
    """
    heads = list(COLUMNS.values())
    lines = [f"| seed | {' | '.join(heads)} | env steps |", f"|---|{'---|' * len(heads)}---|"]
    for seed, run in table[table.env_id == env_id].groupby("seed"):
        cells = [str(seed)]
        for name in COLUMNS:
            row = select(run, name)
            once, end = row.success_once.item(), row.success_at_end.item()
            cells.append(success(row) if name in ("prior", "stage2") else f"{once:.2f} / {end:.2f}")
        lines.append(f"| {' | '.join(cells)} | {run.env_steps.max():,} |")
    return "\n".join(lines)


def reading(table: pd.DataFrame) -> str:
    """
    :param table: :func:`evaluations`
    :return: in words, where the steered policy ends above the best control with its seed's own flow
    """
    found: dict[str, list[str]] = {"every seed": [], "some seeds": [], "no seed": []}
    for env_id, task in table.groupby("env_id", sort=False):
        control = best_control(task)
        if control is None:
            continue
        steered, best = (of.set_index("seed").success_at_end for of in (task[task.deployed], select(task, control)))
        better = (steered - best).dropna() > 0
        if len(better):
            found["every seed" if better.all() else "some seeds" if better.any() else "no seed"].append(str(env_id))
    return "\n".join(f"- with {seeds}: {', '.join(tasks) or 'none'}" for seeds, tasks in found.items())


#: The pages that show tables between ``<!-- name -->`` and ``<!-- /name -->``
PAGES: dict[Path, dict[str, Callable[[pd.DataFrame], str]]] = {
    ROOT / "README.md": {"tasks": headline},
    ROOT / "docs" / "results.md": {"tasks": headline, "reading": reading, "seeds": by_seeds, "results": demo},
}


def fill(text: str, name: str, table: str) -> str:
    """
    :param text: of a page
    :param name: of a marked place in it
    :param table: what belongs there
    :return: the text with the table
    :raises ValueError: if the page has no such place
    """
    place = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"There is no <!-- {name} --> ... <!-- /{name} --> to fill")
    return place.sub(lambda found: found.group(1) + table + "\n" + found.group(2).strip(), text)


def of_kind(task: pd.DataFrame, kind: str) -> pd.DataFrame:
    """
    :param task: rows of one task
    :param kind: ``control``, the best one of the task, ``steered``, or the name of a row in a report
    :return: the row of each seed
    """
    if kind == "steered":
        return task[task.deployed]
    name = best_control(task) if kind == "control" else kind
    return task[:0] if name is None else select(task, name)


def aggregate(table: pd.DataFrame, kind: str, n_samples: int = 10_000) -> tuple[float, float, float]:
    """
    Interquartile mean over all tasks and seeds, as rliable has it (https://arxiv.org/abs/2108.13264).

    :param table: :func:`evaluations`
    :param kind: of :func:`of_kind`
    :param n_samples: bootstrap samples, stratified by task
    :return: the mean, and its 95% percentile interval
    """
    tasks = [of_kind(task, kind).success_at_end.to_numpy() for _, task in table.groupby("env_id", sort=False)]
    values = [task for task in tasks if len(task)]
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.choice(x, (n_samples, len(x))) for x in values], axis=1)
    low, high = np.quantile(trim_mean(samples, 0.25, axis=1), (0.025, 0.975))
    return float(trim_mean(np.concatenate(values), 0.25)), float(low), float(high)


def plot(path: Path, table: pd.DataFrame) -> None:
    """
    :param path: of the picture: each task with its seeds, and the aggregate over tasks
    :param table: :func:`evaluations`
    """
    tasks = [(str(env_id), task) for env_id, task in table.groupby("env_id", sort=False)]
    kinds = {"prior": ("frozen flow, random noise", "0.55"), "control": ("best free control", "tab:orange")}
    kinds["steered"] = ("steered (stages 1 and 2)", "tab:blue")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.62 * len(tasks) + 1.5), width_ratios=(3, 1.2), constrained_layout=True
    )
    for i, (kind, (label, colour)) in enumerate(kinds.items()):
        offset = 0.24 * (i - 1)
        for j, (_, task) in enumerate(tasks):
            found = of_kind(task, kind)
            if not len(found):
                continue
            mean, low, high = pooled(found)
            left.barh(j + offset, mean, 0.22, color=colour, alpha=0.85)
            left.plot([low, high], [j + offset] * 2, color="k", lw=1)
            left.plot(found.success_at_end, [j + offset] * len(found), "k.", ms=4)
        left.barh(0, 0, color=colour, alpha=0.85, label=label)
        mean, low, high = aggregate(table, kind)
        right.barh(i, mean, 0.6, color=colour, alpha=0.85)
        right.plot([low, high], [i, i], color="k", lw=1)
    left.set_yticks(range(len(tasks)), [env_id for env_id, _ in tasks])
    right.set_yticks([])
    right.set_xticks([0.25, 0.5, 0.75])
    for axis, title in ((left, "each task (dots: seeds; line: 95%)"), (right, "all tasks: IQM, 95%")):
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_xlabel("success at the end of the episode")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> None:
    """Writes CSV and figure, fills the pages and prints the table."""
    table = evaluations(args.folders, args.output)
    table.to_csv(args.output, index=False)
    plot(args.output.with_suffix(".png"), table)
    for path, places in PAGES.items():
        text = path.read_text()
        for name, make in places.items():
            text = fill(text, name, make(table))
        path.write_text(text)
    print(headline(table))


if __name__ == "__main__":
    cli(main, Args)
