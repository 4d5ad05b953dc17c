"""
The table of everything that can be wrong or break: what is done, and what must come of it.

``python -m tests.faults`` (``make faults``) plays all cases and prints them; ``tests/test_faults.py`` runs the same list.
"""

from tests.faults import arguments, demo_files, flow_files, foreign_demos, other_files, pairs, running, scripts
from tests.faults.case import Case, Outcome, play

__all__ = ["CASES", "Case", "Outcome", "play"]

#: Every case, by what it is about.
CASES: dict[str, list[Case]] = {
    "Demo files": demo_files.CASES,
    "Demos from elsewhere": foreign_demos.CASES,
    "Flow folders": flow_files.CASES,
    "Checkpoints": other_files.CASES,
    "Things that do not fit each other": pairs.CASES,
    "Arguments": arguments.CASES,
    "Faults while it runs": running.CASES,
    "Scripts": scripts.CASES,
}
