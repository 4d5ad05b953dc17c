"""
Which way of decoding a machine is quickest with.

The first way is the default, and by construction the quickest. Where another one is clearly quicker all the same, it takes the
default's place: each is timed once, at the first decode of about so many noises. Two ways differ in the last bit, so what
was found is kept on disk, and every later process on that machine decodes alike: the first process to write decides.

``SB3_DSRL_DECODE=default`` measures nothing and takes the default; the name of a way takes that one. Nothing is measured
under ``torch.use_deterministic_algorithms(True)``, nor where nothing can be kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch as th

from sb3_dsrl.policies.decoding.loop import Integrate
from sb3_dsrl.policies.networks import VelocityUNet

VARIABLE = "SB3_DSRL_DECODE"

#: The default loses its place to a way that is so many times faster, not to noise in the timing.
CLEARLY = 1.15

#: Seconds after which no further round of timing begins.
BUDGET = 0.15

#: Counts up when the ways change, so that what was measured of older ones is forgotten.
REVISION = 1

#: Seconds that the way of this name takes now.
Timing = Callable[[str], float]

#: What this process has decided, by key.
_DECIDED: dict[str, str] = {}


def choose(net: VelocityUNet, cond: th.Tensor, w: th.Tensor, paths: Mapping[str, Integrate], most: int) -> str:
    """
    :param net: the velocity field
    :param cond: (B, C)
    :param w: noises, (B, M, T, A); the choice is made for the next power of two of B * M
    :param paths: ways to decode; the first is the default
    :param most: noises from which on the time per noise is the same
    :return: the name of one
    :raises ValueError: if ``SB3_DSRL_DECODE`` is none of "auto", "default" and the names
    """
    default = next(iter(paths))
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "default", *paths):
        raise ValueError(f"{VARIABLE} must be one of {', '.join(('auto', 'default', *paths))}, found {wanted!r}")
    if wanted in paths:
        return wanted
    if wanted == "default" or len(paths) == 1 or th.are_deterministic_algorithms_enabled() or not w.numel():
        return default
    bucket = min(1 << (w.shape[0] * w.shape[1] - 1).bit_length(), most)
    key = json.dumps([REVISION, _machine(), th.get_num_threads(), _shape(net), bucket, list(paths)])
    if key not in _DECIDED:
        rows = -(-most // w.shape[1])  # observations that have so many noises
        few = cond[:rows], w[:rows, :most]

        def timing(name: str) -> float:
            start = time.perf_counter()
            paths[name](net, *few, 1)
            return time.perf_counter() - start

        _DECIDED[key] = decide(key, list(paths), timing, cache_folder())
    return _DECIDED[key]


def decide(key: str, names: list[str], timing: Timing, folder: Path | None) -> str:
    """
    What the folder holds for this key; if it holds nothing, measures and keeps the outcome.

    :param key: of machine, network and number of noises
    :param names: of the ways; the first is the default
    :param timing: times a way once
    :param folder: where outcomes are kept; None is nowhere
    :return: one of the names; the default where nothing can be kept
    """
    if folder is None:
        return names[0]
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        known = _read(path, key, names)
        if known is not None:
            return known
        folder.mkdir(parents=True, exist_ok=True)
        # The file is there before anything is measured: no time is lost where it cannot be written.
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp") as file:
            seconds = measure(names, timing)
            text = json.dumps({"key": key, "path": quickest(names, seconds), "seconds": seconds}, indent=2)
            file.write(text + "\n")
            file.flush()
            if path.exists() and _read(path, key, names) is None:
                path.unlink()
            with suppress(FileExistsError):  # another process was first; a replacement would not tell
                os.link(file.name, path)
        return _read(path, key, names) or names[0]
    except OSError:
        return names[0]


def measure(names: list[str], timing: Timing) -> dict[str, float]:
    """
    The least seconds of each way, taking turns, after a round that does not count.

    :param names: of the ways
    :param timing: times a way once
    """
    start, best, turns = time.perf_counter(), dict.fromkeys(names, float("inf")), list(names)
    for name in names:
        timing(name)
    while float("inf") in best.values() or time.perf_counter() - start < BUDGET:
        for name in turns:
            best[name] = min(best[name], timing(name))
        turns = turns[1:] + turns[:1]  # a busy machine stops us at regular intervals
    return best


def quickest(names: list[str], seconds: Mapping[str, float]) -> str:
    """
    :param names: of the ways; the first is the default
    :param seconds: of each
    :return: the default, or a way that is clearly quicker
    """
    best = min(names, key=lambda name: seconds[name])
    return best if seconds[names[0]] >= CLEARLY * seconds[best] else names[0]


def cache_folder() -> Path | None:
    """``sb3_dsrl/decode`` in the user's cache folder, ``XDG_CACHE_HOME`` or ``~/.cache``; None where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sb3_dsrl" / "decode"
    except RuntimeError:
        return None


def _read(path: Path, key: str, names: list[str]) -> str | None:
    """The outcome in a file, None if there is no file or nothing usable in it."""
    try:
        known: Any = json.loads(path.read_bytes())
        if known["key"] == key and known["path"] in names:
            return str(known["path"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    warnings.warn(f"{path} does not hold the outcome of a measurement by sb3_dsrl: it is measured again and replaced")
    return None


def _shape(net: VelocityUNet) -> list[Any]:
    names = ("action_dim", "pred_horizon", "cond_dim", "widths", "kernel_size", "n_groups")
    return [*(net.config[name] for name in names), net.step_embedding.dim]


@lru_cache(maxsize=1)
def _machine() -> list[str]:
    """CPU, what torch uses of it, and torch's version."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:  # not Linux
        pass
    return [model, th.backends.cpu.get_cpu_capability(), str(th.__version__)]
