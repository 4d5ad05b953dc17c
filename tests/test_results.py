"""The figures of README and documentation are those of the results that are kept beside them."""

import importlib
import json
import re

import pandas as pd
import pytest
from scipy.stats import spearmanr

from tests.scripts import EXAMPLES

README = (EXAMPLES.parent / "README.md").read_text()
PAGE = (EXAMPLES.parent / "docs" / "results.md").read_text()
SPEED = (EXAMPLES.parent / "docs" / "scale.md").read_text()
RESULTS = EXAMPLES / "results"


def block(name: str, text: str = PAGE) -> str:
    """What stands in a page between <!-- name --> and <!-- /name -->."""
    found = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", text, re.DOTALL)
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
    assert f" over {len(rows)} flows" in PAGE
    gain = (rows["stage 2, test"] - rows["base, test"]).round(2)
    assert (gain == rows.gain).all()
    best = rows["best control"].str.split(", ").str[1].astype(float)
    for sentence, score, outcome in (
        (r"rank correlation (-?\d\.\d\d) over \d+ flows", rows.potential, gain),
        (r"the gain of the best control alone ranks them with (-?\d\.\d\d)", best - rows.base, gain),
        (r"beyond the best control[^.]*? with (-?\d\.\d\d)", rows.potential, rows["stage 2, test"] - best),
    ):
        stated = re.search(sentence, PAGE)
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
    assert block("bench", SPEED) == importlib.import_module("benchmark.report").markdown(report)


def test_the_tables_of_recipes_are_those_of_their_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    report = importlib.import_module("tasks_report")
    rows = report.rows()
    pd.testing.assert_frame_equal(rows, pd.read_csv(RESULTS / "tasks.csv"))
    for path, places in report.PAGES.items():
        for name, make in places.items():
            assert block(name, path.read_text()) == make(rows), f"{path.name}, {name}: run examples/tasks_report.py"


def test_headline_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of one task: the better control by its mean, ranges, and which seeds it beats."""
    monkeypatch.syspath_prepend(EXAMPLES)
    report = importlib.import_module("tasks_report")
    successes = dict(prior=(0.2, 0.4), zero=(0.5, 0.7), ticket=(0.9, 0.1), stage2=(0.8, 0.6))
    found = pd.DataFrame(
        dict(
            method=name, env_id="Push", seed=seed, env_steps=1000 * seed, success_at_end=success, deterministic=name != "prior"
        )
        | dict(ci_low=0.0, ci_high=1.0)
        for name, values in successes.items()
        for seed, success in enumerate(values)
    )
    cells = "| Push | 0.30 (0.20–0.40) | w = 0: 0.60 (0.50–0.70) | **0.70 (0.60–0.80)** | 1,000 | 2 |"
    assert report.headline(found).splitlines()[2] == cells
    assert report.reading(found).splitlines() == ["- with every seed: none", "- with some seeds: Push", "- with no seed: none"]
    one = found[found.seed == 0]
    assert "| 0.20 (0.00–1.00) | best fixed w: 0.90 (0.00–1.00) | **0.80" in report.headline(one)
    mean, low, high = report.aggregate(found, "stage2")
    assert (mean, low, high) == (pytest.approx(0.7), pytest.approx(0.6), pytest.approx(0.8))
    with pytest.raises(ValueError, match="no <!-- other -->"):
        report.fill("text", "other", "table")


#: Figures of the prose that no table on the same page shows: what they are
STATED = {
    "0.9": "an example of a success, with the half width of its interval",
    "0.06": "that half width",
    "0.98": "tested above",
    "0.93": "tested above",
    "0.03": "tested above",
}


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_figures_in_the_text_are_accounted_for(page: str) -> None:
    """Nobody writes a success into the prose that no table or test holds."""
    text = (EXAMPLES.parent / page).read_text()
    prose = re.sub(
        r"^\|[^\n]*$|<!--.*?-->|```.*?```|`[^`]*`|\(http[^)]*\)|\d{4}\.\d{4,5}", "", text, flags=re.DOTALL | re.MULTILINE
    )
    assert set(re.findall(r"(?<![\w.])0\.\d+", prose)) <= STATED.keys()
    half_width = 1.96 * (0.9 * 0.1 / 100) ** 0.5
    assert half_width == pytest.approx(0.06, abs=0.002)
