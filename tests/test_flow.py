"""FlowPolicy: decode against closed form and against Euler, files, fingerprint, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dsrl import EnsembleChunkCritic, FlowPolicy, StateEncoder, VelocityMLP, VelocityUNet, train_flow
from sb3_dsrl.policies.networks import VelocityNet
from sb3_dsrl.utils.devices import get_device
from tests.demo_files import write_demos
from tests.envs import tiny_flow
from tests.toys import LinearVelocity, linear_flow

METADATA = dict(
    num_steps=3,
    action_offset=1,
    env_id="PushCube-v1",
    obs_mode="state",
    control_mode="pd_joint_delta_pos",
    gamma=0.97,
    reward_scale=5.0,
)


# Decoding


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (0.0, 0.4), (-0.9, 0.3), (0.5, -0.2), (-3.0, 0.5)])
def test_decode_of_a_linear_field_has_the_closed_form(n: int, a: float, b: float) -> None:
    w = 0.3 * th.randn(5, 2, 3, generator=th.Generator().manual_seed(0))
    growth = (1 + a / n) ** n  # x <- x + (a x + b) / n, n times
    expected = growth * w + (b / a * (growth - 1) if a else b)
    flow = linear_flow(action_dim=3, horizon=2, a=a, b=b, num_steps=n)
    for num_steps in (n, None):
        th.testing.assert_close(flow.decode(th.zeros(5, 2), w, num_steps), expected.clamp(-1, 1), atol=1e-5, rtol=1e-4)


class RecordingVelocity(VelocityNet):
    """v = 1 everywhere; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(2, 3, 4)
        self.calls: list[tuple[th.Tensor, ...]] = []

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        self.calls.append((x, t, d, cond))
        return th.ones_like(x)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_decode_tells_the_network_its_time_and_step_size(n: int) -> None:
    velocity = RecordingVelocity()
    flow = FlowPolicy(StateEncoder(4, 1), velocity, EnsembleChunkCritic(4, 3, 2, 2, 8), act_horizon=3)
    cond, w = th.randn(5, 4), th.randn(5, 3, 2)
    flow.decode(cond, w, num_steps=n)
    assert len(velocity.calls) == n
    for i, (x, t, d, seen) in enumerate(velocity.calls):
        th.testing.assert_close(x, w + i / n)
        th.testing.assert_close(t, th.full((5,), i / n))
        th.testing.assert_close(d, th.full((5,), 1 / n))
        assert th.equal(seen, cond)


def test_decode_clips_to_the_action_box() -> None:
    w = th.tensor([[[-3.0, -0.5]], [[0.5, 1.5]]])
    assert th.equal(linear_flow().decode(th.zeros(2, 2), w), th.tensor([[[-1.0, -0.5]], [[0.5, 1.0]]]))


def test_intermediate_points_are_not_clipped() -> None:
    w = th.full((1, 1, 2), 4.0)  # halves in each of two steps: 4 -> 2 -> 1, where clipping on the way gives 0.5
    th.testing.assert_close(linear_flow(a=-1.0).decode(th.zeros(1, 2), w, num_steps=2), th.ones(1, 1, 2))


@pytest.mark.parametrize("net", [VelocityMLP, VelocityUNet])
def test_decode_has_gradients_and_rows_are_independent(net: type[VelocityNet]) -> None:
    th.manual_seed(0)
    flow = FlowPolicy.create(3, 2, pred_horizon=4, act_horizon=2, net_class=net).freeze()
    cond, w = th.randn(4, flow.cond_dim), 0.1 * th.randn(4, 4, 2)
    alone = th.cat([flow.decode(cond[i : i + 1], w[i : i + 1], 2) for i in range(4)])
    th.testing.assert_close(flow.decode(cond, w, 2), alone)
    w.requires_grad_(True)
    (gradient,) = th.autograd.grad(flow.decode(cond, w, 2).sum(), w)
    assert (gradient.abs().sum(dim=(1, 2)) > 0).all()


def test_sample_decodes_the_prior() -> None:
    flow = linear_flow(horizon=3)
    th.manual_seed(0)
    obs = np.zeros((20_000, 1, 2), np.float64)
    chunk = flow.sample(obs)
    assert chunk.shape == (20_000, 3, 2)
    w = th.randn(20_000, 3, 2).clamp(-1, 1)
    assert chunk.mean().abs() < 0.01
    assert chunk.std() == pytest.approx(float(w.std()), abs=0.01)
    th.manual_seed(0)
    assert th.equal(flow.sample(obs), chunk)


# A trained shortcut flow


def euler(flow: FlowPolicy, cond: th.Tensor, w: th.Tensor, n: int, d: float) -> th.Tensor:
    """n Euler steps, telling the network ``d`` whatever the step."""
    x = w
    for i in range(n):
        x = x + flow.net(x, th.full((len(w),), i / n), th.full((len(w),), d), cond) / n
    assert flow.action_normalizer is not None
    return (flow.action_normalizer.offset + flow.action_normalizer.scale * x).clamp(-1, 1)


@pytest.fixture(scope="module")
def shortcut_flow(tmp_path_factory: pytest.TempPathFactory) -> FlowPolicy:
    """Trained on episodes that keep to one of four corners, which nothing in the observation tells."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(48):
        corner = 0.6 * rng.choice([-1, 1], 2)
        actions = (corner + 0.1 * rng.standard_normal((12, 2))).clip(-1, 1)
        episodes.append(dict(obs=rng.standard_normal((13, 2)), actions=actions))
    path = write_demos(tmp_path_factory.mktemp("demos") / "corners.h5", episodes, control_mode="pd_joint_pos")
    return train_flow(
        path,
        n_iterations=600,
        batch_size=256,
        learning_rate=5e-3,
        ema_decay=0.98,
        seed=0,
        net_class=VelocityMLP,
        net_kwargs=dict(width=64, n_blocks=2, embed_dim=32),
        obs_horizon=1,
        pred_horizon=2,
        act_horizon=2,
    )


@pytest.fixture(scope="module")
def many(shortcut_flow: FlowPolicy) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Features, noises and their chunks after 64 Euler steps of the instantaneous velocity."""
    generator = th.Generator().manual_seed(1)
    cond, w = th.randn(2000, 2, generator=generator), th.randn(2000, 2, 2, generator=generator)
    return cond, w, euler(shortcut_flow, cond, w, 64, d=0.0)


def relative_distance(chunk: th.Tensor, reference: th.Tensor) -> float:
    """Root mean square distance, in units of the spread over noise."""
    return float((chunk - reference).pow(2).mean().sqrt() / reference.std(dim=0).mean())


def test_trained_flow_has_all_modes(many: tuple[th.Tensor, ...]) -> None:
    chunk = many[2]
    assert (chunk.abs() - 0.6).abs().median() < 0.15
    corners = (chunk[:, 0] > 0).int() @ th.tensor([2, 1], dtype=th.int32)
    assert (th.bincount(corners, minlength=4) / len(chunk)).min() > 0.1
    assert (chunk[:, 0].sign() == chunk[:, 1].sign()).double().mean() > 0.95  # an episode keeps to its corner


@pytest.mark.parametrize(("n", "bound"), [(1, 0.45), (2, 0.35), (4, 0.25), (8, 0.15)])
def test_few_shortcut_steps_reach_where_64_euler_steps_do(
    shortcut_flow: FlowPolicy, many: tuple[th.Tensor, ...], n: int, bound: float
) -> None:
    cond, w, reference = many
    distance = relative_distance(shortcut_flow.decode(cond, w, n), reference)
    assert distance < bound
    other_noise = relative_distance(shortcut_flow.decode(cond, w.roll(1, 0), n), reference)
    assert distance < 0.5 * other_noise  # it is the noise's own chunk, not only a likely one


@pytest.mark.parametrize(("n", "factor"), [(1, 2.0), (2, 1.6)])
def test_step_size_is_what_makes_large_steps_work(
    shortcut_flow: FlowPolicy, many: tuple[th.Tensor, ...], n: int, factor: float
) -> None:
    cond, w, reference = many
    told = relative_distance(shortcut_flow.decode(cond, w, n), reference)
    not_told = relative_distance(euler(shortcut_flow, cond, w, n, d=0.0), reference)
    assert not_told > factor * told


def test_trained_flow_is_frozen_and_complete(shortcut_flow: FlowPolicy) -> None:
    assert not any(parameter.requires_grad for parameter in shortcut_flow.parameters())
    assert not any(module.training for module in shortcut_flow.modules())
    assert (shortcut_flow.env_id, shortcut_flow.control_mode) == ("PushCube-v1", "pd_joint_pos")
    assert (shortcut_flow.encoder.std - 1).abs().max() < 0.2 and not th.equal(shortcut_flow.encoder.std, th.ones(2))


# Files


@pytest.fixture(params=["mlp", "unet", "no critic"])
def policy(request: pytest.FixtureRequest) -> FlowPolicy:
    th.manual_seed(3)
    encoder = StateEncoder(3, 2)
    encoder.fit(3 * th.randn(50, 3) + 1)
    if request.param == "unet":
        velocity: VelocityNet = VelocityUNet(2, 8, 6, widths=(8, 16), n_groups=4, embed_dim=16)
    else:
        velocity = VelocityMLP(2, 8, 6, width=16, n_blocks=1, embed_dim=16)
    critic = None if request.param == "no critic" else EnsembleChunkCritic(6, 5, 2, n_heads=3, width=16)
    return FlowPolicy(encoder, velocity, critic, act_horizon=5, **METADATA).freeze()


def test_round_trip_through_a_folder(policy: FlowPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "flow")
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "flow").iterdir()}
    with th.random.fork_rng(devices=[]):
        th.manual_seed(99)  # nothing may be left as it was drawn
        loaded = FlowPolicy.from_pretrained(tmp_path / "flow")
    for name, expected in METADATA.items():
        assert getattr(loaded, name) == expected, name
        assert type(getattr(loaded, name)) is type(expected), name
    for name in ("act_horizon", "pred_horizon", "obs_horizon", "action_dim", "cond_dim", "noise_shape"):
        assert getattr(loaded, name) == getattr(policy, name), name
    assert type(loaded.net) is type(policy.net)
    assert (loaded.critic is None) == (policy.critic is None)
    state = loaded.state_dict()
    assert state.keys() == policy.state_dict().keys()
    assert all(th.equal(state[key], value) for key, value in policy.state_dict().items())
    assert "encoder.mean" in state and "encoder.std" in state
    obs, w = np.random.default_rng(0).standard_normal((4, 2, 3)), th.randn(4, 8, 2)
    assert th.equal(loaded.decode(loaded.encode(obs), w), policy.decode(policy.encode(obs), w))
    assert loaded.fingerprint() == policy.fingerprint()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


def test_config_is_plain_json(policy: FlowPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["net"]["class"] == type(policy.net).__name__
    assert config["encoder"] == dict(obs_dim=3, obs_horizon=2, normalize=True) | {"class": "StateEncoder"}
    assert (config["control_mode"], config["act_horizon"], config["gamma"]) == ("pd_joint_delta_pos", 5, 0.97)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_flow().save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


# Fingerprint, freezing, horizons


def nudge(get: Callable[[FlowPolicy], th.Tensor]) -> Callable[[FlowPolicy], None]:
    def change(flow: FlowPolicy) -> None:
        get(flow).flatten()[0] += 1e-4

    return change


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda flow: None, False),
        (nudge(lambda flow: flow.net.inlet.weight), True),
        (nudge(lambda flow: flow.net.step_embedding.mlp[0].bias), True),
        (nudge(lambda flow: flow.encoder.mean), True),
        (nudge(lambda flow: flow.encoder.std), True),
        (nudge(lambda flow: flow.critic.net[0].weight), False),
        (lambda flow: setattr(flow, "critic", None), False),
        (lambda flow: setattr(flow, "env_id", "other"), False),
        (lambda flow: setattr(flow, "act_horizon", 2), True),
        (lambda flow: setattr(flow, "action_offset", 1), True),
    ],
    ids=["nothing", "weight", "bias", "mean", "std", "critic", "no critic", "env_id", "act_horizon", "action_offset"],
)
def test_fingerprint(change: Callable[[FlowPolicy], Any], differs: bool) -> None:
    flow = tiny_flow()
    before = flow.fingerprint()
    change(flow)
    assert (flow.fingerprint() != before) == differs
    assert len(before) == 16 and int(before, 16) >= 0


def test_freeze() -> None:
    flow = FlowPolicy.create(3, 2, pred_horizon=4, act_horizon=2, net_class=VelocityMLP)
    assert all(parameter.requires_grad for parameter in flow.parameters())
    assert flow.freeze() is flow
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    assert not any(module.training for module in flow.modules())


@pytest.mark.parametrize(("offset", "act_horizon"), [(0, 3), (1, 3), (2, 2), (0, 4)])
def test_executed_slice(offset: int, act_horizon: int) -> None:
    flow = tiny_flow(act_horizon=act_horizon, action_offset=offset)
    chunk = th.arange(8.0).reshape(1, 4, 2)
    assert flow.executed(chunk)[0, :, 0].tolist() == [2.0 * (offset + i) for i in range(act_horizon)]


def test_networks_must_fit() -> None:
    with pytest.raises(ValueError, match=r"net expects 5 features, but the encoder gives 6"):
        FlowPolicy(StateEncoder(3, 2), VelocityMLP(2, 8, 5))


def test_encode_takes_numpy_and_stacks_normalised_frames() -> None:
    flow = tiny_flow()
    flow.encoder.fit(th.tensor([[0.0, 1.0, 2.0], [2.0, 5.0, 2.0]]))
    cond = flow.encode(np.array([[[1.0, 3.0, 2.0], [2.0, 5.0, 2.01]]]))
    assert cond.dtype == th.float32
    th.testing.assert_close(cond, th.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), atol=1e-4, rtol=1e-4)


def test_saves_what_the_policy_is_now(tmp_path: Path) -> None:
    """Attributes that were changed after construction are saved, too."""
    flow = tiny_flow()
    flow.num_steps, flow.critic = 7, None
    flow.save_pretrained(tmp_path)
    loaded = FlowPolicy.from_pretrained(tmp_path)
    assert (loaded.num_steps, loaded.critic) == (7, None)


def test_foreign_networks_are_not_saved(tmp_path: Path) -> None:
    class Bare(nn.Module):
        cond_dim, pred_horizon, action_dim = 2, 1, 2

    flow = FlowPolicy(StateEncoder(2, 1), Bare(), act_horizon=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Only subclasses of sb3_dsrl.policies.networks.Network can be saved.*found Bare"):
        flow.save_pretrained(tmp_path)


def test_own_networks_travel(tmp_path: Path) -> None:
    flow = linear_flow(a=0.3, b=-0.1)
    flow.save_pretrained(tmp_path)
    assert FlowPolicy.from_pretrained(tmp_path).fingerprint() == flow.fingerprint()


def test_own_network_does_not_replace_ours_of_the_same_name(tmp_path: Path) -> None:
    ours = FlowPolicy.create(3, 2, pred_horizon=4, act_horizon=2, net_class=VelocityMLP)

    namespace: dict[str, Any] = dict(LinearVelocity=LinearVelocity, __name__=__name__)
    exec("class VelocityMLP(LinearVelocity): pass", namespace)
    theirs = FlowPolicy(StateEncoder(2, 1), namespace["VelocityMLP"](2, 1, 2, a=0.3, b=-0.1), act_horizon=1)
    for name, flow, written in (("ours", ours, "VelocityMLP"), ("theirs", theirs, f"{__name__}:VelocityMLP")):
        flow.freeze().save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["net"]["class"] == written
        loaded = FlowPolicy.from_pretrained(tmp_path / name)
        assert type(loaded.net) is type(flow.net) and loaded.fingerprint() == flow.fingerprint()


def test_flow_goes_to_the_device_that_auto_means(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FlowPolicy.from_pretrained(folder, device="meta").device.type == "meta"
    monkeypatch.setattr("sb3_dsrl.policies.flow.get_device", lambda device: th.device({"auto": "meta"}[device]))
    assert FlowPolicy.from_pretrained(folder).device.type == "meta"


@pytest.mark.parametrize("has_gpu", [False, True])
def test_auto_is_a_gpu_where_there_is_one(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.cuda, "is_available", lambda: has_gpu)
    assert get_device("auto").type == get_device().type == ("cuda" if has_gpu else "cpu")
    assert get_device("cpu") == th.device("cpu")


def test_encode_checks_the_shape() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(B, obs_horizon, ...\) = \(B, 2, 3\), found \(B, 3\)"):
        tiny_flow().encode(np.zeros((1, 3)))
