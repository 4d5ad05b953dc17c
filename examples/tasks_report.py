"""One table from the reports of run_recipe.py or meta_world.py.

    python examples/tasks_report.py
    python examples/tasks_report.py examples/results/metaworld --output examples/results/metaworld.csv

Reads the kept reports, writes a CSV with a row for each evaluation, and prints the table of the README.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from sb3_dsrl.cli.common import cli

#: Columns of the table: name of the row in a report, and what the table calls it.
COLUMNS = {
    "prior": "w ~ N(0, I)",
    "zero": "w = 0",
    "ticket": "best fixed w",
    "stage1": "stage 1",
    "stage2": "**stage 2**",
    "stage2_stochastic": "stage 2, sampled",
}


RESULTS = Path(__file__).parent / "results"

#: Where reports are kept; those of ``make demo`` have 200 episodes.
REPORTS = (RESULTS / "quickstart", RESULTS / "recipes")


@dataclass
class Args:
    """One table from the reports of run_recipe.py or meta_world.py."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = REPORTS
    """Folders of the reports."""
    output: Path = RESULTS / "tasks.csv"
    """The CSV."""


def rows(folders: Iterable[Path] = REPORTS) -> pd.DataFrame:
    """
    :param folders: of the reports
    :return: every evaluation, in the columns of compare/results.csv, and its interval
    """
    found: list[dict[str, Any]] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            name = row["name"].removesuffix("_stochastic")
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
                    "deterministic": row["name"] not in ("prior", "narrow") and not row["name"].endswith("_stochastic"),
                    "wall_seconds": report["wall_seconds"],
                    "ci_low": row["ci_low"],
                    "ci_high": row["ci_high"],
                }
            )
    if not found:
        raise ValueError(f"{' and '.join(map(str, folders))} hold no report.json of run_recipe.py or meta_world.py")
    return pd.DataFrame(found)


def markdown(table: pd.DataFrame) -> str:
    """
    :param table: :func:`rows`
    :return: success at the end, a line for each task: mean of the seeds and their range, or of one seed its interval
    """
    lines = [f"| task | seeds | {' | '.join(COLUMNS.values())} | env steps |", f"|---|---|{'---|' * (len(COLUMNS) + 1)}"]
    for env_id, task in table.groupby("env_id", sort=False):
        cells = [str(env_id), str(task.seed.nunique())]
        for name in COLUMNS:
            sampled = name == "prior" or name.endswith("_stochastic")
            of = task[(task.method == name.removesuffix("_stochastic")) & (task.deterministic != sampled)]
            low, high = (of.ci_low, of.ci_high) if len(of) == 1 else (of.success_at_end, of.success_at_end)
            cells.append(f"{of.success_at_end.mean():.2f} ({low.min():.2f} to {high.max():.2f})")
        lines.append(f"| {' | '.join(cells)} | {task.env_steps.max():,} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Writes the CSV and prints the table."""
    table = rows(args.folders)
    table.to_csv(args.output, index=False)
    print(markdown(table))


if __name__ == "__main__":
    cli(main, Args)
