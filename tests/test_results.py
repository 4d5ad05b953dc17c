"""The figures of README and documentation are those of the results that are kept beside them."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

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
            return f"{of[name]['success_at_end']:.2f} ({of[name]['ci_low']:.2f}–{of[name]['ci_high']:.2f})"

        def both(name: str, of: dict = of) -> str:
            return f"{of[name]['success_once']:.2f} / {of[name]['success_at_end']:.2f}"

        cells = [str(seed), interval("prior"), both("zero"), both("ticket"), both("narrow"), both("stage1")]
        cells += [interval("stage2"), both("stage2_stochastic"), f"{report['env_steps']:,}"]
        assert f"| {' | '.join(cells)} |" in block("results")


def test_the_tables_of_the_benchmark_are_those_of_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    report = json.loads((RESULTS / "benchmark.json").read_text())
    assert block("bench", SPEED) == importlib.import_module("benchmark.report").markdown(report)


def test_the_phases_of_peg_insertion_are_those_of_their_report() -> None:
    kept = json.loads((RESULTS / "peg_phases.json").read_text())
    table = pd.DataFrame.from_dict(kept["rows"], orient="index")
    assert block("phases") == table.to_markdown(floatfmt=".2f")
    assert kept["episodes"] == 100


@pytest.fixture
def tasks_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("tasks_report")


def test_the_tables_of_recipes_are_those_of_their_reports(tasks_report: Any) -> None:
    kept = pd.read_csv(RESULTS / "tasks.csv")
    assert not kept.duplicated(tasks_report.KEYS).any()
    pd.testing.assert_frame_equal(tasks_report.evaluations(), kept)
    for path, places in tasks_report.PAGES.items():
        for name, make in places.items():
            assert block(name, path.read_text()) == make(kept), f"{path.name}, {name}: run examples/tasks_report.py"


def test_rows_without_a_report_are_kept(tasks_report: Any, tmp_path: Path) -> None:
    found = tasks_report.rows()
    older = found[:2].assign(success_at_end=0.123)
    by_hand = found[:3].assign(env_id="PushCube-v1 rgb", success_at_end=[0.1, 1 / 3, 0.3])
    pd.concat([older, by_hand]).to_csv(tmp_path / "tasks.csv", index=False)
    assert tasks_report.evaluations(csv=tmp_path / "other.csv").equals(found)
    merged = tasks_report.evaluations(csv=tmp_path / "tasks.csv")
    assert merged[: len(found)].equals(found) and len(merged) == len(found) + 3
    assert merged[len(found) :].success_at_end.tolist() == by_hand.success_at_end.tolist()  # to the last bit


def made_up(successes: dict[str, tuple[float, ...]], deployed: str = "stage2") -> pd.DataFrame:
    """Evaluations of 10 episodes, one task, a seed after the other; the name of a row is that of a report."""
    return pd.DataFrame(
        dict(method=name.removesuffix("_stochastic"), env_id="Push", seed=seed, env_steps=1000 * seed, episodes=10)
        | dict(success_at_end=success, deployed=name == deployed)
        | dict(deterministic=name not in ("prior", "narrow") and not name.endswith("_stochastic"))
        for name, values in successes.items()
        for seed, success in enumerate(values)
    )


def test_headline_by_hand(tasks_report: Any) -> None:
    """Two seeds of one task: the better control over both, intervals of 20 episodes, and which seeds it beats."""
    found = made_up(dict(prior=(0.2, 0.4), zero=(0.5, 0.7), ticket=(0.9, 0.1), stage2=(0.8, 0.6)))
    # Wilson's formula: centre (p + z^2 / 2n) / (1 + z^2 / n), here for 6, 12 and 14 of 20
    assert tasks_report.headline(found).splitlines()[2] == (
        "| Push | 0.30 (0.15–0.52) | w = 0: 0.60 (0.39–0.78) | **0.70 (0.48–0.85)** | 1,000 | 2 |"
    )
    for successes, low, high in ((6, 0.15, 0.52), (12, 0.39, 0.78), (14, 0.48, 0.85)):
        p, n, z = successes / 20, 20, 1.96
        half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        ends = [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
        assert ends == pytest.approx([low, high], abs=0.005)
    assert tasks_report.reading(found).splitlines() == [
        "- with every seed: none",
        "- with some seeds: Push",
        "- with no seed: none",
    ]
    assert "| Push | 2 | 0.30 (0.20–0.40) | 0.60 (0.50–0.70) |" in tasks_report.by_seeds(found)
    assert "| Push | 1 | 0.20 | 0.50 | 0.90 | not run | not run | 0.80 | not run |" in tasks_report.by_seeds(
        found[found.seed == 0]
    )
    mean, low, high = tasks_report.aggregate(found, "steered")
    assert (mean, low, high) == (pytest.approx(0.7), pytest.approx(0.6), pytest.approx(0.8))
    with pytest.raises(ValueError, match="no <!-- other -->"):
        tasks_report.fill("text", "other", "table")


def test_a_policy_that_samples(tasks_report: Any) -> None:
    """What is deployed counts, and the narrowed prior, which also samples, may be the best control."""
    successes = dict(prior=(0.2,), zero=(0.5,), ticket=(0.3,), narrow=(0.6,), stage2=(0.5,), stage2_stochastic=(0.8,))
    found = made_up(successes, deployed="stage2_stochastic")
    line = tasks_report.headline(found).splitlines()[2]
    assert "| narrowed prior: 0.60 (0.31–0.83) | **0.80 (0.49–0.94)**, sampled |" in line
    assert "with every seed: Push" in tasks_report.reading(found)
    assert tasks_report.aggregate(found, "steered")[0] == 0.8
    assert "| 0.20 | 0.50 | 0.30 | 0.60 | not run | 0.50 | 0.80 |" in tasks_report.by_seeds(found)


def test_a_task_that_is_not_finished(tasks_report: Any, tmp_path: Path) -> None:
    whole = made_up(dict(prior=(0.2,), zero=(0.5,), stage2=(0.8,)))
    found = pd.concat([whole, whole[:1].assign(env_id="Lift")], ignore_index=True)
    assert "| Lift | 0.20 (0.06–0.51) | not run | **not run** | not run | 1 |" in tasks_report.headline(found)
    assert "Lift" not in tasks_report.reading(found)
    assert tasks_report.aggregate(found, "control")[0] == 0.5
    tasks_report.plot(tmp_path / "tasks.png", found)
    assert (tmp_path / "tasks.png").is_file()


def test_latent_sac_and_ppo() -> None:
    kept = json.loads((RESULTS / "latent_sac.json").read_text())
    ppo, sac = kept["success_at_end"]["ppo"], kept["success_at_end"]["latent_sac"]
    text = " ".join(PAGE.split())
    assert f"After {kept['env_steps']:,} env steps PPO had a success of {ppo['deterministic']} at the end" in text
    assert f"and {ppo['sampled']} sampled; `LatentSAC`" in text and f"played for {kept['episodes']} episodes" in text
    assert f'`critic="noise"` had {sac["deterministic"]}, and {sac["sampled"]} sampled' in text


#: Figures of the prose that no table on the same page shows: what they are
STATED = {
    "0.9": "an example of a success, with the half width of its interval",
    "0.06": "that half width",
    **dict.fromkeys(("0.74", "0.83", "0.45", "0.42"), "PPO and LatentSAC, tested above"),
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


def test_metaworld_has_three_tasks_with_three_seeds(tasks_report: Any) -> None:
    found = tasks_report.rows([RESULTS / "metaworld"])
    assert found.groupby("env_id").seed.unique().map(sorted).tolist() == [[0, 1, 2]] * 3
    assert (found.groupby(["env_id", "seed"]).size() == 7).all() and (found.episodes == 100).all()
    assert (found.env_steps <= 300_000).all()
