"""Every case of the table of faults and bad input has the outcome that is defined for it."""

from pathlib import Path

import pytest

from tests.faults import CASES, Case, play


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{title}: {case.name}") for title, cases in CASES.items() for case in cases]
)
def test_case(case: Case, tmp_path: Path) -> None:
    outcome = play(case, tmp_path)
    assert not outcome.problems, f"{outcome.what}: {outcome.message}"


def test_names_are_unique() -> None:
    names = [(title, case.name) for title, cases in CASES.items() for case in cases]
    assert len(names) == len(set(names))
