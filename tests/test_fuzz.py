"""
Random input: steered envs against the slow reference, loaders against random contents, and files with random damage.

The rule for files: what is loaded equals what was saved, or there is an error of the documented type that names the file.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO

from sb3_dsrl import FlowPolicy, LatentPolicy, ppo_kwargs
from sb3_dsrl.policies.awsc import load_awsc_checkpoint
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.utils.integrity import check_zip, write_sums
from tests.demo_files import scripted_episode, write_demos
from tests.envs import scripted, tiny_flow, vec_steered
from tests.test_awsc import ASKED, Checkpoint
from tests.test_conformance import FORMS, GAMMA, Reference, Script, check_info, noises

QUICK = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ------------------------------------------------------------------------------------- steered envs against the reference

#: Time limit and the steps at which the episodes terminate, for each env.
SCRIPTS = st.lists(
    st.tuples(st.none() | st.integers(1, 13), st.lists(st.integers(1, 16), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=4,
)


def agrees(form: str, scripts: list[Script], act_horizon: int, obs_horizon: int, **kwargs: Any) -> None:
    flow = tiny_flow(pred_horizon=6, act_horizon=act_horizon, obs_horizon=obs_horizon)
    env = FORMS[form](flow, scripts, gamma=GAMMA, **kwargs)
    references = [Reference(script, flow, GAMMA, **kwargs) for script in scripts]
    try:
        np.testing.assert_allclose(env.reset(), [reference.reset() for reference in references], atol=1e-5)
        for w in noises(8, env):
            obs, rewards, dones, infos = env.step(w)
            for i, reference in enumerate(references):
                expected = reference.step(w[i])
                np.testing.assert_allclose(obs[i], expected.obs, atol=1e-4)
                assert rewards[i] == pytest.approx(expected.reward, abs=1e-4)
                assert dones[i] == expected.done
                check_info(infos[i], expected.info, 1e-4)
                if expected.done:
                    np.testing.assert_allclose(infos[i]["terminal_observation"], expected.terminal, atol=1e-4)
    finally:
        env.close()


HORIZONS = dict(
    scripts=SCRIPTS,
    act_horizon=st.integers(1, 6),
    obs_horizon=st.integers(1, 3),
    ignore_terminations=st.booleans(),
    reward_scale=st.sampled_from([1.0, 0.5]),
    residual_scale=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=40, **QUICK)
@given(form=st.sampled_from(["gym form", "vec form", "batched"]), **HORIZONS)
def test_steered_envs(form: str, **kwargs: Any) -> None:
    agrees(form, **kwargs)


@settings(max_examples=2, **QUICK)
@given(**HORIZONS)
def test_steered_envs_in_workers(**kwargs: Any) -> None:
    agrees("worker processes", **kwargs)


# ---------------------------------------------------------------------------------------- loaders against random contents

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def filled(shape: tuple[int, ...], dtype: str, value: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN as an integer
        return np.full(shape, value).astype(dtype)


ARRAYS = st.builds(
    filled,
    st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple),
    st.sampled_from(["f4", "f8", "f2", "i4", "u1", "?", "c8", "S3"]),
    st.sampled_from([0, 1, 1.5, -1, np.nan, np.inf]),
)


def same_demos(found: Demos, expected: Demos) -> bool:
    about = [(d.env_id, d.obs_mode, d.control_mode, d.reward_mode, len(d.episodes)) for d in (found, expected)]
    return about[0] == about[1] and all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b)))
        for one, other in zip(found.episodes, expected.episodes, strict=True)
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
        if not hasattr(a, "cameras")
    )


@settings(max_examples=40, **QUICK)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), sizes=st.tuples(st.integers(1, 5), st.integers(1, 4)))
def test_demos_round_trip(tmp_path: Path, lengths: list[int], sizes: tuple[int, int]) -> None:
    episodes = [scripted_episode(length, *sizes, seed=i) for i, length in enumerate(lengths)]
    demos = load_demos(write_demos(tmp_path / "demos.h5", episodes))
    for found, written in zip(demos.episodes, episodes, strict=True):
        for key in ("obs", "actions", "rewards", "terminated", "success"):
            np.testing.assert_array_equal(getattr(found, key), written[key])


@settings(max_examples=120, **QUICK)
@given(key=st.sampled_from(["obs", "actions", "rewards", "terminated", "success"]), value=st.none() | ARRAYS)
def test_demos_with_random_entries(tmp_path: Path, key: str, value: np.ndarray | None) -> None:
    """Another array, or none, in place of one: an error that names it, or an episode that holds these very numbers."""
    episode = scripted_episode(5)
    changed = {name: x for name, x in (episode | {key: value}).items() if x is not None}
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(5), changed])
    try:
        found = getattr(load_demos(path).episodes[1], key)
    except ValueError as error:
        assert str(path) in str(error)
        return
    if value is None:
        assert found is None or (key == "terminated" and not found.any())
    else:
        assert found.shape == episode[key].shape
        np.testing.assert_array_equal(found, value.astype(found.dtype))


@settings(max_examples=100, **QUICK)
@given(where=st.integers(0, 40), value=VALUES)
def test_demos_with_random_json(tmp_path: Path, where: int, value: Any) -> None:
    """Another value at a random place of the JSON."""
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(3)])
    meta = json.loads(path.with_suffix(".json").read_text())
    changed = replaced(meta, where, value)
    path.with_suffix(".json").write_text(json.dumps(changed))
    try:
        demos = load_demos(path)
    except ValueError as error:
        assert str(path.with_suffix("")) in str(error)
        return
    env_info = changed["env_info"]
    assert demos.env_id == env_info["env_id"]
    about = env_info.get("env_kwargs", {})
    assert (demos.obs_mode, demos.reward_mode) == (about.get("obs_mode") or "state", about.get("reward_mode"))


@settings(max_examples=120, **QUICK)
@given(where=st.integers(0, 60), value=VALUES)
def test_flow_with_random_config(tmp_path: Path, where: int, value: Any) -> None:
    """Another value at a random place of config.json: the checksum sees it; without the checksum it is built or refused."""
    folder = tmp_path / "flow"
    tiny_flow().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    changed = replaced(config, where, value)
    (folder / "config.json").write_text(json.dumps(changed))
    unsigned = not (isinstance(changed, dict) and changed.get("sha256") == config["sha256"])
    try:
        FlowPolicy.from_pretrained(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return
    assert unsigned or json.dumps(changed, sort_keys=True) == json.dumps(config, sort_keys=True)
    changed.pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        FlowPolicy.from_pretrained(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


def replaced(content: Any, where: int, value: Any) -> Any:
    """The same with another value at one of its places, counted in depth first."""
    places: list[tuple[Any, Any]] = []

    def visit(item: Any) -> None:
        for key in item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ():
            places.append((item, key))
            visit(item[key])

    visit(content)
    if where >= len(places):
        return value
    owner, key = places[where]
    owner[key] = value
    return content


# ------------------------------------------------------------------------------------------------ files with random damage


@dataclass
class Damaged:
    """
    A kind of file.

    :param file: the one that is damaged
    :param load: loads it
    :param same: whether two things that were loaded are equal
    """

    file: Path
    load: Callable[[], Any]
    same: Callable[[Any, Any], bool]


def same_flow(a: FlowPolicy, b: FlowPolicy) -> bool:
    names = ("act_horizon", "num_steps", "action_offset", "env_id", "obs_mode", "control_mode", "gamma", "reward_scale")
    return same_states(a.state_dict(), b.state_dict()) and all(getattr(a, name) == getattr(b, name) for name in names)


def same_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


def same_policy(a: LatentPolicy, b: LatentPolicy) -> bool:
    arguments = [repr(policy._get_constructor_parameters()) for policy in (a, b)]
    return same_states(a.state_dict(), b.state_dict()) and arguments[0] == arguments[1]


def same_model(a: PPO, b: PPO) -> bool:
    names = ("gamma", "gae_lambda", "n_steps", "batch_size", "n_epochs", "num_timesteps", "ent_coef", "vf_coef")
    return same_policy(a.policy, b.policy) and all(getattr(a, name) == getattr(b, name) for name in names)


def demo_file(folder: Path, suffix: str) -> Damaged:
    """With checksums, as make_demos.py writes them."""
    path = write_demos(folder / "demos.h5", [scripted_episode(5), scripted_episode(3)])
    write_sums(path.with_suffix(".sha256"), [path, path.with_suffix(".json")])
    return Damaged(path.with_suffix(suffix), lambda: load_demos(path), same_demos)


def flow_file(folder: Path, name: str) -> Damaged:
    tiny_flow().save_pretrained(folder / "flow")
    return Damaged(folder / "flow" / name, lambda: FlowPolicy.from_pretrained(folder / "flow"), same_flow)


def ppo(folder: Path) -> PPO:
    env = vec_steered(tiny_flow(), [scripted()])
    return PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4, policy_kwargs=dict(net_arch=[8])))


def policy_file(folder: Path) -> Damaged:
    ppo(folder).policy.save(folder / "stage1.pt")
    return Damaged(folder / "stage1.pt", lambda: LatentPolicy.load(folder / "stage1.pt"), same_policy)


def model_file(folder: Path) -> Damaged:
    path = folder / "model.zip"
    ppo(folder).save(path)

    def load() -> PPO:
        check_zip(path)
        return PPO.load(path)

    return Damaged(path, load, same_model)


def agent_file(folder: Path) -> Damaged:
    path = Checkpoint(folder / "agent.pt").path
    return Damaged(path, lambda: load_awsc_checkpoint(path, **ASKED), same_flow)


#: Random damage of each: 80 times.
KINDS: dict[str, Callable[[Path], Damaged]] = {
    "demos .h5": lambda folder: demo_file(folder, ".h5"),
    "demos .json": lambda folder: demo_file(folder, ".json"),
    "demos .sha256": lambda folder: demo_file(folder, ".sha256"),
    "flow config.json": lambda folder: flow_file(folder, "config.json"),
    "flow model.safetensors": lambda folder: flow_file(folder, "model.safetensors"),
    "latent policy .pt": policy_file,
    "PPO .zip": model_file,
    "agent .pt": agent_file,
}
TIMES = 80


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bytes changed, or the end cut off, or a piece zeroed as after a crash of the file system."""
    kind = rng.integers(4)
    if kind == 0:
        return content[: rng.integers(len(content))]
    changed = bytearray(content)
    if kind == 1:
        start = int(rng.integers(len(content)))
        changed[start : start + 512] = bytes(len(changed[start : start + 512]))
    else:
        for _ in range(rng.integers(1, 9)):
            changed[rng.integers(len(content))] ^= int(rng.integers(1, 256))
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_damage(kind: str, tmp_path: Path) -> None:
    damaged = KINDS[kind](tmp_path)
    intact, content = damaged.load(), damaged.file.read_bytes()
    errors = 0
    for i in range(TIMES):
        rng = np.random.default_rng(i)
        damaged.file.write_bytes(damage(content, rng))
        try:
            found = damaged.load()
        except (ValueError, FileNotFoundError) as error:
            errors += 1
            message = str(error)
            assert damaged.file.name in message or str(damaged.file.parent) in message, f"case {i} does not name the file"
            assert "\n" not in message, f"case {i}: {message}"
        else:
            assert damaged.same(found, intact), f"case {i} was loaded, but it differs"
    assert errors > TIMES // 2  # damage was done indeed


def test_there_are_500_cases() -> None:
    assert len(KINDS) * TIMES >= 500


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_damage_of_demos_without_checksums(compression: str | None, tmp_path: Path) -> None:
    """
    HDF5 as ManiSkill writes it has no checksums, except in what it compresses. What can be promised without a .sha256 beside
    it: demos that are whole in themselves, or an error that names the file.
    """
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(5), scripted_episode(3)])
    if compression:
        with h5py.File(path, "w") as file:
            for i, length in enumerate((5, 3)):
                for key, value in scripted_episode(length).items():
                    file.create_dataset(f"traj_{i}/{key}", data=value, compression=compression)
    content = path.read_bytes()
    outcomes = {"error": 0, "loaded": 0}
    for i in range(TIMES):
        path.write_bytes(damage(content, np.random.default_rng(i)))
        try:
            demos = load_demos(path)
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["error"] += 1
            continue
        outcomes["loaded"] += 1
        for episode in demos.episodes:
            assert len(episode.obs) == len(episode.actions) + 1 and np.isfinite(episode.obs).all()
            assert np.abs(episode.actions).max() <= 1
    assert all(outcomes.values())
