"""The comparison: every method runs, finished runs are kept, and the report says what the runs found."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from tests.scripts import EXAMPLES, run_script

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every method ran once."""
    folder = tmp_path_factory.mktemp("compare")
    done = run_script("compare/run.py", "--smoke", "--jobs", 1, "--output", folder, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert [path.name for path in folder.iterdir()] == ["smoke"]  # where no real comparison finds it
    return folder / "smoke"


def test_every_method_runs(folder: Path) -> None:
    rows = pd.read_csv(folder / "results.csv")
    columns = "method,env_id,seed,env_steps,episodes,success_once,success_at_end,deterministic,wall_seconds"
    assert ",".join(rows.columns) == columns
    paths = {path.parent.name for path in folder.glob("*/*/0.json")}
    assert set(rows.method) == paths and len(paths) == 24
    spent = rows.groupby("method").env_steps.first()
    assert (spent[["prior", "zero", "narrow", "best_of_m"]] == 0).all()
    # episodes of 8 env steps
    stage1 = spent[["ticket", "stage1", "ticket_stage1", "shared_stage1"]]
    assert stage1.tolist() == [3 * 8, 2 * 8, (3 + 2) * 8, 2 * 8]
    learned = spent.drop(["prior", "zero", "narrow", "best_of_m", *stage1.index])
    assert (learned > 128 - 8 * 4).all()  # the budget, in whole rollouts of 8 chunks
    assert spent["stage2"] == spent["shared_stage2"] == 128


def test_report(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "ticket + stage 1 + stage 2" in text and "Stage 0: 50 demos" in text
    for name in ("PushCube-v1_final.png", "PushCube-v1_curves.png"):
        assert f"]({name})" in text and (folder / name).stat().st_size > 10_000


def test_the_report_states_its_commands_and_the_start_of_stage_2(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "python examples/compare/run.py --env_ids PushCube-v1 --methods prior zero narrow" in text
    start = json.loads((folder / "PushCube-v1" / "full" / "0.json").read_text())["curve"][0]["success_at_end"]
    assert re.search(rf"\| ticket \+ stage 1 \+ stage 2 +\| {start:.2f} ", text.partition("Offline to online")[2])


def test_the_report_states_the_env_steps_to_the_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "PushCube-v1" / "stage2" / "0.json"
    content = json.loads(path.read_text())
    curve = zip((0, 1_000, 2_000, 3_000), (0.5, 0.75, 0.8125, 0.5), strict=True)
    content["curve"] = [dict(env_steps=steps, success_once=1.0, success_at_end=success) for steps, success in curve]
    path.write_text(json.dumps(content))
    monkeypatch.syspath_prepend(EXAMPLES)
    text = importlib.import_module("compare.report").write_report(folder).partition("Env steps after which")[2]
    assert re.search(r"\| stage 2 +\| 2,000 +\| 0 +\|", text)  # at the end, once


def test_finished_runs_are_skipped(folder: Path) -> None:
    path = folder / "PushCube-v1" / "zero" / "0.json"
    content = json.loads(path.read_text())
    content["rows"][0]["success_at_end"] = 0.625
    path.write_text(json.dumps(content))
    done = run_script("compare/run.py", "--smoke", "--methods", "zero", "--output", folder.parent, cwd=folder)
    assert done.returncode == 0 and "0.62" in done.stdout  # taken from the file, not run again


def test_other_settings_need_another_folder(folder: Path) -> None:
    done = run_script("compare/run.py", "--budget", 64, "--output", folder, cwd=folder)
    assert done.returncode == 2 and f"--budget is 64, but {folder} holds runs with 128: expected the same" in done.stderr


def test_recipes_of_stage_1(folder: Path) -> None:
    names = ("candidates_demos", "two_rounds", "learned_std")
    done = run_script("compare/run.py", "--smoke", "--jobs", 1, "--methods", *names, "--output", folder.parent, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    recipes = (folder / "report.md").read_text().partition("Recipes of stage 1")[2]
    assert "| stage 1: candidates, critic of the demos | 1 " in recipes and "| stage 1: two rounds" in recipes
    spent = pd.read_csv(folder / "results.csv").groupby("method").env_steps.first()
    assert spent[list(names)].tolist() == [0, 16, 16]


@pytest.mark.parametrize(("flag", "value"), [("--methods", "sacc"), ("--env_ids", "PushCube-v2")])
def test_unknown_names(folder: Path, flag: str, value: str) -> None:
    done = run_script("compare/run.py", flag, value, "--output", folder, cwd=folder)
    assert done.returncode == 2 and f"{flag}: {value} is unknown; expected some of" in done.stderr


def test_ctrl_c_ends_it_at_once(folder: Path) -> None:
    """The runs that wait are not started any more, and nothing is half-written."""
    script = [sys.executable, EXAMPLES / "compare/run.py", "--smoke", "--seeds", "1", "--output", folder.parent]
    process = subprocess.Popen([*map(str, script)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until(lambda: bool(list(folder.glob("*/*/1.json"))))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "stopped at once" in errors
    until(lambda: not alive(process.pid))
    finished = list(folder.glob("*/*/1.json"))
    assert 1 <= len(finished) < 24 and all(json.loads(path.read_text())["rows"] for path in finished)
    assert not list(folder.glob("**/*.partial"))


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Waits for a condition."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.2)


def alive(group: int) -> bool:
    """Whether a process group has a process that has not ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state != "Z":
                return True
    return False
