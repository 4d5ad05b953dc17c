"""Attempts in worker processes, block by block. Each block leaves a file, so that an interrupted run goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from io import BytesIO
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import h5py
import torch as th

from sb3_dsrl.experts.recipe import Attempt, Demonstrator, DemoRecipe
from sb3_dsrl.utils.checkpoint import atomic_file

#: Attempts that are made one after the other in a scene that was built for them. PhysX keeps caches over resets, so that an
#: attempt depends, in the last bits, on those before it in its block; a new scene for each would take longer than they do.
BLOCK = 8
LEVEL = 4  # of gzip
ABOUT = "about"  # attribute of an attempt: JSON


@dataclass(frozen=True)
class Part:
    """
    What the file of a block says about an attempt.

    :param path: the file
    :param name: of its group
    :param success: whether the episode ended in success
    :param length: env steps; 0 if there is no episode to keep
    :param complaint: what went wrong
    """

    path: Path
    name: str
    success: bool
    length: int
    complaint: str


def make_demonstrator(recipe: DemoRecipe) -> Demonstrator:
    """
    :param recipe: whose ``expert`` is decided
    """
    th.set_num_threads(1)  # one small env: more threads only wait for each other
    if recipe.expert == "scripted":
        from sb3_dsrl.experts.scripted import Scripted

        return Scripted(recipe)
    from sb3_dsrl.experts.planner import Planned

    return Planned(recipe)


def open_parts(folder: Path, recipe: DemoRecipe) -> None:
    """
    Makes the folder of the parts, or goes on with the one that is there.

    :param folder: of the parts
    :param recipe: of the attempts
    :raises ValueError: if the parts are of another recipe
    """
    path, wanted = folder / "recipe.json", asdict(recipe)
    if path.is_file():
        found = json.loads(path.read_text())
        if found != wanted:
            names = [name for name in wanted if found.get(name) != wanted[name]]
            flags = ", ".join(f"--{name.replace('_', '-')} {found.get(name)}" for name in names)
            raise ValueError(
                f"{folder} holds attempts of an interrupted run with {flags}; give the same flags to go on, or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(json.dumps(wanted).encode())


def run_attempts(recipe: DemoRecipe, folder: Path, n_attempts: int, workers: int) -> Generator[Part, None, None]:
    """
    Makes the attempts whose files are not there yet, and yields all in their order. A consumer that has had enough closes the
    iterator.

    :param recipe: of the attempts
    :param folder: of the parts
    :param n_attempts: at most
    :param workers: processes; 1 is this one
    """
    paths = [folder / f"{i:06d}.h5" for i in range(-(-n_attempts // BLOCK))]
    blocks = in_this_process(recipe, paths) if workers == 1 else in_workers(recipe, paths, workers)
    with closing(blocks):
        for path in blocks:
            yield from read_parts(path, n_attempts)


def in_this_process(recipe: DemoRecipe, paths: list[Path]) -> Generator[Path, None, None]:
    """
    :param recipe: of the attempts
    :param paths: of the blocks; those that are there are not made again
    """
    demonstrator = None
    for i, path in enumerate(paths):
        if not path.is_file():
            demonstrator = demonstrator or make_demonstrator(recipe)
            make_block(demonstrator, recipe, path, i, lambda: False)
        yield path


def in_workers(recipe: DemoRecipe, paths: list[Path], workers: int) -> Generator[Path, None, None]:
    """
    :param recipe: of the attempts
    :param paths: of the blocks; those that are there are not made again
    :param workers: processes
    """
    # The fork server imports ManiSkill once, so that workers start in a moment.
    multiprocessing.set_forkserver_preload(["sb3_dsrl.envs.maniskill"])
    context = multiprocessing.get_context("forkserver")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(recipe, stop))
    ahead: deque[tuple[Path, Future[None] | None]] = deque()
    try:
        for i, path in enumerate(paths):
            ahead.append((path, None if path.is_file() else pool.submit(worker_block, path, i)))
            while len(ahead) == 2 * workers or (ahead and i + 1 == len(paths)):
                path, future = ahead.popleft()
                if future is not None:
                    future.result()
                yield path
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: tuple[Demonstrator, DemoRecipe, Event] | None = None  # of this process, if it is one


def start_worker(recipe: DemoRecipe, stop: Event) -> None:
    """
    Makes this process a worker: it leaves Ctrl-C to the main process, and ends when that one is gone.

    :param recipe: of the attempts
    :param stop: set when nothing more is needed
    """
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    assert main is not None
    threading.Thread(target=lambda: (wait([main.sentinel]), os._exit(1)), daemon=True).start()
    _worker = make_demonstrator(recipe), recipe, stop


def worker_block(path: Path, index: int) -> None:
    """
    :param path: of the block
    :param index: of the block
    """
    assert _worker is not None
    demonstrator, recipe, stop = _worker
    make_block(demonstrator, recipe, path, index, stop.is_set)


def make_block(demonstrator: Demonstrator, recipe: DemoRecipe, path: Path, index: int, stopped: Callable[[], bool]) -> None:
    """
    Makes the attempts of a block; its file is complete or not there.

    :param demonstrator: makes them
    :param recipe: of the attempts
    :param path: of the file
    :param index: of the block
    :param stopped: whether to leave it
    """
    demonstrator.rebuild()
    content = BytesIO()
    with h5py.File(content, "w", libver="latest") as file:
        for i in range(index * BLOCK, (index + 1) * BLOCK):
            if stopped():
                return
            write_attempt(
                file.create_group(str(i), track_order=True), demonstrator.attempt(recipe.seed + i), recipe.keep_failures
            )
    with atomic_file(path) as whole:
        whole.write(content.getvalue())


def write_attempt(group: h5py.Group, attempt: Attempt, keep_failures: bool) -> None:
    """
    :param group: where to write
    :param attempt: what to write
    :param keep_failures: keep the episode of an attempt without success
    """
    arrays = attempt.arrays if attempt.success or keep_failures else None
    about = dict(success=attempt.success, complaint=attempt.complaint, length=0 if arrays is None else len(arrays["actions"]))
    if arrays is not None:
        about |= dict(episode=attempt.episode, file=attempt.file)
        write_arrays(group, arrays)
    group.attrs[ABOUT] = json.dumps(about)


def write_arrays(group: h5py.Group, arrays: dict[str, Any]) -> None:
    """
    :param group: where to write; groups keep the order of their keys, as an env flattens them in it
    :param arrays: nested dicts of arrays
    """
    for key, value in arrays.items():
        if isinstance(value, dict):
            write_arrays(group.create_group(key, track_order=True), value)
        else:
            packed = (
                dict(compression="gzip", compression_opts=LEVEL, shuffle=True, chunks=value.shape) if value.ndim > 1 else {}
            )
            group.create_dataset(key, data=value, **packed)


def read_parts(path: Path, n_attempts: int) -> list[Part]:
    """
    :param path: of a block
    :param n_attempts: of all blocks; the last one may hold more
    """
    with h5py.File(path, "r") as file:
        names = sorted((name for name in file if int(name) < n_attempts), key=int)
        abouts = [json.loads(file[name].attrs[ABOUT]) for name in names]
    keys = ("success", "length", "complaint")
    return [Part(path, name, **{key: about[key] for key in keys}) for name, about in zip(names, abouts, strict=True)]


def join_parts(parts: list[Part], path: Path, about: dict[str, Any]) -> None:
    """
    Writes the two files of a trajectory, as ``RecordEpisode`` does.

    :param parts: of the episodes, at least one
    :param path: the ``.h5`` file; the ``.json`` goes beside it
    :param about: further entries of the JSON
    """
    episodes, common = [], {}
    with h5py.File(path, "w", libver="latest") as file:
        for i, part in enumerate(parts):
            with h5py.File(part.path, "r") as source:
                found = json.loads(source[part.name].attrs[ABOUT])
                source.copy(part.name, file, f"traj_{i}")
            episodes.append(dict(episode_id=i) | found["episode"])
            common = found["file"]
            attributes = file[f"traj_{i}"].attrs
            del attributes[ABOUT]
            if "style" in episodes[-1]:
                attributes["style"] = episodes[-1]["style"]
    with closing(path.with_suffix(".json").open("w")) as text:
        json.dump(common | dict(episodes=episodes) | about, text, indent=2)
