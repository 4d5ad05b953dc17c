"""Prints the table: case, outcome, message. Exit code 1 if a case has no defined outcome."""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch as th

from tests.faults import CASES, play

if __name__ == "__main__":
    th.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["sb3_dsrl.envs.maniskill", "tests.envs"])
    total, failures = 0, 0
    for title, cases in CASES.items():
        print(f"\n## {title}\n\n| case | outcome | message |\n|---|---|---|", flush=True)
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                outcome = play(case, Path(folder))
                message = outcome.message.replace(folder, "...").replace("|", "\\|")
            print(f"| {case.name} | {outcome.what} | {message} |", flush=True)
            for problem in outcome.problems:
                print(f"|  | **UNDEFINED** | {problem} |", flush=True)
            total, failures = total + 1, failures + bool(outcome.problems)
    print(f"\n{total} cases, {total - failures} with the outcome that is defined for them, {failures} without")
    sys.exit(failures > 0)
