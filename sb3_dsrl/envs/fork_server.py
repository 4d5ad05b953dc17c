"""Processes that start in a moment and share the pages of what they import: fork servers of our own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any

#: One for each list of modules.
_SERVERS: dict[tuple[str, ...], forkserver.ForkServer] = {}
_LOCK = threading.Lock()
os.register_at_fork(after_in_child=_SERVERS.clear)  # they are the parent's children


class ServedProcess(ForkServerProcess):
    """
    A process that is forked from a server which has imported some modules, and has no threads, locks or CUDA context of this
    process.

    ``multiprocessing`` has one fork server, whose modules are chosen before it starts. If somebody else started it, SB3's
    ``SubprocVecEnv`` for instance, each worker would import torch and a simulator for itself: 300 MB of its own in place of
    60. So ours are servers beside that one, and neither it nor its list of modules is touched. What that list holds by
    ``multiprocessing.set_forkserver_preload``, say the module of another simulator, ours import as well.

    :param preload: names of the modules that the server imports
    :param target: runs in the process
    :param args: its arguments
    """

    def __init__(self, preload: Sequence[str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
        super().__init__(target=target, args=args, daemon=True)
        # "__main__", the list's default, imports the user's script, which each process does for itself.
        theirs = [name for name in forkserver._forkserver._preload_modules if name != "__main__"]  # type: ignore[attr-defined]
        self.preload = tuple(dict.fromkeys([*preload, *theirs]))

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_forkserver.Popen:
        return _Popen(process_obj)


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: BaseProcess) -> None:
        assert isinstance(process_obj, ServedProcess)
        with _LOCK:
            if process_obj.preload not in _SERVERS:
                server = _SERVERS[process_obj.preload] = forkserver.ForkServer()
                server.set_forkserver_preload(list(process_obj.preload))
            # The standard library asks the one server of the module, so ours stands in its place for a moment.
            theirs = forkserver.connect_to_new_process
            forkserver.connect_to_new_process = _SERVERS[process_obj.preload].connect_to_new_process
            try:
                super()._launch(process_obj)  # type: ignore[misc]  # unknown to typeshed
            finally:
                forkserver.connect_to_new_process = theirs
