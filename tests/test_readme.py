"""The README's code, as it stands and in its order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_dsrl.utils.checkpoint import previous
from tests.test_awsc import Checkpoint

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the repository's examples in it; later blocks find what earlier ones have written."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    Checkpoint(folder / "best_eval_success_once.pt")
    return folder


def run(folder: Path, block: int) -> str:
    """What a block prints."""
    script = folder / f"block{block}.py"
    script.write_text(BLOCKS[block])
    # one thread: on a busy machine torch's threads would wait for each other, and the README's numbers are not small
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script.name], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block(folder: Path, block: int) -> None:
    printed = run(folder, block)
    if block == 0:
        assert re.search(r"prior +32 .*\n *stage2 +32 ", printed), printed
        assert (folder / "pushcube.zip").is_file()
    if "ResumeCallback" in BLOCKS[block]:
        path = folder / "runs" / "pushcube" / "resume.zip"
        n_macro_steps = int(re.findall(r"total = .*, ([\d_]+)", BLOCKS[block])[0].replace("_", ""))
        assert saved_steps(path) == n_macro_steps  # the last interval, too
        assert 0 < saved_steps(previous(path)) < n_macro_steps
        before = path.read_bytes()
        run(folder, block)  # there is nothing left to do
        assert path.read_bytes() == before


def saved_steps(path: Path) -> int:
    """Macro-steps of a checkpoint."""
    data, _, _ = load_from_zip_file(path)
    assert data is not None
    return data["num_timesteps"]


def test_has_blocks() -> None:
    assert len(BLOCKS) >= 3 and sum("ResumeCallback" in block for block in BLOCKS) == 1
