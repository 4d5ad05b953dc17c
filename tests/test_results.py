"""The figures of the README are those of the results that are kept beside it."""

import importlib
import json
import re

import pandas as pd
import pytest
from scipy.stats import spearmanr

from tests.scripts import EXAMPLES

README = (EXAMPLES.parent / "README.md").read_text()
RESULTS = EXAMPLES / "results"


def block(name: str) -> str:
    """What stands in the README between <!-- name --> and <!-- /name -->."""
    found = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    report = importlib.import_module("compare.report")
    rows = pd.read_csv(RESULTS / "compare" / "results.csv")
    assert not rows.duplicated(["method", "env_id", "seed", "deterministic"]).any()
    assert block("compare") == report.summary(rows)
    assert report.summary(rows) in (RESULTS / "compare" / "report.md").read_text()
    for env_id in rows.env_id.unique():
        assert rows[rows.env_id == env_id].env_steps.max() <= report.TASKS[env_id].budget
    linked = re.findall(r"\]\((.+?\.(?:png|csv))\)", (RESULTS / "compare" / "report.md").read_text())
    assert len(linked) > 2 and all((RESULTS / "compare" / name).is_file() for name in linked)


def test_steerability_ranks_flows() -> None:
    rows = pd.read_csv(RESULTS / "steerability.csv")
    assert len(rows) >= 6
    assert block("steerability") == rows.to_markdown(index=False, floatfmt=".2f")
    reports = [json.loads(path.read_text()) for path in (RESULTS / "steerability").glob("*.json")]
    assert sorted(rows.potential) == sorted(round(report["potential"], 2) for report in reports)
    assert sorted(rows.base) == sorted(report["rows"][0]["success_at_end"] for report in reports)
    assert f" over {len(rows)} flows" in README
    gain = (rows["stage 2, test"] - rows["base, test"]).round(2)
    assert (gain == rows.gain).all()
    best = rows["best control"].str.split(", ").str[1].astype(float)
    for sentence, score, outcome in (
        (r"rank correlation (-?\d\.\d\d) over \d+ flows", rows.potential, gain),
        (r"the gain of the best control alone ranks them with (-?\d\.\d\d)", best - rows.base, gain),
        (r"beyond the best control[^.]*? with (-?\d\.\d\d)", rows.potential, rows["stage 2, test"] - best),
    ):
        stated = re.search(sentence, README)
        assert stated is not None, sentence
        assert float(stated.group(1)) == round(float(spearmanr(score, outcome).statistic), 2)


def test_the_quickstarts_table_is_that_of_its_reports() -> None:
    for seed in range(3):
        report = json.loads((RESULTS / "quickstart" / f"seed{seed}.json").read_text())
        assert report["seed"] == seed
        of = {row["name"]: row for row in report["rows"]}

        def interval(name: str, of: dict = of) -> str:
            return f"{of[name]['success_at_end']:.2f} ({of[name]['ci_low']:.2f} to {of[name]['ci_high']:.2f})"

        def both(name: str, of: dict = of) -> str:
            return f"{of[name]['success_once']:.2f} / {of[name]['success_at_end']:.2f}"

        cells = [str(seed), interval("prior"), both("zero"), both("ticket"), both("stage1"), both("stage1_stochastic")]
        cells += [interval("stage2"), both("stage2_stochastic"), f"{report['env_steps']:,}"]
        assert f"| {' | '.join(cells)} |" in block("results")


def test_the_tables_of_the_benchmark_are_those_of_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    report = json.loads((RESULTS / "benchmark.json").read_text())
    assert block("bench") == importlib.import_module("benchmark.report").markdown(report)


def test_the_table_of_recipes_is_that_of_its_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    report = importlib.import_module("tasks_report")
    rows = report.rows()
    assert block("tasks") == report.markdown(rows)
    pd.testing.assert_frame_equal(rows, pd.read_csv(RESULTS / "tasks.csv"))


def test_the_table_of_metaworld_is_that_of_its_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    rows = importlib.import_module("tasks_report").rows([RESULTS / "metaworld"])
    pd.testing.assert_frame_equal(rows, pd.read_csv(RESULTS / "metaworld.csv"))
    assert not rows.duplicated(["method", "env_id", "seed", "deterministic"]).any()
    assert (rows.episodes == 100).all() and (rows.env_steps <= 300_000).all()
