"""The fast decode against a plain loop of full forward passes: the same numbers, also after the weights have changed."""

import copy
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch as th
from torch.nn import functional as F

from sb3_dsrl import EnsembleChunkCritic, FlowPolicy, StateEncoder, VelocityMLP, VelocityUNet
from sb3_dsrl.policies import decoding
from sb3_dsrl.policies.decoding import integrate, layers
from sb3_dsrl.policies.decoding.layers import ONEDNN_FROM
from sb3_dsrl.policies.decoding.unet import BLOCK_SIZE, PATHS
from sb3_dsrl.policies.networks import TimestepEmbedding, VelocityNet
from tests.scripts import EXAMPLES

NETS: dict[str, Callable[[], VelocityNet]] = {
    "MLP": lambda: VelocityMLP(3, 4, 6, width=32, n_blocks=2, embed_dim=8),
    "U-Net": lambda: VelocityUNet(3, 8, 6, widths=(16, 32, 48), embed_dim=8),
    "U-Net, one width": lambda: VelocityUNet(2, 5, 3, widths=(16,), embed_dim=8),
    "U-Net, kernel 3": lambda: VelocityUNet(8, 4, 6, widths=(8, 8), kernel_size=3, n_groups=4, embed_dim=8),
    "U-Net, kernel 1": lambda: VelocityUNet(8, 4, 6, widths=(8, 16), kernel_size=1, n_groups=2, embed_dim=8),
    "U-Net, default": lambda: VelocityUNet(7, 16, 20),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> VelocityNet:
    th.manual_seed(0)
    net = NETS[request.param]().eval()
    for p in net.parameters():  # fresh biases and norms are too tame
        p.data += 0.05 * th.randn_like(p)
    return net


def plain(net: VelocityNet, cond: th.Tensor, w: th.Tensor, n: int) -> th.Tensor:
    """One observation and one noise after the other: no batches, no caches."""
    with th.no_grad():
        chunks = th.empty_like(w)
        for b in range(len(w)):
            for m in range(w.shape[1]):
                x = w[b, m][None]
                for i in range(n):
                    t, d = th.tensor([i / n]), th.tensor([1 / n])
                    x = x + net(x, t, d, cond[b][None]) / n
                chunks[b, m] = x[0]
        return chunks


@pytest.mark.parametrize(("b", "m", "n"), [(1, 1, 8), (3, 1, 2), (2, 5, 3), (5, 30, 1), (BLOCK_SIZE + 3, 1, 1)])
def test_same_as_plain_loops(net: VelocityNet, b: int, m: int, n: int) -> None:
    cond, w = th.randn(b, net.cond_dim), th.randn(b, m, net.pred_horizon, net.action_dim)
    kept = w.clone(), cond.clone()
    with th.no_grad():
        fast = integrate(net, cond, w, n)
    assert th.equal(w, kept[0]) and th.equal(cond, kept[1])
    th.testing.assert_close(fast, plain(net, cond, w, n), atol=1e-5, rtol=1e-5)
    with_gradients = integrate(net, cond, w, n)  # the other way through the code
    assert with_gradients.requires_grad
    th.testing.assert_close(fast, with_gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("b", [1, 3, 8, 64, 65, 200])
@th.no_grad()
def test_every_path_is_the_same(path: str, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with one entry of T and an odd number, and whether oneDNN has small products, too, or none."""
    monkeypatch.setenv("SB3_DSRL_DECODE", path)
    for name in ("U-Net", "U-Net, one width"):
        for threshold in (0, ONEDNN_FROM):
            monkeypatch.setattr(layers, "ONEDNN_FROM", threshold)
            th.manual_seed(0)
            net = NETS[name]().eval()
            for p in net.parameters():
                p.data += 0.05 * th.randn_like(p)
            cond, w = th.randn(b, net.cond_dim), th.randn(b, 1, net.pred_horizon, net.action_dim)
            x = w[:, 0]
            for i in range(3):
                x = x + net(x, th.full((b,), i / 3), th.full((b,), 1 / 3), cond) / 3
            th.testing.assert_close(integrate(net, cond, w, 3)[:, 0], x, atol=1e-5, rtol=1e-5)


@th.no_grad()
def test_other_devices_take_the_plain_path(net: VelocityNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed networks are for the CPU's caches; on the meta device there is no GPU to ask for."""

    def fail(*args: Any) -> None:
        raise AssertionError("packed off the CPU")

    monkeypatch.setattr(decoding, "choose", fail)
    monkeypatch.setattr(decoding, "mlp_velocity", fail)
    net = net.to("meta")
    cond = th.empty(3, net.cond_dim, device="meta")
    w = th.empty(3, 2, net.pred_horizon, net.action_dim, device="meta")
    assert integrate(net, cond, w, 2).shape == w.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.load_state_dict({key: 0.5 * value for key, value in net.state_dict().items()}),
        lambda net: net.load_state_dict({key: 0.5 * value for key, value in net.state_dict().items()}, assign=True),
        lambda net: [p.mul_(0.5) for p in net.parameters()],
        lambda net: [setattr(p, "data", 0.5 * p.data) for p in net.parameters()],
        lambda net: list(net.parameters())[-1].add_(1.0),
    ],
    ids=["load_state_dict", "assign", "in place", "data", "one bias"],
)
@th.no_grad()
def test_changed_weights_count(net: VelocityNet, change: Callable[[VelocityNet], object]) -> None:
    cond, w = th.randn(2, net.cond_dim), th.randn(2, 1, net.pred_horizon, net.action_dim)
    before = integrate(net, cond, w, 2)
    kept = before.clone()
    change(net)
    after = integrate(net, cond, w, 2)
    th.testing.assert_close(after, plain(net, cond, w, 2), atol=1e-5, rtol=1e-5)
    assert not th.allclose(before, after, atol=1e-3)
    assert th.equal(before, kept)  # what was handed out is not a buffer that is used again


@th.no_grad()
def test_copies_do_not_share_what_is_packed(net: VelocityNet) -> None:
    cond, w = th.randn(2, net.cond_dim), th.randn(2, 1, net.pred_horizon, net.action_dim)
    before = integrate(net, cond, w, 2)
    twin = copy.deepcopy(net)
    for p in twin.parameters():
        p.mul_(0.0)
    assert th.equal(integrate(net, cond, w, 2), before)
    th.testing.assert_close(integrate(twin, cond, w, 2), w)
    assert net.state_dict().keys() == twin.state_dict().keys()


@th.no_grad()
def test_decode_takes_several_noises_for_each_observation() -> None:
    th.manual_seed(0)
    flow = FlowPolicy(
        StateEncoder(3, 2), VelocityUNet(2, 4, 6, widths=(16, 16), n_groups=2), None, act_horizon=2, num_steps=3
    ).freeze()
    cond, w = th.randn(5, 6), th.randn(5, 4, 4, 2)
    chunks = flow.decode(cond, w)
    expected = flow.decode(cond.repeat_interleave(4, dim=0), w.flatten(0, 1))
    assert chunks.shape == w.shape and chunks.abs().max() <= 1
    th.testing.assert_close(chunks.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    th.testing.assert_close(flow.executed(chunks), chunks[:, :, :2])


@th.no_grad()
def test_accelerated_decode() -> None:
    """Compiled (here by the backend that only traces) it is the same to 1e-5, in bfloat16 nearly the same."""
    th.manual_seed(0)
    flow = FlowPolicy(StateEncoder(3, 2), VelocityMLP(2, 4, 6, width=32), None, act_horizon=2, num_steps=3).freeze()
    cond, w = th.randn(5, 6), th.randn(5, 4, 2)
    expected, fingerprint = flow.decode(cond, w), flow.fingerprint()
    compiled = flow.accelerate(compile_kwargs=dict(backend="eager")).decode(cond, w)
    th.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    rough = flow.accelerate(th.bfloat16).decode(cond, w)
    assert rough.dtype == th.float32 and not th.equal(rough, expected)
    th.testing.assert_close(rough, expected, atol=3e-2, rtol=0)
    assert th.equal(flow.accelerate().decode(cond, w), expected) and flow.fingerprint() == fingerprint


def test_critic_takes_several_chunks_for_each_observation() -> None:
    th.manual_seed(0)
    critic = EnsembleChunkCritic(6, 2, 3, n_heads=4, width=64)
    for p in critic.parameters():
        p.data += 0.1 * th.randn_like(p)
    cond, chunk = th.randn(40, 6), th.randn(40, 5, 2, 3)
    expected = critic(cond.repeat_interleave(5, dim=0), chunk.flatten(0, 1)).reshape(4, 40, 5)
    th.testing.assert_close(critic(cond, chunk), expected, atol=1e-5, rtol=1e-5)
    with th.no_grad():
        th.testing.assert_close(critic(cond, chunk), expected, atol=1e-5, rtol=1e-5)
        scores = critic.get_ucb_q(cond, chunk, 2.0)
    th.testing.assert_close(scores, (expected.mean(0) - 2.0 * expected.std(0, unbiased=False)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 1, 3), (40, 64, 1, 16)])
@th.no_grad()
def test_norm_and_mish(shape: tuple[int, ...]) -> None:
    """In one call and in three; also where the exponential overflows."""
    norm = th.nn.GroupNorm(8, shape[1])
    norm.weight.data = 60 * th.randn(shape[1])
    norm.bias.data = th.randn(shape[1])
    x = th.randn(shape).contiguous(memory_format=th.channels_last)
    expected = F.mish(norm(x).double()).float()
    th.testing.assert_close(layers.NormMish(norm)(x), expected, atol=5e-5, rtol=1e-6)
    norm.weight.data /= 60
    expected = F.mish(norm(x).double()).float()
    th.testing.assert_close(layers.NormMish(norm)(x), expected, atol=2e-6, rtol=1e-6)


def test_the_original_gives_the_same_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's peer, with the weights of a network of ours under the names of the original's checkpoints."""
    monkeypatch.syspath_prepend(EXAMPLES)
    original = importlib.import_module("benchmark.original")
    th.manual_seed(0)
    net = VelocityUNet(3, 8, 6, widths=(16, 32, 48), step_embedding=TimestepEmbedding(8)).eval()
    for p in net.parameters():
        p.data += 0.05 * th.randn_like(p)
    cond, w = th.randn(5, 6), th.randn(5, 8, 3)
    with th.no_grad():
        ours = integrate(net, cond, w[:, None], 8)[:, 0].clamp(-1, 1)
    theirs = original.original_decode(original.OriginalUNet(net), cond, w, 8)
    assert ours.std() > 0.1
    th.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_kept_buffers_are_nobody_elses() -> None:
    """Small decodes keep their buffers; inference mode, gradients and threads do not get into each other's way."""
    net = NETS["U-Net"]().eval()
    cond, w = th.randn(8, 2, net.cond_dim), th.randn(8, 2, 1, net.pred_horizon, net.action_dim)
    expected = [plain(net, *pair, 4) for pair in zip(cond, w, strict=True)]
    with th.inference_mode():
        integrate(net, cond[0], w[0], 4)

    def decode(i: int) -> th.Tensor:
        with th.no_grad():
            return [integrate(net, cond[i], w[i], 4) for _ in range(20)][-1]

    with ThreadPoolExecutor(4) as pool:
        for found, chunk in zip(pool.map(decode, range(8)), expected, strict=True):
            th.testing.assert_close(found, chunk, atol=1e-5, rtol=1e-5)
