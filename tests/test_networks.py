"""Velocity networks use t and d, the ensemble critic is E independent critics, configs rebuild the same network."""

import math

import pytest
import torch as th
from torch.nn import functional as F

from sb3_dsrl.policies.encoders import StateEncoder
from sb3_dsrl.policies.networks import EnsembleChunkCritic, VelocityMLP, VelocityNet, VelocityUNet

B, T, A, C = 3, 8, 2, 5

NETS = {
    "mlp": lambda: VelocityMLP(A, T, C, width=32, n_blocks=1, embed_dim=16),
    "unet": lambda: VelocityUNet(A, T, C, widths=(8, 16), n_groups=4, embed_dim=16),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> VelocityNet:
    th.manual_seed(0)
    return NETS[request.param]().double().eval().requires_grad_(False)


@pytest.fixture
def point() -> dict[str, th.Tensor]:
    th.manual_seed(1)
    kwargs = dict(dtype=th.float64)
    return dict(x=th.randn(B, T, A, **kwargs), t=th.rand(B, **kwargs), d=th.rand(B, **kwargs), cond=th.randn(B, C, **kwargs))


def test_velocity_has_the_shape_of_x(net: VelocityNet, point: dict[str, th.Tensor]) -> None:
    assert net(**point).shape == (B, T, A)


@pytest.mark.parametrize("name", ["x", "t", "d", "cond"])
def test_every_input_counts(net: VelocityNet, point: dict[str, th.Tensor], name: str) -> None:
    changed = point | {name: point[name] + 0.1}
    assert ((net(**changed) - net(**point)).abs().amax(dim=(1, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", ["t", "d"])
@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_t_and_d_are_continuous_not_quantised(net: VelocityNet, point: dict[str, th.Tensor], name: str, at: float) -> None:
    base = point | {name: th.full((B,), at, dtype=th.float64)}

    def change(delta: float) -> th.Tensor:
        return net(**(base | {name: base[name] + delta})) - net(**base)

    # A grid of steps gives 0 for tiny changes, a jump gives a difference that does not shrink with delta.
    small, smaller = change(1e-6), change(5e-7)
    assert (small.abs().amax(dim=(1, 2)) > 1e-9).all()
    th.testing.assert_close(small, 2 * smaller, rtol=1e-2, atol=1e-3 * float(small.abs().max()))


def test_t_and_d_are_not_interchangeable(net: VelocityNet, point: dict[str, th.Tensor]) -> None:
    swapped = point | dict(t=point["d"], d=point["t"])
    assert not th.allclose(net(**swapped), net(**point), atol=1e-4)


def test_each_row_has_its_own_t_and_d(net: VelocityNet, point: dict[str, th.Tensor]) -> None:
    alone = th.cat([net(**{key: value[i : i + 1] for key, value in point.items()}) for i in range(B)])
    th.testing.assert_close(net(**point), alone)


@pytest.mark.parametrize(("pred_horizon", "widths", "multiple"), [(6, (8, 8, 8), 4), (7, (8, 8), 2)])
def test_unet_names_the_pred_horizon_that_it_needs(pred_horizon: int, widths: tuple[int, ...], multiple: int) -> None:
    with pytest.raises(ValueError, match=f"pred_horizon must be a multiple of {multiple}, found {pred_horizon}"):
        VelocityUNet(A, pred_horizon, C, widths=widths)


@pytest.mark.parametrize("widths", [(8,), (8, 8), (8, 16, 16), (16, 16, 8)])
def test_unet_takes_any_widths(widths: tuple[int, ...]) -> None:
    unet = VelocityUNet(A, 4, C, widths=widths, embed_dim=16)
    assert unet(th.randn(B, 4, A), th.rand(B), th.rand(B), th.randn(B, C)).shape == (B, 4, A)


@pytest.fixture
def critic() -> EnsembleChunkCritic:
    th.manual_seed(2)
    critic = EnsembleChunkCritic(C, 4, A, n_heads=3, width=16).requires_grad_(False)
    for parameter in critic.parameters():  # biases and layer norms start at 0 and 1, which would hide mistakes
        parameter.add_(0.1 * th.randn_like(parameter))
    return critic


def one_head(critic: EnsembleChunkCritic, head: int, cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
    """One head, from the names of its parameters alone."""
    x = th.cat([cond, chunk.reshape(len(chunk), -1)], dim=1)
    weights = {name: value[head] for name, value in critic.named_parameters()}
    for layer in (0, 3, 6):
        x = x @ weights[f"net.{layer}.weight"] + weights[f"net.{layer}.bias"]
        centred = x - x.mean(dim=1, keepdim=True)
        x = centred / (x.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = F.mish(x * weights[f"net.{layer + 1}.weight"] + weights[f"net.{layer + 1}.bias"])
    return (x @ weights["net.9.weight"] + weights["net.9.bias"])[:, 0]


def test_batched_heads_equal_a_loop_over_heads(critic: EnsembleChunkCritic) -> None:
    cond, chunk = th.randn(7, C), th.randn(7, 4, A)
    loop = th.stack([one_head(critic, head, cond, chunk) for head in range(3)])
    assert critic(cond, chunk).shape == (3, 7)
    th.testing.assert_close(critic(cond, chunk), loop)
    assert loop.std(dim=0).min() > 1e-3  # the heads differ


def test_heads_do_not_share_gradients(critic: EnsembleChunkCritic) -> None:
    critic.requires_grad_(True)
    critic(th.randn(7, C), th.randn(7, 4, A))[1].sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad[1].abs().sum() > 0, name
        assert parameter.grad[[0, 2]].abs().sum() == 0, name


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.5, -1.0])
def test_ucb_is_mean_minus_kappa_population_std(critic: EnsembleChunkCritic, kappa: float) -> None:
    cond, chunk = th.randn(7, C), th.randn(7, 4, A)
    q = [one_head(critic, head, cond, chunk) for head in range(3)]
    mean = sum(q) / 3
    std = (sum((x - mean) ** 2 for x in q) / 3).sqrt()
    th.testing.assert_close(critic.get_ucb_q(cond, chunk, kappa), mean - kappa * std)


@pytest.mark.parametrize(
    "make",
    [*NETS.values(), lambda: EnsembleChunkCritic(C, 4, A, n_heads=3, width=16), lambda: StateEncoder(5, 2)],
    ids=[*NETS, "critic", "encoder"],
)
def test_config_rebuilds_the_network(make) -> None:
    original = make()
    copy = type(original)(**original.config)
    assert copy.config == original.config
    copy.load_state_dict(original.state_dict())
    for mine, theirs in zip(copy.parameters(), original.parameters(), strict=True):
        assert th.equal(mine, theirs)


def test_encoder_normalises_and_stacks() -> None:
    frames = th.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 4.0], [4.0, 5.0, 1.0]])
    encoder = StateEncoder(3, 2)
    encoder.fit(frames, min_std=0.01)
    th.testing.assert_close(encoder.mean, th.tensor([2.0, 5.0, 2.0]))
    th.testing.assert_close(encoder.std, th.tensor([math.sqrt(8 / 3), 0.01, math.sqrt(2.0)]))  # a constant gets the floor
    obs = th.randn(4, 2, 3)
    expected = th.cat([(obs[:, i] - encoder.mean) / encoder.std for i in range(2)], dim=1)
    assert encoder.cond_dim == 6
    th.testing.assert_close(encoder(obs), expected)
