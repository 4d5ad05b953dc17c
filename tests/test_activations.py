"""The fast Mish against torch's own: values and slopes."""

import torch as th
from torch.nn import functional as F

from sb3_dsrl.policies.activations import MIN_SIZE, Mish, mish

X = th.cat([th.linspace(-120, 120, 20_001), th.randn(10_000), th.tensor([-1e4, 1e4, 0.0])])


def test_values() -> None:
    th.testing.assert_close(mish(X), F.mish(X.double()).float(), atol=2e-6, rtol=1e-6)
    th.testing.assert_close(mish(X[:50]), F.mish(X[:50]))


def test_slopes() -> None:
    """Of the module, with a gradient that is not 1; large numbers neither overflow nor lose their slope."""
    assert len(X) > MIN_SIZE
    upstream = th.randn(len(X))
    slopes = []
    for function, x in ((Mish(), X.clone()), (F.mish, X.double())):
        function(x.requires_grad_()).backward(upstream.to(x))  # type: ignore[operator]
        assert x.grad is not None
        slopes.append(x.grad.double())
    assert slopes[0].isfinite().all()
    th.testing.assert_close(slopes[0], slopes[1], atol=5e-6, rtol=1e-5)
