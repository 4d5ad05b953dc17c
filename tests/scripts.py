"""Runs an example script as ``python examples/<script>`` does, but in this process: importing torch and ManiSkill anew for
every wrong flag would cost more than all that is tested."""

import contextlib
import io
import runpy
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_script(script: str, *flags: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """
    :param script: path below ``examples``
    :param flags: of the command line
    :param cwd: working directory
    :return: exit code and output
    """
    command = [str(EXAMPLES / script), *map(str, flags)]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", command)
        patch.syspath_prepend(EXAMPLES)
        patch.chdir(cwd)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    return subprocess.CompletedProcess(
        command, code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue()
    )
