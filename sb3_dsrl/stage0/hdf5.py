"""HDF5 files of demos: whatever is wrong with one, the error is one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from sb3_dsrl.stage0.episodes import DemoError
from sb3_dsrl.utils.integrity import one_line


@contextmanager
def open_demo_file(path: Path) -> Iterator[h5py.File]:
    """
    Opens a file to read it.

    :param path: of the file
    :raises DemoError: if it is damaged, which shows only when something is read
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DemoError:
        raise
    except Exception as error:  # of many kinds: HDF5 checks little before it reads
        raise DemoError(f"{path} cannot be read as HDF5; it is damaged or cut short ({one_line(error)})") from error
