"""The mixture eps * N(0, I) + (1 - eps) * pi: a density, sampled as such; mode, entropy and KL are pi's own."""

import math

import numpy as np
import pytest
import torch as th
from scipy.stats import kstest, norm
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from sb3_dsrl.stage2.distributions import PriorMixtureDistribution

EPS = [0.0, 0.3, 0.9, 1.0]


def mixture(mean: list[float] | th.Tensor, std: list[float] | th.Tensor, eps: float, n: int = 1) -> PriorMixtureDistribution:
    """The same mixture in ``n`` rows."""
    mean, std = th.as_tensor(mean, dtype=th.float64), th.as_tensor(std, dtype=th.float64)
    distribution = PriorMixtureDistribution(len(mean))
    return distribution.proba_distribution(mean.expand(n, -1), std.log().expand(n, -1), eps)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.1), (-2.0, 0.7), (0.5, 2.0)])
def test_density_integrates_to_one_in_1d(eps: float, mean: float, std: float) -> None:
    w = th.linspace(-15, 15, 60_001, dtype=th.float64)[:, None]
    density = mixture([mean], [std], eps, len(w)).log_prob(w).exp()
    assert th.trapezoid(density, w[:, 0]).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("mean", "std"), [([1.0, -0.5], [0.3, 1.2]), ([0.0, 2.0], [0.8, 0.4])])
def test_density_integrates_to_one_in_2d(eps: float, mean: list[float], std: list[float]) -> None:
    axis = th.linspace(-8, 8, 641, dtype=th.float64)
    w = th.cartesian_prod(axis, axis)
    density = mixture(mean, std, eps, len(w)).log_prob(w).exp().reshape(641, 641)
    assert th.trapezoid(th.trapezoid(density, axis), axis).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("eps", EPS)
def test_log_prob_equals_brute_force(eps: float) -> None:
    rng = np.random.default_rng(0)
    mean, std, w = rng.normal(size=(5, 3)), rng.uniform(0.2, 2.0, (5, 3)), rng.normal(size=(5, 3))
    prior, pi = norm.pdf(w).prod(axis=1), norm.pdf(w, mean, std).prod(axis=1)
    distribution = PriorMixtureDistribution(3)
    distribution.proba_distribution(th.from_numpy(mean), th.from_numpy(np.log(std)), eps)
    np.testing.assert_allclose(distribution.log_prob(th.from_numpy(w)), np.log(eps * prior + (1 - eps) * pi), rtol=1e-6)
    np.testing.assert_allclose(distribution.policy_log_prob(th.from_numpy(w)), np.log(pi), rtol=1e-6)


@pytest.mark.parametrize("eps", EPS)
def test_rows_come_from_the_prior_as_a_whole(eps: float) -> None:
    th.manual_seed(0)
    n = 20_000
    w = mixture([50.0, -50.0], [1.0, 1.0], eps, n).sample()  # far from the prior: the component can be seen
    from_prior = w.abs() < 25
    assert (from_prior[:, 0] == from_prior[:, 1]).all()
    assert abs(from_prior[:, 0].double().mean().item() - eps) <= 4 * math.sqrt(eps * (1 - eps) / n)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_samples_have_the_mixture_cdf(eps: float, dim: int) -> None:
    th.manual_seed(1)
    mean, std = [0.8, -1.5], [0.4, 1.6]
    w = mixture(mean, std, eps, 20_000).sample()[:, dim].numpy()
    assert kstest(w, lambda x: eps * norm.cdf(x) + (1 - eps) * norm.cdf(x, mean[dim], std[dim])).pvalue > 1e-3
    other = 0.0 if eps == 1.0 else 1.0  # the test has the power to see a wrong eps
    assert kstest(w, lambda x: other * norm.cdf(x) + (1 - other) * norm.cdf(x, mean[dim], std[dim])).pvalue < 1e-3


@pytest.mark.parametrize("eps", EPS)
def test_mode_entropy_and_kl_are_of_pi_alone(eps: float) -> None:
    mean, std = th.tensor([[0.5, -1.0], [0.0, 0.0]]).double(), th.tensor([[0.3, 2.0], [1.0, 1.0]]).double()
    distribution = PriorMixtureDistribution(2).proba_distribution(mean, std.log(), eps)
    pi, prior = Independent(Normal(mean, std), 1), Independent(Normal(th.zeros_like(mean), th.ones_like(std)), 1)
    assert th.equal(distribution.mode(), mean)
    assert th.equal(distribution.get_actions(deterministic=True), mean)
    th.testing.assert_close(distribution.entropy(), pi.entropy())
    th.testing.assert_close(distribution.kl_to_prior(), kl_divergence(pi, prior))
    assert distribution.kl_to_prior()[1].abs() < 1e-12


def test_without_prior_it_is_pi_exactly() -> None:
    w = th.randn(9, 3).double()
    distribution = mixture([0.1, 0.2, 0.3], [0.5, 1.0, 2.0], 0.0, 9)
    assert th.equal(distribution.log_prob(w), distribution.policy_log_prob(w))


def test_with_prior_alone_pi_has_no_gradient() -> None:
    mean = th.ones(4, 2, requires_grad=True)
    distribution = PriorMixtureDistribution(2).proba_distribution(mean, th.zeros(4, 2), 1.0)
    w = th.randn(4, 2)
    log_prob = distribution.log_prob(w)
    th.testing.assert_close(log_prob, Normal(0.0, 1.0).log_prob(w).sum(dim=1))
    assert not log_prob.requires_grad


@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("std", [0.05, 1.0, 5.0])
def test_many_dimensions_are_stable(shift: float, std: float) -> None:
    mean = th.full((1, 128), shift, requires_grad=True)
    log_std = th.full((1, 128), math.log(std), requires_grad=True)
    distribution = PriorMixtureDistribution(128)
    for w in (th.zeros(1, 128), th.full((1, 128), shift), th.full((1, 128), -4.0)):
        log_prob = distribution.proba_distribution(mean, log_std, 0.3).log_prob(w)
        components = [math.log(eps) + norm.logpdf(w.double(), m, s).sum() for eps, m, s in ((0.3, 0, 1), (0.7, shift, std))]
        assert log_prob.item() == pytest.approx(np.logaddexp(*components), rel=1e-4)
        for gradient in th.autograd.grad(log_prob.sum(), (mean, log_std)):
            assert gradient.isfinite().all()


def test_divergence_is_found_after_torch_compile_too() -> None:
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)  # as torch.compile leaves it
    try:
        with pytest.raises(ValueError, match="its training has diverged"):
            mixture([math.nan], [1.0], 0.0)
    finally:
        Distribution.set_default_validate_args(before)
