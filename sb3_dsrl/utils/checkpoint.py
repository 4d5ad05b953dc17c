"""Checkpoints on disk: written atomically, the previous one kept, with the states of the random generators.

A file is complete or not there: it is written beside its place, forced to the disk and renamed. Whatever happens at whatever
moment, the newest checkpoint or the one before it can be read.
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

import numpy as np
import torch as th

from sb3_dsrl.utils.integrity import check_zip, load_data

Result = TypeVar("Result")


class Stateful(Protocol):
    """What networks, optimisers, schedulers and data sources have in common."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Takes a state over."""


@contextmanager
def atomic_file(path: Path, keep_previous: bool = False) -> Iterator[BytesIO]:
    """
    A file to write to, in memory. It takes the place of ``path`` when the block has ended without an error, and not before it
    is safely on the disk.

    :param path: where it will be; the folder is made
    :param keep_previous: keep what was there as :func:`previous`
    :raises OSError: if it cannot be written; ``path`` is then as it was
    """
    content = BytesIO()  # torch writing to a full disk would not say what went wrong
    yield content
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            _keep(path)
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, must reach the disk
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def _keep(path: Path) -> None:
    """A second name for what is there, so that there is a complete file under the first one at every moment."""
    link = path.with_name(f"{path.name}.link")
    link.unlink(missing_ok=True)  # of a process that was killed
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        os.replace(path, previous(path))
    else:
        os.replace(link, previous(path))
        link.unlink(missing_ok=True)  # rename does nothing where both names are of one file already


def previous(path: Path) -> Path:
    """
    :param path: of a checkpoint
    :return: where the checkpoint before it is kept
    """
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def newest_readable(path: Path) -> Path | None:
    """
    The newest of a checkpoint and its :func:`previous` that is whole; None if there is neither.

    :param path: of a checkpoint: a zip file, as SB3's models and torch's files are, whose checksums are verified
    :raises ValueError: if there are such files, but all of them are damaged
    """
    problems: list[str] = []
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            check_zip(candidate)
        except ValueError as error:
            problems.append(str(error))
            continue
        for text in problems:
            warnings.warn(f"{text}; going on from {candidate}, the checkpoint before it")
        return candidate
    if problems:
        raise ValueError("; ".join(problems))
    return None


def rng_state() -> dict[str, Any]:
    """
    :return: states of the global generators of Python, NumPy and torch in this process: plain values and tensors
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_initialized() else []
    numpy_state = (name, th.from_numpy(np.asarray(keys, np.int64)), *rest)
    return dict(python=random.getstate(), numpy=numpy_state, torch=th.get_rng_state(), cuda=cuda)


def set_rng_state(state: dict[str, Any]) -> None:
    """
    :param state: of :func:`rng_state`
    """
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    th.set_rng_state(state["torch"])
    if state["cuda"]:
        th.cuda.set_rng_state_all(state["cuda"])


class TrainingCheckpoint:
    """
    Where the offline stages keep their state, to be passed to :func:`~sb3_dsrl.train_flow`, :func:`~sb3_dsrl.train_critic` and
    :func:`~sb3_dsrl.pretrain_latent`. Every loop has a file of its own in the folder. SIGINT and SIGTERM end a loop after a
    checkpoint, with :class:`~sb3_dsrl.utils.interrupt.Interrupted`.

    Seed the generators before, as ever: what precedes a loop is computed again. The same calls in the same order find
    their files. Files are read with ``weights_only=True``: nothing in them is executed.

    :param folder: for the files
    :param save_freq: iterations between two checkpoints
    :param resume: go on from what is in the folder; otherwise it is removed
    :raises ValueError: if ``save_freq`` is below 1
    """

    def __init__(self, folder: str | Path, save_freq: int = 500, resume: bool = False) -> None:
        if save_freq < 1:
            raise ValueError(f"save_freq must be at least 1, found {save_freq}")
        self.folder, self.save_freq = Path(folder), save_freq
        self._uses: Counter[str] = Counter()
        if not resume:
            for file in self.folder.glob("*.checkpoint"):
                file.unlink()

    def file(self, name: str) -> Path:
        """
        :param name: of a loop; the second loop of a name has a file of its own, too
        """
        slug = re.sub(r"\W+", "_", name)
        self._uses[slug] += 1
        return self.folder / f"{slug}_{self._uses[slug]}.checkpoint"

    def save(self, path: Path, iteration: int, n_iterations: int, parts: Mapping[str, Stateful]) -> None:
        """
        :param path: from :meth:`file`
        :param iteration: iterations that are done
        :param n_iterations: of the whole loop
        :param parts: whatever changes in the loop
        """
        states = {name: part.state_dict() for name, part in parts.items()}
        content = dict(iteration=iteration, n_iterations=n_iterations, rng=rng_state(), parts=states)
        with atomic_file(path, keep_previous=True) as file:
            th.save(content, file)

    def load(self, path: Path, n_iterations: int, parts: Mapping[str, Stateful]) -> int:
        """
        Takes over the newest state, if there is one.

        :param path: from :meth:`file`
        :param n_iterations: of the whole loop
        :param parts: as they were saved
        :return: iterations that are done
        :raises ValueError: if the file cannot be read or is of another run
        """
        found = newest_readable(path)
        if found is None:
            return 0
        content = load_data(found)
        if content["n_iterations"] != n_iterations:
            was = content["n_iterations"]
            raise ValueError(f"{found} is of a run of {was} iterations, but this one has {n_iterations}: start it anew")
        if content["parts"].keys() != parts.keys():
            raise ValueError(f"{found} holds {sorted(content['parts'])}, but this run needs {sorted(parts)}: start it anew")
        for name, part in parts.items():
            try:
                part.load_state_dict(content["parts"][name])
            except (RuntimeError, ValueError, LookupError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{found} does not fit this run, its {name!r} is another one: {reason}") from error
        set_rng_state(content["rng"])
        return content["iteration"]

    def once(self, name: str, cls: type[Result], make: Callable[[], Result]) -> Result:
        """
        A result that takes long: computed the first time, read from its file after a resume.

        :param name: of its file
        :param cls: a dataclass of arrays, tensors, numbers, strings, and dataclasses of numbers and strings
        :param make: computes it
        """
        path = self.file(name)
        found = newest_readable(path)
        if found is not None:
            content = load_data(found)
            set_rng_state(content["rng"])
            types = get_type_hints(cls)
            return cls(**{name: _unpacked(types[name], *value) for name, value in content["result"].items()})
        result = make()
        packed = {field.name: _packed(getattr(result, field.name)) for field in fields(result)}  # type: ignore[arg-type]
        with atomic_file(path) as file:
            th.save(dict(result=packed, rng=rng_state()), file)
        return result


def _packed(value: Any) -> tuple[str, Any]:
    """What torch reads again without running code: it knows neither NumPy's arrays nor dataclasses."""
    if isinstance(value, np.ndarray):
        return "array", th.from_numpy(value.copy())
    return ("dataclass", asdict(value)) if is_dataclass(value) and not isinstance(value, type) else ("plain", value)


def _unpacked(kind: Any, packed_as: str, value: Any) -> Any:
    if packed_as == "array":
        return value.numpy()
    return kind(**value) if packed_as == "dataclass" else value
