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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """As Jupyter runs it: in one process whose main module is no file."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    code = "\n\n".join("".join(cell["source"]) for cell in CODE)
    env = os.environ | {"MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "tutorial" / "policy" / "config.json").is_file()
    last = done.stdout[done.stdout.index("env steps in all") :]
    success = {name: float(at_end) for name, at_end in re.findall(r"^ *(\S.*?) +64 +[\d.]+ +([\d.]+) ", last, re.MULTILINE)}
    assert list(success) == ["random w", "w = 0", "stage 1", "stage 2", "stage 2, sampled"]
    assert success["stage 2"] > success["random w"] + 0.2  # four standard errors, less than half of what is usual


def test_kept_output_is_that_of_one_run() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_links_lead_somewhere() -> None:
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([\w./]+)\)", text)
    assert len(links) >= 3 and not [link for link in links if not (DOCS / link).is_file()]
