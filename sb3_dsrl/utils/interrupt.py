"""SIGINT and SIGTERM that wait for a safe point."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn


class Interrupted(SystemExit):
    """Training that stopped at a safe point because of a signal; as a script's exit code 130 (SIGINT) or 143 (SIGTERM)."""


class StopSignals:
    """
    Takes note of SIGINT and SIGTERM between :meth:`listen` and :meth:`ignore`. A second signal acts as it always does.

    Outside of the main thread, which is the one that gets signals, nothing happens.

    :param until: what the user is told that the program goes on until, such as "the end of this rollout"
    :param owner: signals are noted while a method of this object is running, and act as they always do otherwise; None is
        always. It is for those who cannot know when an exception ended what they belong to.
    """

    def __init__(self, until: str, owner: Any = None) -> None:
        self.received: signal.Signals | None = None
        self._until, self._owner = until, owner
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Begins."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def ignore(self) -> None:
        """Ends: signals act as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def leave(self, state: str) -> NoReturn:
        """
        Ends the program, or what runs in it.

        :param state: what became of the work
        :raises Interrupted: in any case
        """
        assert self.received is not None
        self.ignore()
        print(f"{self.received.name}: stopped; {state}", file=sys.stderr)
        raise Interrupted(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        if self._owner is not None and not self._is_running(frame):
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: stops at {self._until}; once more stops at once", file=sys.stderr)

    def _is_running(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_locals.get("self") is self._owner:
                return True
            frame = frame.f_back
        return False
