"""The tutorial notebook: it runs from top to bottom, and its kept output is that of a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import DOCS, ROOT

CELLS = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


#: What the notebook says, and what it says in the short run
SHORTER = {
    "n_iterations=800": "n_iterations=40",
    "episodes=192": "episodes=8",
    "episodes=64": "episodes=8",
    "total_timesteps=10_000": "total_timesteps=512",
    "range(40)": "range(2)",
}
ROWS = ["random w", "w = 0", "stage 1", "stage 2", "stage 2, sampled"]


def run(folder: Path, shorter: dict[str, str]) -> str:
    """
    Runs the notebook as Jupyter does, in one process whose main module is no file.

    :param folder: to run in
    :param shorter: replacements in its code
    :return: what it prints
    """
    (folder / "examples").symlink_to(ROOT / "examples")
    code = "\n\n".join("".join(cell["source"]) for cell in CODE)
    for old, new in shorter.items():
        assert old in code
        code = code.replace(old, new)
    env = os.environ | {"MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "runs" / "tutorial" / "policy" / "config.json").is_file()
    return done.stdout


def successes(printed: str) -> dict[str, float]:
    """At the end, from the last table that is printed."""
    last = printed[printed.rindex("env steps in all") :]
    return {name: float(end) for name, end in re.findall(r"^ *(\S.*?) +\d+ +\d\.\d\d +(\d\.\d\d) ", last, re.MULTILINE)}


def test_runs_from_top_to_bottom(tmp_path: Path) -> None:
    assert list(successes(run(tmp_path, SHORTER))) == ROWS


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_shows_what_it_says(tmp_path: Path) -> None:
    success = successes(run(tmp_path, {}))
    assert success["stage 2"] > success["random w"] + 0.2  # four standard errors, less than half of what is usual


def test_kept_output_is_that_of_one_run() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    success = successes("".join("".join(output.get("text", "")) for output in outputs))
    assert list(success) == ROWS and success["stage 2"] > success["random w"] + 0.2


def test_links_lead_somewhere() -> None:
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([\w./]+)\)", text)
    assert len(links) >= 3 and not [link for link in links if not (DOCS / link).is_file()]
