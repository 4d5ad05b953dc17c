"""Files that survive: atomic writes, the previous checkpoint, kills at any time, and what does not fit."""

import errno
import multiprocessing
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dsrl import TrainingCheckpoint
from sb3_dsrl.utils.checkpoint import atomic_file, newest_readable, previous, rng_state, set_rng_state
from sb3_dsrl.utils.interrupt import Interrupted, StopSignals
from sb3_dsrl.utils.progress import ProgressLoop


def write(path: Path, number: int) -> None:
    """A checkpoint that holds a number and some weight."""
    with atomic_file(path, keep_previous=True) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("number", str(number))
        archive.writestr("weight", bytes(300_000))


def read(path: Path) -> int:
    found = newest_readable(path)
    assert found is not None
    return int(zipfile.ZipFile(found).read("number"))


# Atomic files


def test_the_previous_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.zip"
    assert newest_readable(path) is None
    for number in range(3):
        write(path, number)
    assert read(path) == 2 and read(previous(path)) == 1
    assert {file.name for file in path.parent.iterdir()} == {"a.zip", "a.previous.zip"}


def test_the_previous_one_is_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("sb3_dsrl.utils.checkpoint.os.link", link)
    test_the_previous_one_is_kept(tmp_path)


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write(path, 1)
    with pytest.raises(KeyError), atomic_file(path, keep_previous=True) as file:
        file.write(b"half of i")
        raise KeyError
    assert read(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("step", ["fsync 1", "replace 1", "replace 2", "fsync 2"])
def test_power_cut_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Whatever step is the last one, the newest checkpoint or the one before it is there."""
    path = tmp_path / "a.zip"
    write(path, 1)
    write(path, 2)

    class PowerCut(BaseException):
        pass

    def cut(name: str) -> Any:
        real, calls = getattr(os, name), iter(range(1, 9))

        def function(*args: Any) -> Any:
            if f"{name} {next(calls)}" == step:
                raise PowerCut
            return real(*args)

        return function

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(f"sb3_dsrl.utils.checkpoint.os.{name}", cut(name))
        with pytest.raises(PowerCut):
            write(path, 3)
    assert read(path) == (3 if step == "fsync 2" else 2)
    write(path, 4)  # the next run writes as ever
    assert read(path) == 4
    assert {file.name for file in tmp_path.iterdir()} == {"a.zip", "a.previous.zip"}


def test_there_is_a_complete_file_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a.zip", []
    write(path, 1)

    def watch(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            result = real(*args)
            seen.append(int(zipfile.ZipFile(path).read("number")))
            return result

        return function

    for name in ("fsync", "link", "replace"):
        monkeypatch.setattr(f"sb3_dsrl.utils.checkpoint.os.{name}", watch(getattr(os, name)))
    write(path, 2)
    assert seen == [1, 1, 1, 2, 2]


def _write_for_ever(path: Path) -> None:
    number = read(path) if path.exists() or previous(path).exists() else 0
    while True:
        number += 1
        write(path, number)


def test_kill_at_any_time(tmp_path: Path) -> None:
    path, context, rng = tmp_path / "a.zip", multiprocessing.get_context("forkserver"), random.Random(0)
    last, kills, interrupted = 0, 0, 0
    while kills < 4 or (not interrupted and kills < 40):  # by chance none of the first few may hit a write
        process = context.Process(target=_write_for_ever, args=(path,))
        process.start()
        while not path.exists() or read(path) == last:  # it is at work
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.join()
        kills += 1
        interrupted += (tmp_path / "a.zip.partial").exists()
        assert read(path) > last
        last = read(path)
    assert interrupted, "no kill hit a write: this test has shown nothing"


@pytest.mark.parametrize("damage", ["cut", "flipped byte", "empty", "text"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.zip"
    write(path, 1)
    write(path, 2)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    broken = {"cut": whole[:-100], "flipped byte": bytes(flipped), "empty": b"", "text": b"no checkpoint" * 99}[damage]
    path.write_bytes(broken)
    with pytest.warns(UserWarning, match=r"a\.zip is .*damaged.*; going on from .*a\.previous\.zip"):
        assert read(path) == 1
    previous(path).write_bytes(broken)
    with pytest.raises(ValueError, match=r"a\.zip is .*damaged.*; .*a\.previous\.zip is .*damaged"):
        newest_readable(path)


# Random generators


def test_rng_state_travels(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.standard_normal(3).tolist(), th.rand(3).tolist()

    np.random.standard_normal()  # NumPy keeps the second one of a pair
    th.save(rng_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_rng_state(th.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


# Loops of the offline stages


def run_loop(checkpoint: TrainingCheckpoint | None, n_iterations: int = 12, stop: int | None = None) -> list[float]:
    """A loop whose result depends on weights, optimiser and random generator; it fails at iteration ``stop``."""
    net = nn.Linear(2, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = th.optim.Adam(net.parameters(), lr=0.1)
    for i in ProgressLoop("a loop", n_iterations, checkpoint=checkpoint, parts=dict(net=net, optimizer=optimizer)):
        if i == stop:
            raise KeyError
        optimizer.zero_grad()
        (net(th.randn(8, 2)) - 1).pow(2).mean().backward()
        optimizer.step()
    return [*net.weight[0].tolist(), net.bias.item()]


def test_a_loop_goes_on(tmp_path: Path) -> None:
    th.manual_seed(0)
    expected = run_loop(None)
    th.manual_seed(0)
    with pytest.raises(KeyError):
        run_loop(TrainingCheckpoint(tmp_path, save_freq=5), stop=11)
    th.manual_seed(1)  # the state on disk wins
    assert run_loop(TrainingCheckpoint(tmp_path, save_freq=5, resume=True)) == expected
    th.manual_seed(1)
    assert run_loop(TrainingCheckpoint(tmp_path, resume=True)) == expected  # it is complete: nothing is done again
    th.manual_seed(1)
    assert run_loop(TrainingCheckpoint(tmp_path)) != expected  # without resume it starts anew


def test_the_second_loop_of_a_name_is_another_one(tmp_path: Path) -> None:
    th.manual_seed(0)
    first = TrainingCheckpoint(tmp_path)
    expected = [run_loop(first), run_loop(first)]
    assert expected[0] != expected[1]
    second = TrainingCheckpoint(tmp_path, resume=True)
    assert [run_loop(second), run_loop(second)] == expected


@dataclass
class Found:
    w: np.ndarray
    score: float


def test_once(tmp_path: Path) -> None:
    def make() -> Found:
        return Found(np.random.standard_normal(3).astype(np.float32)[::-1], 0.5)

    def fail() -> Found:
        raise AssertionError("it was found before")

    found = TrainingCheckpoint(tmp_path).once("ticket", Found, make)
    after = np.random.standard_normal()
    again = TrainingCheckpoint(tmp_path, resume=True).once("ticket", Found, fail)
    assert again.score == 0.5 and np.array_equal(again.w, found.w) and again.w.dtype == np.float32
    assert np.random.standard_normal() == after
    assert TrainingCheckpoint(tmp_path).once("ticket", Found, make).w.tolist() != found.w.tolist()


def test_what_does_not_fit(tmp_path: Path) -> None:
    run_loop(TrainingCheckpoint(tmp_path))
    with pytest.raises(ValueError, match=r"is of a run of 12 iterations, but this one has 13"):
        run_loop(TrainingCheckpoint(tmp_path, resume=True), n_iterations=13)
    checkpoint = TrainingCheckpoint(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"holds \['net', 'optimizer'\], but this run needs \['net'\]"):
        ProgressLoop("a loop", 12, checkpoint=checkpoint, parts=dict(net=nn.Linear(2, 1)))
    checkpoint = TrainingCheckpoint(tmp_path, resume=True)
    net = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"does not fit this run, its 'net' is another one: .*size mismatch"):
        ProgressLoop("a loop", 12, checkpoint=checkpoint, parts=dict(net=net, optimizer=th.optim.Adam(net.parameters())))
    with pytest.raises(ValueError, match="save_freq must be at least 1, found 0"):
        TrainingCheckpoint(tmp_path, save_freq=0)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("bomb"),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    th.save(dict(iteration=1, parts=Bomb()), tmp_path / "a_loop_1.checkpoint")
    with pytest.raises(ValueError, match=r"a_loop_1\.checkpoint is not a checkpoint of tensors"):
        run_loop(TrainingCheckpoint(tmp_path, resume=True))
    assert not Path("bomb").exists()


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_loop_stops_at_a_signal(
    tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    done = []
    net = nn.Linear(1, 1)
    with pytest.raises(Interrupted) as stopped:
        for i in ProgressLoop("a loop", 12, checkpoint=TrainingCheckpoint(tmp_path, 100), parts=dict(net=net)):
            if i == 3:
                signal.raise_signal(number)
            done.append(i)
    assert stopped.value.code == code and done == [0, 1, 2, 3]
    assert f"{number.name}: stopped; a resume goes on from {tmp_path}/a_loop_1.checkpoint" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = ProgressLoop("a loop", 12, checkpoint=TrainingCheckpoint(tmp_path, resume=True), parts=dict(net=net))
    assert list(rest) == list(range(4, 12))


def test_a_second_signal_acts_at_once() -> None:
    signals = StopSignals("the end")
    signals.listen()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_signals_after_the_owner_failed_act_at_once() -> None:
    signals = StopSignals("the end", owner=object())  # none of its methods is running
    signals.listen()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signals.received is None
