"""Is a file still what was written, and is it only data? Checksums of demos and checkpoints; nothing in a file is executed."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch as th


def sha256(path: Path, prefix: bytes = b"") -> str:
    """
    :param path: file
    :param prefix: bytes that are hashed before its contents
    :return: hexadecimal digits
    """
    digest = hashlib.sha256(prefix)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def config_sha256(config: Mapping[str, Any], weights: Path) -> str:
    """
    Of configuration and weights together: safetensors files have no checksum, and every key of the first matters, too.

    :param config: what ``config.json`` holds, with or without its key "sha256"
    :param weights: file beside it
    """
    known = {key: value for key, value in config.items() if key != "sha256"}
    return sha256(weights, json.dumps(known, sort_keys=True).encode())


def check_config(folder: Path, weights: str) -> None:
    """
    :param folder: with a ``config.json``; without a key "sha256" nothing is checked
    :param weights: name of the file beside it
    :raises ValueError: if one of the two is not what was saved
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "sha256" in config and config["sha256"] != config_sha256(config, folder / weights):
        raise ValueError(
            f"config.json or {weights} is damaged or was changed after it was saved (sha256); if it was changed on purpose, "
            f"remove the key 'sha256' from config.json"
        )


def write_sums(sums: Path, files: Iterable[Path]) -> None:
    """
    Writes what ``sha256sum FILES > SUMS`` writes.

    :param sums: file to write
    :param files: files in the same folder
    """
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))


def check_sums(sums: Path, files: Iterable[Path]) -> None:
    """
    Compares files with their checksums. Without a file of checksums nothing is checked.

    :param sums: as ``sha256sum`` writes it
    :param files: files in the same folder
    :raises ValueError: if one of them differs or is not listed
    """
    if not sums.is_file():
        return
    lines = [line.split(maxsplit=1) for line in sums.read_text(errors="replace").splitlines()]
    listed = {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}
    for file in files:
        found, expected = sha256(file), listed.get(file.name)
        if found != expected:
            problem = f"its sha256 is {found[:12]}..., expected {expected[:12]}..." if expected else "it is not listed there"
            raise ValueError(
                f"{file} is not the file that {sums.name} was written for: it is damaged or was replaced ({problem}); "
                f"if it was replaced on purpose, remove {sums.name}"
            )


def check_zip(path: str | Path) -> None:
    """
    Compares the contents of a zip file (a model of SB3, a file of ``torch.save``) with the checksums in it, which torch does
    not look at.

    :param path: the file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is no zip file, damaged or cut short
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a model or checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            # SB3's models hold zip files, and where the directory at the end is gone, one of those would be found instead
            if min((part.header_offset for part in archive.infolist()), default=-1) != 0:
                raise zipfile.BadZipFile("its directory does not fit its contents")
            bad = archive.testzip()
    except Exception as error:  # of many kinds: nearly every field of a damaged header has its own
        raise ValueError(f"{path} is no zip file, or it is damaged or cut short ({one_line(error)})") from error
    if bad is not None:
        raise ValueError(f"{path} is damaged: its part {bad!r} does not fit its checksum")


def load_data(path: str | Path) -> Any:
    """
    Reads a file of ``torch.save``. It may hold tensors, numbers, strings and containers; no code in it is ever executed.

    :param path: the file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is no such file, damaged, or holds something else
    """
    try:
        if zipfile.is_zipfile(path):  # torch before 1.6 wrote files without checksums
            check_zip(path)
        return th.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint") from error
    except Exception as error:  # what a damaged pickle raises depends on the byte
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        about = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # torch's own first line is advice to run the code
        reason = f"it holds {code[1]}" if code else one_line(about or error)
        raise ValueError(
            f"{path} is not a checkpoint of tensors: it is damaged or holds code, which is never run ({reason})"
        ) from error


def one_line(error: Exception | str) -> str:
    """What an exception says, in one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
