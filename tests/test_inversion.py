"""The noise of a chunk: in closed form, on small flows that were trained, and what is refused."""

from typing import Any

import pytest
import torch as th

from sb3_dsrl import FlowPolicy, Inversion, StateEncoder, VelocityMLP, VelocityUNet, train_flow
from sb3_dsrl.policies import flow as flow_module
from sb3_dsrl.policies.diffusion import DiffusionPolicy
from sb3_dsrl.policies.networks import VelocityNet
from tests.stage0 import SMALL, random_demos
from tests.toys import linear_flow, mean_flow


def randn(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (0.0, 0.4), (-0.9, 0.3), (0.5, -0.2), (-3.0, 0.5)])
def test_a_linear_flow_has_the_closed_form(n: int, sigma: float, a: float, b: float) -> None:
    """decode(w) = g w + c, so that g (x - c) / (g^2 + sigma^2) is the optimum."""
    g = (1 + a / n) ** n
    c = b / a * (g - 1) if a else b
    chunk = (0.5 * randn(5, 2, 3)).clamp(-0.95, 0.95)
    flow = linear_flow(action_dim=3, horizon=2, a=a, b=b, num_steps=n)
    found = flow.invert(th.zeros(5, 2), chunk, sigma=sigma)
    expected = g * (chunk - c) / (g**2 + sigma**2)
    th.testing.assert_close(found.noise, expected, atol=1e-3, rtol=1e-3)
    th.testing.assert_close(found.norm, expected.square().mean(dim=(1, 2)).sqrt(), atol=1e-3, rtol=1e-3)
    reached = (g * expected + c).clamp(-1, 1)
    th.testing.assert_close(found.chunk, reached, atol=1e-4, rtol=1e-4)
    th.testing.assert_close(found.error, (reached - chunk).square().mean(dim=(1, 2)).sqrt(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_of_all_noises_that_execute_a_chunk_the_likeliest(sigma: float) -> None:
    """The action is the mean over 4 rows of noise: w_i = x / 4 / (1 / 4 + sigma^2) in each of them."""
    chunk = 0.9 * (2 * th.rand(6, 1, 2, generator=th.Generator().manual_seed(0)) - 1)
    found = mean_flow().invert(th.zeros(6, 2), chunk, sigma=sigma)
    expected = (chunk / 4 / (0.25 + sigma**2)).expand(-1, 4, -1)
    th.testing.assert_close(found.noise, expected, atol=1e-3, rtol=1e-3)
    assert found.chunk.shape == (6, 4, 2) and found.error.shape == found.norm.shape == (6,)


class Squashing(VelocityNet):
    """Decodes w to tanh(w) / 2, in one step."""

    def __init__(self) -> None:
        super().__init__(2, 1, 2)

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        return x.tanh() / 2 - x


def test_what_no_noise_reaches_has_the_error_of_the_nearest() -> None:
    flow = FlowPolicy(StateEncoder(2, 1), Squashing(), act_horizon=1, num_steps=1).freeze()
    found = flow.invert(th.zeros(2, 2), th.tensor([[[0.3, -0.1]], [[0.8, -0.8]]]), n_iterations=20)
    assert found.error.tolist() == pytest.approx([0.0, 0.3], abs=0.01)
    th.testing.assert_close(found.noise[0, 0], th.tensor([0.6, -0.2]).atanh(), atol=2e-3, rtol=0)


def test_an_action_at_its_bound_may_be_clipped_to_it() -> None:
    flow = linear_flow(action_dim=2, horizon=1, a=3.0, b=0.0, num_steps=1)  # w -> 4 w; its fixed-point iteration diverges
    chunk = flow.decode(th.zeros(2, 2), th.tensor([[[2.0, 0.1]], [[-2.0, 0.1]]]))
    assert chunk.abs().max() == 1.0
    found = flow.invert(th.zeros(2, 2), chunk)
    assert found.error.max() < 1e-3 and found.norm.max() < 0.3  # 0.25 is enough for a bound


@pytest.fixture(scope="module", params=["mlp", "unet"])
def trained(request: pytest.FixtureRequest) -> FlowPolicy:
    kwargs: dict[str, Any] = SMALL | dict(pred_horizon=4, act_horizon=2, n_iterations=150, batch_size=32, seed=0)
    if request.param == "unet":
        kwargs |= dict(net_class=VelocityUNet, net_kwargs=dict(widths=(8, 16), n_groups=4, embed_dim=16))
    flow = train_flow(random_demos(), **kwargs).freeze()
    flow.zero_grad()
    return flow


def test_a_decoded_noise_is_found_again(trained: FlowPolicy) -> None:
    """To 1% of the actions' std, by a noise that is no less likely."""
    cond, w = trained.encode(randn(16, 1, 3)), randn(16, 4, 2, seed=1)
    chunk = trained.decode(cond, w)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    found = trained.invert(cond, chunk, n_iterations=10)
    assert isinstance(found, Inversion)
    assert found.error.median() < 0.01 * chunk.std() and (found.error < 0.05 * chunk.std()).float().mean() > 0.9
    assert found.norm.mean() <= 1.01 * w.square().mean(dim=(1, 2)).sqrt().mean()
    th.testing.assert_close(found.chunk, trained.decode(cond, found.noise))
    executed = trained.invert(cond, trained.executed(chunk), n_iterations=10)
    assert executed.error.median() < 0.01 * chunk.std() and executed.norm.mean() < found.norm.mean()
    assert all(th.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_gauss_newton_improves_on_integrating_backwards() -> None:
    """Each step multiplies by a quarter, so that three fixed-point iterations leave a part of the way."""
    flow = linear_flow(a=-3.0, num_steps=4)
    chunk = flow.decode(th.zeros(16, 2), randn(16, 1, 2))
    error = [flow.invert(th.zeros(16, 2), chunk, n_iterations=n, sigma=0.0).error.mean().item() for n in (0, 1, 2, 6)]
    assert pytest.approx(error[3], abs=1e-6) == 0.0 and error[3] < error[2] < error[1] < error[0] < chunk.abs().mean()


def test_a_diffusion_policy_is_inverted_as_far_as_its_clipping_lets_it() -> None:
    kwargs: dict[str, Any] = SMALL | dict(pred_horizon=4, act_horizon=2, n_iterations=150, batch_size=32, seed=0)
    policy = train_flow(random_demos(), **kwargs, policy_class=DiffusionPolicy, num_steps=4).freeze()
    cond = policy.encode(randn(16, 1, 3))
    chunk = policy.decode(cond, randn(16, 4, 2, seed=1))
    nothing = (policy.decode(cond, th.zeros(16, 4, 2)) - chunk).square().mean(dim=(1, 2)).sqrt()
    found = policy.invert(cond, chunk)
    assert (found.error < nothing).all() and found.error.mean() < 0.7 * nothing.mean()
    th.testing.assert_close(found.error, (policy.decode(cond, found.noise) - chunk).square().mean(dim=(1, 2)).sqrt())


def test_each_chunk_is_inverted_by_itself(trained: FlowPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    cond = trained.encode(randn(7, 1, 3))
    chunk = trained.decode(cond, randn(7, 4, 2, seed=1))
    together = trained.invert(cond, chunk)
    monkeypatch.setattr(flow_module, "INVERTED_AT_ONCE", 3)
    in_parts = trained.invert(cond, chunk)
    th.testing.assert_close(in_parts.chunk, together.chunk, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("chunk", "kwargs", "sentence"),
    [
        (th.zeros(3, 2, 2), {}, r"must be finite and have shape \(B, T, A\) = \(3, 4, 2\), .*, found \(3, 2, 2\)"),
        (th.zeros(2, 4, 2), {}, r"shape \(B, T, A\) = \(3, 4, 2\), .*, found \(2, 4, 2\)"),
        (th.full((3, 4, 2), th.nan), {}, "must be finite"),
        (th.zeros(3, 4, 2), dict(num_steps=0), "num_steps must be at least 1, found 0"),
        (th.zeros(3, 4, 2), dict(sigma=-1.0), "sigma and n_iterations must not be negative, found -1.0 and 5"),
        (th.zeros(3, 4, 2), dict(n_iterations=-1), "must not be negative, found 0.01 and -1"),
    ],
)
def test_bad_input(chunk: th.Tensor, kwargs: dict[str, Any], sentence: str) -> None:
    flow = FlowPolicy.create(3, 2, 1, 4, 3, net_class=VelocityMLP, net_kwargs=dict(width=16, n_blocks=1)).freeze()
    with pytest.raises(ValueError, match=sentence):
        flow.invert(th.zeros(3, 3), chunk, **kwargs)
