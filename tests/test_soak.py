"""A few seconds of examples/soak.py with a toy env: workers are killed, and every episode is accounted for."""

from pathlib import Path

import pytest

from tests.envs import ScriptedEnv, scripted, tiny_flow

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # workers, too, must find the module
    import soak

    return soak


def toy():
    return scripted(20, episode_lengths=(1000,))


def test_soak(soak) -> None:
    report = soak.soak(toy, tiny_flow(), 5.0, 0.8, 3, n_steps=16, batch_size=16, n_epochs=1)
    books = [error for error in report.errors if "memory" not in error]  # which has not warmed up in 5 s
    assert not books
    assert report.workers_killed >= 2 and report.workers_restarted == report.workers_killed
    assert report.episodes_truncated_by_fault == report.workers_killed  # one env a worker
    assert report.episodes_finished > 20 and report.episodes_open == 3
    assert report.rss_first > 100 and report.main_rss_first > 100
    # in this env nothing else ends an episode: 7 macro-steps of 3 env steps
    assert 0 <= report.env_steps - 21 * report.episodes_finished < 21 * (report.workers_killed + 3)


def test_maniskill(soak) -> None:
    report = soak.main(soak.Args(minutes=0.1, kill_every=0, workers=1))
    assert [error for error in report.errors if "memory" not in error and "rollout" not in error] == []
    assert report.env_steps > 100 and report.episodes_finished > 1


def test_an_error_is_reported(soak) -> None:
    report = soak.soak(Sick, tiny_flow(), 5.0, 0.0, 1, n_steps=4, batch_size=4)
    assert any("out of order" in error for error in report.errors)


def test_books_that_do_not_balance_are_errors(soak) -> None:
    report = soak.Report(
        episodes_started=5, episodes_finished=2, episodes_open=1, episodes_truncated_by_fault=1, workers_killed=1, rss_last=1.0
    )
    report.judge()
    assert report.errors == [
        "5 episodes were started, 4 accounted for",
        "not every worker that was killed was started again",
        "memory grew by more than 5%",
    ]


class Sick(ScriptedEnv):
    """Cannot be reset twice, nor started again."""

    def __init__(self) -> None:
        super().__init__(episode_lengths=(1000,))

    def step(self, action):
        raise ValueError("out of order")
