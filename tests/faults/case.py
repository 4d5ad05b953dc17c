"""One row of the table, and how it is played."""

import contextlib
import gc
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Case:
    """
    :param name: what is wrong
    :param play: does it, in an empty folder
    :param sentence: regular expression that the message must match
    :param error: what must be raised; SystemExit is a script's exit code 2, a warning means that it goes on
    """

    name: str
    play: Callable[[Path], Any]
    sentence: str
    error: type[BaseException] = ValueError


@dataclass(frozen=True)
class Outcome:
    """
    :param what: name of the exception, "exit code 2", "warning", or "none"
    :param message: one line
    :param problems: why this is not the outcome that was asked for
    """

    what: str
    message: str
    problems: list[str]


def play(case: Case, folder: Path) -> Outcome:
    """
    Plays a case. No process and no open file may be left.

    :param folder: an empty one
    """
    before = _processes()
    what, message, problems = _outcome(case, folder)
    if not re.search(case.sentence, message):
        problems.append(f"the message does not match {case.sentence!r}")
    if "\n" in message.strip() and not message.startswith("Worker "):  # those hold the traceback of the worker
        problems.append("the message has more than one line")
    left = [process for process in _processes() - before if process.is_running()]
    _, alive = psutil.wait_procs(left, timeout=5)
    problems += [f"process {process.pid} is left: {process.status()}" for process in alive]
    if _open_files(folder):
        gc.collect()  # what only a reference cycle keeps open is closed in time
        problems += [f"{path} is still open" for path in _open_files(folder)]
    lines = message.strip().splitlines() or [""]
    return Outcome(what, lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}", problems)


def _outcome(case: Case, folder: Path) -> tuple[str, str, list[str]]:
    spoken = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(spoken):
            warnings.simplefilter("always")
            case.play(folder)
    except case.error as error:
        if isinstance(error, SystemExit):
            problems = [] if error.code == 2 else [f"exit code {error.code}, expected 2"]
            lines = spoken.getvalue().strip().splitlines()  # the last one: above it there may be progress bars
            problems += ["there is a traceback"] if any(line.startswith("Traceback") for line in lines) else []
            return f"exit code {error.code}", lines[-1] if lines else "", problems
        return type(error).__name__, str(error), []
    except Exception as error:
        return type(error).__name__, str(error), [f"raised {type(error).__name__}, expected {case.error.__name__}"]
    if issubclass(case.error, Warning):
        for warning in caught:
            if issubclass(warning.category, case.error) and re.search(case.sentence, str(warning.message)):
                return "warning, goes on", str(warning.message), []
    return "none", "", [f"nothing was raised, expected {case.error.__name__}"]


def _processes() -> set[psutil.Process]:
    # the fork server and the resource tracker live as long as this process
    own = psutil.Process().children()
    return {child for process in own for child in process.children(recursive=True)}


def _open_files(folder: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if Path(file.path).is_relative_to(folder.resolve())]
