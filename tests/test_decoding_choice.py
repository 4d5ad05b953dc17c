"""The choice of the way to decode: kept on disk, the same in every process, and never a matter of chance in a test."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch as th

from sb3_dsrl import VelocityUNet
from sb3_dsrl.policies.decoding import choice
from sb3_dsrl.policies.decoding.choice import CLEARLY, choose, decide, quickest
from sb3_dsrl.policies.decoding.loop import integrate_plainly

NAMES = ["default", "other", "third"]
PATHS = {"first": integrate_plainly, "second": integrate_plainly}


def clock(**seconds: float) -> Callable[[str], float]:
    return lambda name: seconds[name]


def must_not_measure(name: str) -> float:
    raise AssertionError("measured")


SLOW_DEFAULT = clock(default=2.0, other=1.0, third=1.5)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "BUDGET", 0.0)
    monkeypatch.setattr(choice, "_DECIDED", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(choice.VARIABLE, "auto")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"default": 1.0, "other": 2.0, "third": 3.0}, "default"),
        ({"default": CLEARLY * 0.99, "other": 1.0, "third": 3.0}, "default"),
        ({"default": CLEARLY * 1.01, "other": 1.0, "third": 3.0}, "other"),
        ({"default": 3.0, "other": 2.0, "third": 1.0}, "third"),
    ],
)
def test_the_default_loses_to_what_is_clearly_quicker(seconds: Mapping[str, float], expected: str) -> None:
    assert quickest(NAMES, seconds) == expected


def test_least_seconds_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five rounds of one second each: the first does not count, and every round begins with another."""
    monkeypatch.setattr(choice, "BUDGET", 4.5)
    calls: list[str] = []

    def timing(name: str) -> float:
        calls.append(name)
        return {"default": 9.0, "other": 7.0}[name] - 0.1 * len(calls) if len(calls) > 2 else 0.0

    monkeypatch.setattr(choice.time, "perf_counter", lambda: len(calls) / 2)
    best = choice.measure(["default", "other"], timing)
    assert calls == ["default", "other", "default", "other", "other", "default", "default", "other", "other", "default"]
    assert best == pytest.approx({"default": 9.0 - 1.0, "other": 7.0 - 0.9})


def test_kept_and_not_measured_again(tmp_path: Path) -> None:
    assert decide("key", NAMES, SLOW_DEFAULT, tmp_path / "new" / "folder") == "other"
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert json.loads(file.read_text())["path"] == "other"
    assert decide("key", NAMES, must_not_measure, tmp_path / "new" / "folder") == "other"
    assert decide("another", NAMES, clock(default=1.0, other=1.0, third=1.0), tmp_path / "new" / "folder") == "default"


def test_the_first_writer_wins(tmp_path: Path) -> None:
    """While one process measures, another one writes."""

    def timing(name: str) -> float:
        assert decide("key", NAMES, clock(default=2.0, other=1.5, third=1.0), tmp_path) == "third"
        return SLOW_DEFAULT(name)

    assert decide("key", NAMES, timing, tmp_path) == "third"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"key": "key", "path": "unheard of"}', '{"key": "k", "path": "other"}'])
def test_a_damaged_file_is_replaced(tmp_path: Path, text: str) -> None:
    decide("key", NAMES, SLOW_DEFAULT, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match="measured again and replaced"):
        assert decide("key", NAMES, clock(default=2.0, other=1.5, third=1.0), tmp_path) == "third"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decide("key", NAMES, must_not_measure, tmp_path) == "third"


def test_where_nothing_can_be_kept_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert decide("key", NAMES, must_not_measure, tmp_path / "file" / "folder") == "default"
    assert decide("key", NAMES, must_not_measure, None) == "default"


SHARED = """
import sys
import torch as th
from sb3_dsrl import VelocityUNet
from sb3_dsrl.policies.decoding import choice, integrate
th.set_num_threads(1)
choice.measure = lambda names, timing: {name: float(name != sys.argv[1]) for name in names}
net = VelocityUNet(2, 4, 6, widths=(8,)).eval()
with th.no_grad():
    integrate(net, th.zeros(3, 6), th.zeros(3, 1, 4, 2), 1)
print(*choice._DECIDED.values())
"""


def test_processes_agree() -> None:
    """The second one would find another way quickest."""
    for quickest_there in ("loop", "blas"):
        done = subprocess.run([sys.executable, "-c", SHARED, quickest_there], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["loop"]


@th.no_grad()
def choice_of(b: int, m: int = 1) -> str:
    net = VelocityUNet(2, 4, 6, widths=(8,)).eval()
    return choose(net, th.zeros(b, 6), th.zeros(b, m, 4, 2), PATHS, most=64)


def test_one_measurement_for_each_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(names: list[str], timing: Callable[[str], float]) -> dict[str, float]:
        measured.append(timing(names[0]))
        return {"first": 2.0, "second": 1.0}

    monkeypatch.setattr(choice, "measure", measure)
    counts = []
    for b, m in ((1, 1), (1, 1), (3, 1), (4, 1), (2, 2), (5, 1), (64, 1), (1000, 1), (40, 3)):
        assert choice_of(b, m) == "second"
        counts.append(len(measured))
    assert counts == [1, 1, 2, 2, 2, 3, 4, 4, 4]


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measure", must_not_measure)
    for value, expected in (("default", "first"), ("first", "first"), ("second", "second")):
        monkeypatch.setenv(choice.VARIABLE, value)
        assert choice_of(2) == expected
    monkeypatch.setenv(choice.VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"SB3_DSRL_DECODE must be one of auto, default, first, second, found 'fastest'"):
        choice_of(2)
    monkeypatch.setenv(choice.VARIABLE, "auto")
    th.use_deterministic_algorithms(True)
    try:
        assert choice_of(2) == "first"
    finally:
        th.use_deterministic_algorithms(False)
    assert choice_of(0) == "first"  # nothing to decode


def test_random_numbers_are_left_alone() -> None:
    net = VelocityUNet(2, 4, 6, widths=(8,)).eval()
    before = th.get_rng_state()
    with th.no_grad():
        choose(net, th.zeros(2, 6), th.zeros(2, 1, 4, 2), PATHS, most=64)
    assert len(choice._DECIDED) == 1 and th.equal(th.get_rng_state(), before)
