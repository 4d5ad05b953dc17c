"""Demo files that are missing, damaged, or hold what no demo holds."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demo_starts import DemoStarts
from sb3_dsrl.stage0.demos import chunk_transitions
from sb3_dsrl.utils.integrity import write_sums
from tests.demo_files import scripted_episode, write_demos
from tests.faults.case import Case

Change = Callable[[Path], Any]


def loaded(change: Change) -> Change:
    """Writes a good file, changes it and loads it."""

    def play(folder: Path) -> None:
        path = write_demos(folder / "demos.h5", [scripted_episode(4), scripted_episode(5)])
        change(path)
        load_demos(path)

    return play


def episode(**changes: Any) -> Change:
    """Loads a file whose second episode is changed; None takes an entry away."""

    def play(folder: Path) -> None:
        bad = {key: value for key, value in (scripted_episode(5) | changes).items() if value is not None}
        load_demos(write_demos(folder / "demos.h5", [scripted_episode(5), bad]))

    return play


def with_value(key: str, index: Any, value: float) -> Change:
    array = scripted_episode(5)[key].astype(np.float32)
    array[index] = value
    return episode(**{key: array})


def shorter(key: str) -> Change:
    return episode(**{key: scripted_episode(5)[key][:-1]})


def cut(part: float) -> Change:
    return loaded(lambda path: path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)]))


def starting(without: tuple[str, ...] = (), **changes: Any) -> Change:
    """Starts from an episode that is changed, of whose JSON some keys are taken away."""

    def play(folder: Path) -> None:
        path = write_demos(folder / "demos.h5", [scripted_episode(5) | changes])
        meta = json.loads(path.with_suffix(".json").read_text())
        for key in without:
            del meta["episodes"][0][key]
        path.with_suffix(".json").write_text(json.dumps(meta))
        DemoStarts(path)

    return play


def of_state(layout: Any) -> Change:
    def change(path: Path) -> None:
        meta = path.with_suffix(".json")
        meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(state_layout=layout)))

    return loaded(change)


def meta(text: str | bytes) -> Change:
    return loaded(lambda path: path.with_suffix(".json").write_bytes(text if isinstance(text, bytes) else text.encode()))


def changed_meta(change: Callable[[dict[str, Any]], Any]) -> Change:
    def edit(path: Path) -> None:
        content = json.loads(path.with_suffix(".json").read_text())
        change(content)
        path.with_suffix(".json").write_text(json.dumps(content))

    return loaded(edit)


def flip(path: Path, offset: int) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def flip_contents(path: Path) -> None:
    """Flips one bit in the largest part of a zip file, beyond all headers."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    names = path.read_bytes()[part.header_offset + 26 : part.header_offset + 30]
    flip(path, part.header_offset + 30 + sum(struct.unpack("<HH", names)) + part.compress_size // 2)


def flipped(name: str) -> Change:
    def change(path: Path) -> None:
        files = [path, path.with_suffix(".json")]
        write_sums(path.with_suffix(".sha256"), files)
        file = path.with_suffix(name)
        flip(file, file.stat().st_size // 2)

    return loaded(change)


def unlisted(path: Path) -> None:
    write_sums(path.with_suffix(".sha256"), [path])


def damaged_block(folder: Path) -> None:
    path = write_demos(folder / "demos.h5", [{key: x for key, x in scripted_episode(5).items() if key != "actions"}])
    with h5py.File(path, "a") as file:
        data = file["traj_0"].create_dataset("actions", data=scripted_episode(5)["actions"], compression="gzip")
        offset = data.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    load_demos(path)


def dataset_as_episode(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["traj_2"] = np.zeros(3)


def no_rewards(folder: Path) -> None:
    bad = {key: value for key, value in scripted_episode(5).items() if key != "rewards"}
    chunk_transitions(load_demos(write_demos(folder / "demos.h5", [scripted_episode(4), bad])), 1, 2, 0.9, True)


def nan_depth(folder: Path) -> None:
    depth = np.zeros((6, 2, 2, 1), np.float32)
    depth[3] = np.nan
    path = write_demos(folder / "demos.h5", [scripted_episode(5) | dict(obs={"depth": depth})], obs_mode="depth")
    load_demos(path).episodes[0].read_obs()


def replaced_images(folder: Path) -> None:
    images = {"rgb": np.zeros((6, 2, 2, 3), np.uint8)}
    path = write_demos(folder / "demos.h5", [scripted_episode(5) | dict(obs=images)], obs_mode="rgb")
    demos = load_demos(path)
    write_demos(path, [scripted_episode(5)])
    demos.episodes[0].read_obs()


CASES = [
    Case("no .h5", loaded(Path.unlink), r"demos.h5 does not exist; expected the demo file", FileNotFoundError),
    Case(
        ".h5 without .json",
        loaded(lambda path: path.with_suffix(".json").unlink()),
        r"demos.json does not exist; expected the JSON that ManiSkill writes beside the .h5 file",
        FileNotFoundError,
    ),
    *(
        Case(f".h5 cut to {part:.1%}", cut(part), r"demos.h5 cannot be read as HDF5; it is damaged or cut short")
        for part in (0.0, 0.02, 0.5, 0.9, 0.999)
    ),
    Case(
        ".h5 that is text",
        loaded(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")),
        r"demos.h5 cannot be read as HDF5; it is damaged or cut short",
    ),
    Case("block that does not inflate", damaged_block, r"demos.h5 cannot be read as HDF5; it is damaged or cut short"),
    Case("bit flipped in .h5, checksums beside it", flipped(".h5"), r"demos.h5 is not the file that demos.sha256 was written"),
    Case("bit flipped in .json, checksums beside it", flipped(".json"), r"demos.json is not the file that demos.sha256 was"),
    Case("checksums without .json", loaded(unlisted), r"demos.json is not the file .* \(it is not listed there\)"),
    Case(".json cut short", meta('{"env_info": {'), r"demos.json is not valid JSON"),
    Case(".json that is binary", meta(b"\x89HDF\xff\xfe"), r"demos.json is not valid JSON"),
    Case(".json nested too deep", meta("[" * 100_000), r"demos.json is not valid JSON"),
    Case(".json that is a list", meta("[]"), r"demos.json has no key 'env_info'"),
    Case(".json without env_info", meta('{"episodes": []}'), r"demos.json has no key 'env_info'"),
    Case(".json without episodes", meta('{"env_info": {"env_id": "X"}}'), r"demos.json has no key 'episodes'"),
    Case(".json without env id", meta('{"env_info": {}, "episodes": []}'), r"demos.json has no key 'env_info/env_id'"),
    Case(
        ".json with a number as env id",
        changed_meta(lambda content: content["env_info"].update(env_id=3)),
        r"demos.json: 'env_id' is 3, expected a string",
    ),
    Case(
        ".json with a list as env_kwargs",
        changed_meta(lambda content: content["env_info"].update(env_kwargs=[])),
        r"demos.json: 'env_info/env_kwargs' is a list, expected an object",
    ),
    Case(
        ".json with numbers as episodes",
        changed_meta(lambda content: content.update(episodes=[1, 2])),
        r"demos.json: 'episodes' is no list of objects",
    ),
    Case(
        ".json with an object as control mode",
        changed_meta(lambda content: content["episodes"][0].update(control_mode={})),
        r"demos.json: 'control_mode' is \{\}, expected a string",
    ),
    Case(
        "no control mode",
        lambda folder: load_demos(write_demos(folder / "demos.h5", [scripted_episode(3)], None, None)),
        r"demos.json names no control_mode, neither in env_info/env_kwargs nor in the episodes",
    ),
    Case(
        "two control modes",
        lambda folder: load_demos(write_demos(folder / "demos.h5", [scripted_episode(3)] * 2, ["pd_joint_pos", "pd_ee_pose"])),
        r"demos.json mixes control modes \['pd_ee_pose', 'pd_joint_pos'\]; expected one",
    ),
    Case(
        "no episodes", lambda folder: load_demos(write_demos(folder / "demos.h5", [])), r"demos.h5 holds no episodes \(no gr"
    ),
    Case("state_layout of another size", of_state([["qpos", 4]]), r"'state_layout' does not fit observations of 3 dimen"),
    Case(
        "state_layout that is none", of_state([3]), r"demos.json: 'state_layout' is \[3\], expected a list of \[name, size\]"
    ),
    Case("dataset in place of an episode", loaded(dataset_as_episode), r"traj_2 is a dataset, expected the group of an epi"),
    Case("episode without observations", episode(obs=None), r"traj_1 has no 'obs': replay the file with `--obs-mode state`"),
    Case("episode without actions", episode(actions=None), r"traj_1 has no 'actions'"),
    Case(
        "observations as a group without images",
        episode(obs=dict(agent=np.zeros((6, 3)), extra=np.zeros((6, 1)))),
        r"traj_1/obs is a group with keys \['agent', 'extra'\]; expected flat observations",
    ),
    Case("actions as a group", episode(actions=dict(a=np.zeros(3))), r"traj_1/actions holds a group, expected numbers"),
    Case("episode of length 0", episode(**scripted_episode(0)), r"traj_1 has no steps"),
    Case("too few observations", shorter("obs"), r"traj_1/obs has 5 entries, expected 6 for 5 actions"),
    Case("too few actions", shorter("actions"), r"traj_1/obs has 6 entries, expected 5 for 4 actions"),
    Case("too few rewards", shorter("rewards"), r"traj_1/rewards has 4 entries, expected 5 for 5 actions"),
    Case("too few 'terminated'", shorter("terminated"), r"traj_1/terminated has 4 entries, expected 5"),
    Case("too few 'success'", shorter("success"), r"traj_1/success has 4 entries, expected 5"),
    Case("actions with one dimension", episode(actions=np.zeros(5)), r"traj_1/actions has shape \(5,\), expected 2 dimens"),
    Case("observations with three", episode(obs=np.zeros((6, 1, 3))), r"traj_1/obs has shape \(6, 1, 3\), expected 2 dimens"),
    Case("rewards with two", episode(rewards=np.zeros((5, 1))), r"traj_1/rewards has shape \(5, 1\), expected 1 dimension"),
    Case("actions that are text", episode(actions=np.full((5, 2), b"x")), r"traj_1/actions holds values of type \|S1, expec"),
    Case("complex observations", episode(obs=np.zeros((6, 3), complex)), r"traj_1/obs holds values of type complex128, expec"),
    Case("'success' that is text", episode(success=np.full(5, b"yes")), r"traj_1/success holds values of type \|S3, expected"),
    Case("NaN in observations", with_value("obs", (2, 1), np.nan), r"traj_1/obs holds NaN or infinite values"),
    Case("NaN in actions", with_value("actions", (2, 1), np.nan), r"traj_1/actions holds NaN or infinite values"),
    Case("infinite reward", with_value("rewards", 3, np.inf), r"traj_1/rewards holds NaN or infinite values"),
    Case("NaN in 'terminated'", with_value("terminated", 3, np.nan), r"traj_1/terminated holds NaN or infinite values"),
    Case("NaN in depth images", nan_depth, r"demos.h5:/traj_0/obs/depth holds NaN or infinite values"),
    Case(
        "colours that are floats",
        episode(obs={"rgb": np.zeros((6, 2, 2, 3), np.float32)}),
        r"traj_1/obs holds rgb images of type float32, expected uint8",
    ),
    Case(
        "images without height", episode(obs={"rgb": np.zeros((6, 3), np.uint8)}), r"rgb is no stack of rgb images, \(L \+ 1"
    ),
    Case(
        "file replaced while its images are read", replaced_images, r"demos.h5 cannot be read any more; it is damaged or was"
    ),
    Case("actions beyond [-1, 1]", with_value("actions", (0, 0), -1.5), r"traj_1/actions reach 1.5, expected \[-1, 1\]: rep"),
    Case("D differs between episodes", episode(**scripted_episode(5, obs_dim=4)), r"obs have \[3, 4\] dimensions in diff"),
    Case("A differs between episodes", episode(**scripted_episode(5, action_dim=4)), r"actions have \[2, 4\] dimensions in"),
    Case("no rewards, for the critic", no_rewards, r"demos.h5: episode 1 has no 'rewards': record them"),
    Case(
        "more demos than there are",
        lambda folder: load_demos(write_demos(folder / "demos.h5", [scripted_episode(3)]), num_demos=2),
        r"demos.h5 holds 1 episodes, but num_demos=2 were asked for",
    ),
    Case("starts from demos without states", starting(), r"demos.h5:traj_0 has no 'env_states': record the demos with exam"),
    Case(
        "starts from demos with too few states",
        starting(env_states={"actors/cube": np.zeros((3, 13))}),
        r"demos.h5:traj_0/env_states/actors/cube has 3 entries, expected 6",
    ),
    Case(
        "starts from demos without seeds",
        starting(("reset_kwargs",), env_states={"actors/cube": np.zeros((6, 13))}),
        r"demos.json: traj_0 has no 'reset_kwargs' with one 'seed', found None",
    ),
    Case(
        "no demos asked for",
        lambda folder: load_demos(write_demos(folder / "demos.h5", [scripted_episode(3)]), num_demos=0),
        r"num_demos must be at least 1, found 0",
    ),
    Case(
        "another control mode than asked for",
        lambda folder: load_demos(write_demos(folder / "demos.h5", [scripted_episode(3)]), control_mode="pd_ee_delta_pose"),
        r"demos.h5 holds actions for control_mode='pd_joint_delta_pos', expected 'pd_ee_delta_pose': record it with "
        r"`python examples/make_demos.py --control-mode pd_ee_delta_pose`",
    ),
]
