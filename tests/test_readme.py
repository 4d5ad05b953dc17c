"""The README's code, as it stands and in its order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks

BLOCKS = [block.text for block in blocks(ROOT / "README.md", "python")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the repository's examples in it; later blocks find what earlier ones have written."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block(folder: Path, block: int) -> None:
    script = folder / f"block{block}.py"
    script.write_text(BLOCKS[block])
    # one thread: on a busy machine torch's threads would wait for each other, and the README's numbers are not small
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script.name], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if block == 0:
        assert re.search(r"prior +32 .*\n *zero +32 .*\n *stage2 +32 ", done.stdout), done.stdout
        assert (folder / "pushcube.zip").is_file() and (folder / "flows" / "pushcube" / "config.json").is_file()


def test_has_blocks() -> None:
    assert len(BLOCKS) == 1
