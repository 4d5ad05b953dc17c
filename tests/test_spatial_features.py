"""Features of poses and positions against hand-computed ones, signs of quaternions, layouts that do not fit, files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from scipy.spatial.transform import Rotation

from sb3_dsrl import FlowPolicy, StateEncoder, create_flow, load_demos, state_layout, train_flow
from sb3_dsrl.policies.spatial_features import SpatialFeatures, StateLayout, rotation_matrices
from sb3_dsrl.stage0.demos import DemoError
from tests.demo_files import scripted_episode, write_demos
from tests.envs import tiny_flow
from tests.stage0 import SMALL

LAYOUT: StateLayout = [
    ("agent/qpos", 2),
    ("extra/tcp_pose", 7),
    ("extra/goal_pos", 3),
    ("extra/obj_pose", 7),
    ("extra/tcp_to_obj_pos", 3),
    ("extra/pos", 1),  # neither a position nor a pose: of another size
    ("extra/pose", 3),
]
D = 26


def states(n: int = 40) -> th.Tensor:
    rng = np.random.default_rng(0)
    found = rng.standard_normal((n, D)) * 0.1
    for at in (5, 15):
        q = rng.standard_normal((n, 4))
        found[:, at : at + 4] = q / np.linalg.norm(q, axis=1, keepdims=True)
    return th.from_numpy(found).float()


def by_hand(state: np.ndarray, scales: tuple[float, ...] = (0.05, 0.01)) -> np.ndarray:
    """Of one frame, pair by pair, with SciPy's rotations."""
    tcp, goal, obj, offset = state[2:5], state[9:12], state[12:15], state[19:22]
    turn = {
        name: Rotation.from_quat(np.roll(state[at : at + 4], -1)).as_matrix()  # SciPy has w last
        for name, at in (("tcp", 5), ("obj", 15))
    }
    pairs = [obj - tcp, goal - tcp, goal - obj]  # poses come before positions
    from_first = [turn["tcp"].T @ pairs[0], turn["tcp"].T @ pairs[1], turn["obj"].T @ pairs[2]]
    from_second = [turn["obj"].T @ pairs[0]]
    differences = [*pairs, *from_first, *from_second]
    rotations = [turn["tcp"], turn["obj"], turn["tcp"].T @ turn["obj"]]
    kept = np.delete(state, [*range(5, 9), *range(15, 19)])
    near = np.concatenate([*differences, offset])
    columns = [rotation[:, :2].ravel() for rotation in rotations]
    return np.concatenate([kept, *differences, *columns, *(np.tanh(near / scale) for scale in scales)])


@pytest.mark.parametrize("scales", [(0.05, 0.01), (0.1,), ()])
def test_features_by_hand(scales: tuple[float, ...]) -> None:
    frames, features = states(), SpatialFeatures(LAYOUT, scales)
    found = features(frames)
    assert found.shape == (40, features.out_dim) and features.min_std.shape == (features.out_dim,)
    np.testing.assert_allclose(found, [by_hand(frame, scales) for frame in frames.double().numpy()], atol=1e-5)
    for i in range(3):  # rows are independent
        th.testing.assert_close(features(frames[i : i + 1])[0], found[i])


def test_rotation_matrices() -> None:
    half = 0.5**0.5
    about_z = th.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    th.testing.assert_close(rotation_matrices(th.tensor([[half, 0.0, 0.0, half]])), about_z)
    th.testing.assert_close(rotation_matrices(th.tensor([[3.0, 0.0, 0.0, 3.0]])), about_z)  # of any length
    assert rotation_matrices(th.zeros(1, 4)).isfinite().all()


def test_sign_of_a_quaternion_and_moving_everything_change_nothing() -> None:
    frames, features = states(), SpatialFeatures(LAYOUT)
    flipped = frames.clone()
    flipped[::2, 5:9] *= -1
    flipped[:, 15:19] *= -1
    assert th.equal(features(flipped), features(frames))
    moved = frames.clone()
    for at in (2, 9, 12):
        moved[:, at : at + 3] += th.tensor([0.3, -0.2, 0.1])
    kept = len(features.kept)  # absolute positions are among these
    th.testing.assert_close(features(moved)[:, kept:], features(frames)[:, kept:], atol=1e-4, rtol=1e-4)


def test_a_millimetre_is_seen() -> None:
    frames, features = states(2), SpatialFeatures(LAYOUT)
    frames[1] = frames[0]
    frames[:, 12:15] = frames[:, 2:5]  # the object is where the gripper is ...
    frames[1, 12] += 1e-3  # ... to a millimetre
    encoder = StateEncoder(D, 1, features=features)
    encoder.fit(states(400))
    plain = StateEncoder(D, 1)
    plain.fit(states(400))
    step, plain_step = (e(frames[:, None]).diff(dim=0).abs().max() for e in (encoder, plain))
    assert plain_step < 0.015 and step > 0.09


@pytest.mark.parametrize("layout", [[("agent/qpos", 4)], [("extra/obj_to_goal_pos", 3), ("agent/qvel", 1)]])
def test_layouts_without_poses(layout: StateLayout) -> None:
    features, frames = SpatialFeatures(layout), th.randn(5, 4)
    near = frames[:, :3] if len(layout) == 2 else frames[:, :0]
    th.testing.assert_close(features(frames), th.cat([frames, (near / 0.05).tanh(), (near / 0.01).tanh()], dim=1))


# In an encoder


def test_encoder_normalises_features_and_keeps_what_does_not_move_small() -> None:
    encoder, frames = StateEncoder(D, 2, features=SpatialFeatures(LAYOUT)), states()
    assert encoder.needs_fit
    frames[:, 15:19] = th.tensor([1.0, 0.0, 0.0, 0.0])  # never turned in the demos
    encoder.fit(frames)
    assert encoder.features is not None and not encoder.needs_fit
    made = encoder.features(frames)
    th.testing.assert_close(encoder.mean, made.mean(dim=0))
    std = made.std(dim=0, unbiased=False)
    th.testing.assert_close(encoder.std, th.maximum(std, encoder.features.min_std))
    assert (std < 1e-2).any() and sorted(set(encoder.features.min_std.tolist())) == pytest.approx([0.01, 0.1])
    obs = th.stack([frames, frames.roll(1, 0)], dim=1)
    expected = [(encoder.features(obs[:, i]) - encoder.mean) / encoder.std for i in range(2)]
    th.testing.assert_close(encoder(obs), th.cat(expected, dim=1))


def test_it_travels_with_the_flow(tmp_path: Path) -> None:
    flow = tiny_flow(D, state_layout=LAYOUT)
    flow.encoder.fit(states())
    flow.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["encoder"]["features"]
    assert saved == {"class": "SpatialFeatures", "layout": [list(part) for part in LAYOUT], "scales": [0.05, 0.01]}
    loaded = FlowPolicy.from_pretrained(tmp_path)
    obs = states(10).reshape(5, 2, D)
    assert th.equal(loaded.encode(obs), flow.encode(obs)) and loaded.fingerprint() == flow.fingerprint()
    assert loaded.obs_shapes == (D,) and loaded.cond_dim == flow.cond_dim > 2 * D
    assert "features" not in tiny_flow(D).encoder.config  # config.json of others is as it was


# From demos to a flow


def episode(seed: int, dim: int = D) -> dict[str, Any]:
    made = scripted_episode(8, dim, seed=seed)
    made["obs"][:] = states()[:9, :dim]
    return made


def with_layout(path: Path, layout: Any) -> Path:
    write_demos(path, [episode(0), episode(1)])
    meta = path.with_suffix(".json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(state_layout=layout)))
    return path


def test_demos_that_say_their_layout_make_features(tmp_path: Path) -> None:
    path = with_layout(tmp_path / "demos.h5", LAYOUT)
    assert load_demos(path).state_layout == LAYOUT
    flow = train_flow(path, n_iterations=2, pred_horizon=2, act_horizon=1, **SMALL)
    assert isinstance(flow.encoder, StateEncoder) and flow.encoder.features is not None
    plain = create_flow(path, spatial_features=False, pred_horizon=2, act_horizon=1, **SMALL)
    assert (flow.cond_dim, plain.cond_dim) == (flow.encoder.features.out_dim, D)
    silent = write_demos(tmp_path / "silent.h5", [episode(0), episode(1)])
    assert create_flow(silent, pred_horizon=2, act_horizon=1, **SMALL).cond_dim == D
    told = create_flow(silent, state_layout=LAYOUT, pred_horizon=2, act_horizon=1, **SMALL)
    assert told.cond_dim == flow.cond_dim and th.equal(told.encoder.mean, flow.encoder.mean)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (LAYOUT[:-1], r"'state_layout' does not fit observations of 26 dimensions: agent/qpos 2, .* \(23 in all\)"),
        ([["agent/qpos", D + 1], ["extra/obj_pose", -1]], "'state_layout' does not fit observations of 26"),
        ({"agent/qpos": D}, r"'state_layout' is \{'agent/qpos': 26\}, expected a list of \[name, size\]"),
        (7, r"'state_layout' is 7, expected a list of \[name, size\]"),
    ],
)
def test_wrong_layouts_in_a_file(tmp_path: Path, layout: Any, sentence: str) -> None:
    with pytest.raises(DemoError, match=rf"demos.json: {sentence}"):
        load_demos(with_layout(tmp_path / "demos.h5", layout))


def test_wrong_layouts_as_arguments(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "demos.h5", [episode(0), episode(1)])
    turned = [LAYOUT[0], *LAYOUT[2:4], LAYOUT[1], *LAYOUT[4:]]  # the same size in all
    images = dict(rgb=(8, 8, 3))
    for make, sentence in (
        (
            lambda: create_flow(path, state_layout=LAYOUT[1:], **SMALL),
            r"layout of the state does not fit observations of 26 dimensions: extra/tcp_pose 7, .* \(24 in all\)",
        ),
        (
            lambda: create_flow(path, state_layout=turned, pred_horizon=2, act_horizon=1, **SMALL),
            r"does not fit the demos: extra/obj_pose should end in quaternions of length 1, found",
        ),
        (
            lambda: create_flow(path, spatial_features=False, state_layout=LAYOUT, **SMALL),
            "state_layout does nothing with spatial_features=False",
        ),
        (
            lambda: FlowPolicy.create(D, 2, image_shapes=images, state_layout=LAYOUT),
            "there are images: spatial features are of flat observations",
        ),
        (lambda: SpatialFeatures([("extra/obj_pose", 0)]), "must be positive, found extra/obj_pose 0"),
        (lambda: SpatialFeatures(LAYOUT, [0.0]), r"must be positive, found .* and \[0.0\]"),
        (lambda: state_layout("CartPole-v1"), "'CartPole-v1' is not a ManiSkill environment"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_layout_of_a_task_is_that_of_its_demos() -> None:
    """The bundled demos were recorded in ``obs_mode="state"``; their quaternions lie where the layout says."""
    demos = load_demos(Path(__file__).parent.parent / "examples" / "demos" / "PushCube-v1.h5", 3)
    before = th.get_rng_state()
    layout = state_layout(demos.env_id, demos.control_mode)
    assert th.equal(th.get_rng_state(), before)
    assert list(layout) == [
        ("agent/qpos", 9),
        ("agent/qvel", 9),
        ("extra/tcp_pose", 7),
        ("extra/goal_pos", 3),
        ("extra/obj_pose", 7),
    ]
    flow = create_flow(demos, state_layout=layout, pred_horizon=2, act_horizon=1, **SMALL)
    assert flow.encode(demos.frames()[:, None]).isfinite().all()
    target = state_layout("PushCube-v1", "pd_joint_target_delta_pos")  # a controller with a state of its own
    assert sum(size for _, size in target) > 35
