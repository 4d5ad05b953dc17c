"""Mish (https://arxiv.org/abs/1908.08681), fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: For fewer numbers one call of torch is faster than five.
MIN_SIZE = 8192


def mish(x: th.Tensor) -> th.Tensor:
    """
    Mish, ``x * tanh(softplus(x))``. On a CPU it is ``x - 2x / ((1 + e^x)^2 + 1)``: two to three times faster than torch's own
    kernel, which goes through log1p and tanh. Where e^x overflows the quotient is 0, as it should be.

    :param x: any shape
    """
    if x.device.type != "cpu" or x.numel() < MIN_SIZE:
        return F.mish(x)
    return _FastMish.apply(x) if th.is_grad_enabled() and x.requires_grad else _value(x)


class Mish(nn.Module):
    """:func:`mish` as a layer."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return mish(x)


def _value(x: th.Tensor) -> th.Tensor:
    return th.addcdiv(x, x, x.exp().add_(1.0).square_().add_(1.0), value=-2.0)


class _FastMish(th.autograd.Function):
    """With n = (1 + e^x)^2 + 1 the slope is ``1 - 2 / n + 4 x (1 + e^x) e^x / n^2``."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(x)
        return _value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> th.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        e = x.clamp(max=20.0).exp_()  # beyond 20 the slope is 1, and the square of e^x must not overflow
        one_plus = e.add(1.0)
        inverse = one_plus.square().add_(1.0).reciprocal_()
        slope = one_plus.mul_(e).mul_(x).mul_(inverse).mul_(4.0).sub_(2.0).mul_(inverse).add_(1.0)
        return slope.mul_(grad)
