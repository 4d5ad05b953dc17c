"""The U-Net's layers on feature maps with channels last: convolutions as matrix products, and group norm with Mish."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch as th
from torch.nn import functional as F

#: From so many multiplications on a product is oneDNN's, with weights in its own layout. oneDNN uses AVX-512 on any CPU that
#: has it, MKL on Intel's alone; but a call takes 10 us more.
ONEDNN_FROM = 1_000_000

#: Up to so many numbers torch's own Mish, one call, takes no longer than three quicker ones.
MISH_IN_ONE_CALL = 2_048

_ONE = th.ones(())


def has_onednn() -> bool:
    """Whether this torch has oneDNN, switched on, with the products of packed weights that ``torch.compile`` uses."""
    wanted = ("_linear_pointwise", "_reorder_linear_weight")
    return th.backends.mkldnn.is_available() and th._C._get_mkldnn_enabled() and all(hasattr(th.ops.mkldnn, f) for f in wanted)


class FeatureMap:
    """
    A feature map (N, T, C) between two rims of zeros, which are the padding of the convolutions that read it.

    :param n: N
    :param t: T
    :param channels: C
    :param rim: zeros at either end of T
    :param like: gives device and dtype
    """

    def __init__(self, n: int, t: int, channels: int, rim: int, like: th.Tensor) -> None:
        self.n, self.t, self.channels, self.rim = n, t, channels, rim
        self._data = like.new_zeros(n, t + 2 * rim, channels)
        row = (t + 2 * rim) * channels
        #: without the rims, as an image of height 1 in the memory format channels_last, for which group norm has a kernel
        self.inner = self._data.as_strided((n, channels, 1, t), (row, 1, row, channels), rim * channels)

    def windows(self, kernel: int, stride: int, padding: int) -> th.Tensor:
        """What a convolution sees, (N, T', kernel, C), a view."""
        t_out = (self.t + 2 * padding - kernel) // stride + 1
        c, row = self.channels, (self.t + 2 * self.rim) * self.channels
        return self._data.as_strided((self.n, t_out, kernel, c), (row, stride * c, c, 1), (self.rim - padding) * c)


class Scratch:
    """
    Memory for what is used up before the next layer begins: shared by all layers, it stays in the cache.

    :param like: gives device and dtype
    """

    def __init__(self, like: th.Tensor) -> None:
        self._data = like.new_empty(0)

    def take(self, *shape: int) -> th.Tensor:
        """An empty tensor, over whatever others hold."""
        size = math.prod(shape)
        if size > len(self._data):
            self._data = self._data.new_empty(size)
        return self._data[:size].view(shape)


class Convolution:
    """
    A convolution over T as one product of gathered windows with a matrix of weights.

    :param weight: (kernel * C_in, C_out)
    :param bias: (C_out,)
    :param onednn: oneDNN computes large products
    :param kernel: entries of T in a window
    :param padding: zeros at either end of T
    :param stride: entries from window to window
    """

    def __init__(self, weight: th.Tensor, bias: th.Tensor, onednn: bool, kernel: int, padding: int, stride: int = 1) -> None:
        self.weight, self.bias, self.onednn = weight, bias, onednn
        self.kernel, self.padding, self.stride = kernel, padding, stride
        self._packed: th.Tensor | None = None

    @classmethod
    def of(cls, conv: Any, onednn: bool) -> Convolution:
        """Of a ``Conv1d``."""
        weight = conv.weight.permute(2, 1, 0).flatten(0, 1).contiguous()
        return cls(weight, conv.bias, onednn, conv.kernel_size[0], conv.padding[0], conv.stride[0])

    @classmethod
    def of_transposed(cls, conv: Any, onednn: bool) -> Convolution:
        """``ConvTranspose1d(c, c, 4, stride=2, padding=1)``: each pair of outputs sees three neighbouring inputs."""
        w, zero = conv.weight, th.zeros_like(conv.weight[:, :, 0])  # (C_in, C_out, 4)
        # the even output sees taps 3 and 1 of the left and the middle input, the odd one 2 and 0 of the middle and the right
        even, odd = th.cat([w[:, :, 3], w[:, :, 1], zero]), th.cat([zero, w[:, :, 2], w[:, :, 0]])
        return cls(th.cat([even, odd], dim=1).contiguous(), conv.bias.repeat(2), onednn, kernel=3, padding=1)

    def reading(self, source: FeatureMap, scratch: Scratch, upsampled: bool = False) -> Callable[[], th.Tensor]:
        """
        Ties the convolution to the map that it reads; buffers are made here, once.

        :param source: the map
        :param scratch: for the windows
        :param upsampled: the outputs come in pairs that are neighbours in T
        :return: computes the output from what the map then holds, (N, C_out, 1, T')
        """
        windows = source.windows(self.kernel, self.stride, self.padding)
        n, t, k, c = windows.shape
        gathered = scratch.take(n, t, k, c)
        rows, c_out = gathered.view(n * t, k * c), self.weight.shape[1]
        if upsampled:
            t, c_out = 2 * t, c_out // 2
        shape, strides = (n, c_out, 1, t), (t * c_out, 1, t * c_out, c_out)
        weight, bias = self.weight, self.bias

        if self.onednn and rows.numel() * weight.shape[1] >= ONEDNN_FROM:
            linear = th.ops.mkldnn._linear_pointwise.default
            if self._packed is None:  # whatever the number of rows: oneDNN's layouts of other numbers are the same or as good
                self._packed = th.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), len(rows))
            packed = self._packed

            def convolve() -> th.Tensor:
                gathered.copy_(windows)
                return linear(rows, packed, bias, "none", [], "").as_strided(shape, strides)

        else:
            product = rows.new_empty(len(rows), weight.shape[1])
            image = product.as_strided(shape, strides)

            def convolve() -> th.Tensor:
                gathered.copy_(windows)
                th.addmm(bias, rows, weight, out=product)
                return image

        return convolve


class NormMish:
    """
    Group norm and Mish. With y = -x and q = sigmoid(y) = 1 / (1 + e^x), Mish is ``x * tanh(softplus(x))`` = ``y - 2y / (1 +
    q^2)``: seven times faster than torch's own kernel, which goes through log1p and tanh. The minus sign is the norm's.

    :param norm: a ``GroupNorm``
    """

    def __init__(self, norm: Any) -> None:
        self.norm, self.negated = norm, (-norm.weight, -norm.bias)

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (N, C, 1, T)
        :return: the same shape
        """
        norm = self.norm
        if x.numel() <= MISH_IN_ONE_CALL:
            return F.mish(th.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        y = th.group_norm(x, norm.num_groups, *self.negated, norm.eps)
        q = th.sigmoid(y)
        return th.addcdiv(y, y, th.addcmul(_ONE, q, q, out=q), value=-2.0)
