"""Folders of flows that are damaged, changed, or no flows at all."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from safetensors.torch import load_file, save_file

from sb3_dsrl import FlowPolicy
from sb3_dsrl.policies.diffusion import DiffusionPolicy
from tests.envs import tiny_flow
from tests.faults.case import Case
from tests.faults.demo_files import flip

Change = Callable[[Path], Any]
INVALID = r"flow does not hold a valid FlowPolicy: .*"


def unsigned(folder: Path) -> Path:
    """Takes the checksum out of config.json, as it is in a folder that somebody changed on purpose."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(change: Change, signed: bool = False) -> Change:
    """Saves a flow, changes the folder and loads it."""

    def play(folder: Path) -> None:
        flow = folder / "flow"
        tiny_flow().save_pretrained(flow)
        change(flow if signed else unsigned(flow))
        FlowPolicy.from_pretrained(flow)

    return play


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def tensors(change: Callable[[dict[str, th.Tensor]], Any]) -> Change:
    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return loaded(edit)


def header(edit: Callable[[dict[str, Any]], Any], length: int | None = None, signed: bool = False) -> Change:
    """Changes what the header of the weights says."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        about = json.loads(content[8 : 8 + size])
        edit(about)
        text = json.dumps(about).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])

    return loaded(change, signed)


def lie(key: str, signed: bool = False, **changes: Any) -> Change:
    return header(lambda about: about[key].update(changes), signed=signed)


def network(name: str) -> Change:
    def change(folder: Path) -> None:
        net = json.loads((folder / "config.json").read_text())["net"]
        config(net=net | {"class": name})(folder)

    return loaded(change)


def other_class(folder: Path) -> None:
    flow = tiny_flow(act_horizon=2)
    flow.save_pretrained(folder / "flow")
    DiffusionPolicy.from_pretrained(folder / "flow")


CASES = [
    *(
        Case(
            f"no {name}",
            loaded(lambda folder, name=name: (folder / name).unlink()),
            rf"flow holds no {name}: expected a folder written by FlowPolicy.save_pretrained",
            FileNotFoundError,
        )
        for name in ("config.json", "model.safetensors")
    ),
    *(
        Case(
            f"no folder: {name}",
            lambda folder, name=name: FlowPolicy.from_pretrained(folder / name),
            rf"{name} is neither a folder written by FlowPolicy.save_pretrained nor a model on the Hugging Face hub",
            FileNotFoundError,
        )
        for name in ("no/such/folder", "not a repository")
    ),
    Case(
        "a file in place of the folder",
        lambda folder: ((folder / "file.pt").touch(), FlowPolicy.from_pretrained(folder / "file.pt")),
        r"file.pt is neither a folder written by FlowPolicy.save_pretrained nor a model on the Hugging Face hub",
        FileNotFoundError,
    ),
    Case("config.json that is no JSON", loaded(lambda folder: (folder / "config.json").write_text("{ not this")), INVALID),
    Case("config.json that is a list", loaded(lambda folder: (folder / "config.json").write_text("[]")), INVALID),
    Case("a value of config.json changed", loaded(config(gamma=0.9), signed=True), INVALID + "was changed after it was saved"),
    Case(
        "a bit of the weights flipped",
        loaded(lambda folder: flip(folder / "model.safetensors", 5000), signed=True),
        INVALID + r"was changed after it was saved \(sha256\)",
    ),
    Case("unknown network", network("NoSuchNet"), r"names the network class 'NoSuchNet', which is unknown; import the module"),
    Case("module in place of a network", network("os"), r"names the network class 'os', which is unknown; import the module"),
    Case("saved by another class", other_class, r"it was saved by FlowPolicy: load it with FlowPolicy.from_pretrained"),
    Case("act_horizon > pred_horizon", loaded(config(act_horizon=5)), INVALID + r"act_horizon must lie in 1..4 \(pred_horiz"),
    Case(
        "negative gamma", loaded(config(gamma=-0.9)), INVALID + r"gamma is the discount per env step and must lie in \(0, 1\]"
    ),
    Case("text as act_horizon", loaded(config(act_horizon="3")), INVALID),
    Case("weights cut short", loaded(lambda folder: cut(folder / "model.safetensors")), INVALID),
    Case("weights that are text", loaded(lambda folder: (folder / "model.safetensors").write_text("{ not this")), INVALID),
    Case("tensor missing", tensors(lambda found: found.pop("encoder.mean")), INVALID + r'Missing key.*"encoder.mean"'),
    Case("tensor of the critic missing", tensors(lambda found: found.pop("critic.net.0.bias")), INVALID + "Missing key"),
    Case("tensor too many", tensors(lambda found: found.update(surplus=th.zeros(1))), INVALID + 'Unexpected key.*"surplus"'),
    Case("tensor of another shape", tensors(lambda found: found.update({"encoder.mean": th.zeros(4)})), INVALID + "size mism"),
    Case("header that claims an exabyte", header(lambda about: None, length=1 << 60), INVALID + "[Hh]eader"),
    Case("header that is longer than the file", header(lambda about: None, length=1 << 20), INVALID + "[Hh]eader"),
    Case("header with offsets beyond the file", lie("encoder.mean", data_offsets=[0, 1 << 40]), INVALID),
    Case("header with another shape", lie("encoder.mean", shape=[4]), INVALID),
    Case("header with a negative shape", lie("encoder.mean", shape=[-3]), INVALID),
    Case("header with an unknown type", lie("encoder.mean", dtype="F33"), INVALID),
    Case("header with another type of that size", lie("encoder.mean", True, dtype="I32"), INVALID + "was changed"),
]


def cut(path: Path) -> None:
    """Leaves half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
