"""
Integrating a velocity field from noise to chunk, quickly: the same function as a loop of forward passes, in another order.

What depends on the observation alone is computed once per observation, and what depends on (t, d) alone once per decode,
instead of once per step and noise. The U-Net's convolutions over a few entries become plain matrix products in a
layout with channels last, and large batches are cut into blocks whose activations stay in the cache.

Letters in shapes: ``B`` observations, ``M`` noises for each, ``T`` = pred_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dsrl.policies.activations import mish
from sb3_dsrl.policies.networks import VelocityMLP, VelocityNet, VelocityUNet

#: Noises that are decoded together on a CPU, so that the activations of the U-Net stay in a core's cache.
BLOCK_SIZE = 64

#: Up to so many noises the buffers of a decode are kept for the next one: making them takes a third of a step.
KEEP_BUFFERS = 8

#: Velocity at step i for noises (B, M, T, A), once the conditioning is fixed.
Velocity = Callable[[th.Tensor, int], th.Tensor]
#: Velocity of x (N, T, A), given all scales and shifts (N, all) of a U-Net; it is overwritten by the next call.
Program = Callable[[th.Tensor, th.Tensor], th.Tensor]
#: From (velocity field, cond, w, num_steps) to chunks, as :func:`integrate`.
Integrate = Callable[[VelocityNet, th.Tensor, th.Tensor, int], th.Tensor]


def integrate(velocity: VelocityNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
    """
    Takes ``num_steps`` equal shortcut steps from t = 0 to t = 1. The quick ways are for the CPU: on any other device the loop
    of forward passes is as fast, and it can be compiled, see :func:`accelerated`.

    :param velocity: the velocity field
    :param cond: (B, C)
    :param w: noises, (B, M, T, A)
    :param num_steps: n; the step size is 1 / n
    :return: (B, M, T, A)
    """
    if w.device.type == "cpu" and not th.is_grad_enabled():
        if isinstance(velocity, VelocityUNet):
            return _unet(velocity, cond, w, num_steps)
        if isinstance(velocity, VelocityMLP):
            return _walk(_mlp(velocity, cond, num_steps), w, num_steps)
    return _walk(_plain(velocity, cond, num_steps), w, num_steps)


def accelerated(dtype: th.dtype | None, compile_kwargs: dict[str, Any] | None) -> Integrate:
    """
    The plain loop in lower precision and compiled, to take the place of :func:`integrate` on a GPU.

    :param dtype: of the matrix products (autocast), such as ``torch.bfloat16``; None is float32
    :param compile_kwargs: of ``torch.compile``; None compiles nothing
    """

    def run(velocity: VelocityNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
        with th.autocast(w.device.type, dtype, enabled=dtype is not None):
            return _walk(_plain(velocity, cond, num_steps), w, num_steps).float()

    compiled = run if compile_kwargs is None else th.compile(run, **compile_kwargs)
    return lambda *args: compiled(*args).clone()  # the next replay of a CUDA graph writes to the same memory


def _walk(velocity: Velocity, x: th.Tensor, num_steps: int) -> th.Tensor:
    for i in range(num_steps):
        x = th.add(x, velocity(x, i), alpha=1.0 / num_steps)
    return x


def _plain(velocity: VelocityNet, cond: th.Tensor, num_steps: int) -> Velocity:
    """Any velocity field: full forward passes."""

    def at(x: th.Tensor, i: int) -> th.Tensor:
        d = th.full((x.shape[0] * x.shape[1],), 1.0 / num_steps, device=x.device, dtype=x.dtype)
        return velocity(x.flatten(0, 1), d * i, d, cond.repeat_interleave(x.shape[1], dim=0)).unflatten(0, x.shape[:2])

    return at


def _times(num_steps: int, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    d = th.full((num_steps,), 1.0 / num_steps, device=like.device, dtype=like.dtype)
    return d * th.arange(num_steps, device=like.device), d


# ------------------------------------------------------------------------------------------------------------------ MLP


def _mlp(net: VelocityMLP, cond: th.Tensor, num_steps: int) -> Velocity:
    n_x = net.pred_horizon * net.action_dim
    from_x, from_step, from_cond = net.inlet.weight.split([n_x, net.inlet.in_features - n_x - net.cond_dim, net.cond_dim], 1)
    of_steps = F.linear(net.step_embedding(*_times(num_steps, cond)), from_step, net.inlet.bias)
    of_cond = F.linear(cond, from_cond)[:, None]

    blocks: list[Any] = list(net.blocks)
    outlet: Any = net.outlet

    def at(x: th.Tensor, i: int) -> th.Tensor:
        h = F.linear(x.flatten(2), from_x) + (of_cond + of_steps[i])
        for norm, _, linear1, _, linear2 in blocks:
            h = h + linear2(mish(linear1(mish(norm(h)))))
        norm, _, linear = outlet
        return linear(mish(norm(h))).reshape(x.shape)

    return at


# ---------------------------------------------------------------------------------------------------------------- U-Net


class _Map:
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


class _Conv:
    """A convolution over T as one product of gathered windows with a matrix of weights (kernel * C_in, C_out)."""

    def __init__(self, weight: th.Tensor, bias: th.Tensor, kernel: int, padding: int, stride: int = 1) -> None:
        self.weight, self.bias, self.kernel, self.padding, self.stride = weight, bias, kernel, padding, stride

    @classmethod
    def of(cls, conv: Any) -> _Conv:
        weight = conv.weight.permute(2, 1, 0).flatten(0, 1).contiguous()
        return cls(weight, conv.bias, conv.kernel_size[0], conv.padding[0], conv.stride[0])

    @classmethod
    def of_transposed(cls, conv: Any) -> _Conv:
        """``ConvTranspose1d(c, c, 4, stride=2, padding=1)``: each pair of outputs sees three neighbouring inputs."""
        w, zero = conv.weight, th.zeros_like(conv.weight[:, :, 0])  # (C_in, C_out, 4)
        # the even output sees taps 3 and 1 of the left and the middle input, the odd one 2 and 0 of the middle and the right
        even, odd = th.cat([w[:, :, 3], w[:, :, 1], zero]), th.cat([zero, w[:, :, 2], w[:, :, 0]])
        return cls(th.cat([even, odd], dim=1).contiguous(), conv.bias.repeat(2), kernel=3, padding=1)

    def reading(self, source: _Map, upsampled: bool = False) -> Callable[[], th.Tensor]:
        """
        Ties the convolution to the map that it reads; buffers are made here, once.

        :param source: the map
        :param upsampled: the outputs come in pairs that are neighbours in T
        :return: computes the output from what the map then holds, (N, C_out, 1, T')
        """
        windows = source.windows(self.kernel, self.stride, self.padding)
        n, t, k, c = windows.shape
        gathered = windows.new_empty(n, t, k, c)
        product = windows.new_empty(n * t, self.weight.shape[1])
        if upsampled:
            t *= 2
        channels = product.numel() // (n * t)
        image = product.as_strided((n, channels, 1, t), (t * channels, 1, t * channels, channels))
        rows = gathered.view(len(product), -1)

        def convolve() -> th.Tensor:
            gathered.copy_(windows)
            th.addmm(self.bias, rows, self.weight, out=product)
            return image

        return convolve


def _norm_mish(norm: Any, x: th.Tensor) -> th.Tensor:
    return mish(th.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


class _Block:
    """A :class:`~sb3_dsrl.policies.networks.FiLMResidualBlock` whose scale and shift are given."""

    def __init__(self, block: Any) -> None:
        (conv1, self.norm1, _), (conv2, self.norm2, _) = block.conv1, block.conv2
        self.conv1, self.conv2 = _Conv.of(conv1), _Conv.of(conv2)
        self.skip = _Conv.of(block.skip) if isinstance(block.skip, nn.Conv1d) else None
        self.channels = conv1.out_channels

    def between(self, source: _Map, target: _Map) -> Callable[[th.Tensor, th.Tensor], None]:
        """
        :param source: the map that it reads
        :param target: the map that it writes
        :return: runs the block, given scale and shift (N, C, 1, 1)
        """
        middle = _Map(source.n, source.t, self.channels, source.rim, source.inner)
        conv1, conv2 = self.conv1.reading(source), self.conv2.reading(middle)
        skip = None if self.skip is None else self.skip.reading(source)

        def run(scale: th.Tensor, shift: th.Tensor) -> None:
            th.addcmul(shift, _norm_mish(self.norm1, conv1()), scale, out=middle.inner)
            th.add(_norm_mish(self.norm2, conv2()), source.inner if skip is None else skip(), out=target.inner)

        return run


class _PackedUNet:
    """The weights of a :class:`~sb3_dsrl.policies.networks.VelocityUNet` in the order in which decoding reads them."""

    def __init__(self, net: VelocityUNet) -> None:
        self._of_steps: dict[int, th.Tensor] = {}
        self._idle: dict[int, list[Program]] = {}
        stages: list[Any] = [*net.down, net.mid, *net.up]
        modules = [block for stage in stages for block in (stage.block1, stage.block2)]
        self.blocks = [_Block(module) for module in modules]
        films = [module.film[1] for module in modules]
        n_embed = films[0].in_features - net.cond_dim
        self.film_step, self.film_cond = (
            part.contiguous() for part in th.cat([film.weight for film in films]).split([n_embed, net.cond_dim], dim=1)
        )
        self.film_bias = th.cat([film.bias for film in films])
        self.step_embedding, self.pred_horizon, self.action_dim = net.step_embedding, net.pred_horizon, net.action_dim
        resamples = [stage.resample for stage in stages]
        self.downsample = [_Conv.of(r) if isinstance(r, nn.Conv1d) else None for r in resamples[: len(net.down)]]
        self.upsample = [_Conv.of_transposed(r) for r in resamples if isinstance(r, nn.ConvTranspose1d)]
        conv, self.norm, _, last = net.outlet
        self.conv, self.last = _Conv.of(conv), _Conv.of(last)
        self.rim = max(1, self.conv.padding)

    def film_of_steps(self, num_steps: int) -> th.Tensor:
        """The part of all scales and shifts that depends on (t, d), (n, 1, all)."""
        if num_steps not in self._of_steps:
            embedding = self.step_embedding(*_times(num_steps, self.film_bias))
            self._of_steps[num_steps] = F.linear(mish(embedding), self.film_step, self.film_bias)[:, None]
        return self._of_steps[num_steps]

    def film_of_cond(self, cond: th.Tensor) -> th.Tensor:
        """The part that depends on the observation, (B, all)."""
        return F.linear(mish(cond), self.film_cond)

    @contextmanager
    def program(self, n: int) -> Iterator[Program]:
        """
        A program for N noises that nobody else runs meanwhile.

        :param n: N
        """
        idle = self._idle.setdefault(n, [])
        program = idle.pop() if idle else self._new_program(n)
        yield program
        if n <= KEEP_BUFFERS:
            idle.append(program)

    @th.inference_mode(False)  # the next decode may run outside of it
    @th.no_grad()
    def _new_program(self, n: int) -> Program:
        """Allocates all buffers for N noises."""
        blocks = iter(self.blocks)
        work: list[Callable[[], Any]] = []  # in order; blocks take their scale and shift from `film`
        film: list[th.Tensor] = []

        def new_map(t: int, channels: int) -> _Map:
            return _Map(n, t, channels, self.rim, self.film_bias)

        def add_stage(source: _Map) -> _Map:
            for _ in range(2):
                block = next(blocks)
                target = new_map(source.t, block.channels)
                run = block.between(source, target)
                work.append(lambda run=run: run(film.pop(), film.pop()))  # type: ignore[misc]
                source = target
            return source

        def add_conv(conv: _Conv, source: _Map, t: int, upsampled: bool = False) -> _Map:
            convolve = conv.reading(source, upsampled)
            target = new_map(t, convolve().shape[1])
            work.append(lambda: target.inner.copy_(convolve()))
            return target

        first = h = new_map(self.pred_horizon, self.action_dim)
        skips = []
        for conv in self.downsample:
            h = add_stage(h)
            skips.append(h)
            h = h if conv is None else add_conv(conv, h, h.t // 2)
        h = add_stage(h)
        for conv in self.upsample:
            skip, below = skips.pop(), h
            both = new_map(h.t, h.channels + skip.channels)
            work.append(lambda a=below, b=skip, both=both: th.cat([a.inner, b.inner], dim=1, out=both.inner))  # type: ignore[misc]
            h = add_stage(both)
            h = add_conv(conv, h, 2 * h.t, upsampled=True)
        h = add_conv(self.conv, h, h.t)
        last = self.last.reading(h)
        work.append(lambda: h.inner.copy_(_norm_mish(self.norm, h.inner)))
        sizes = [block.channels for block in self.blocks for _ in range(2)]

        def velocity(x: th.Tensor, scales_and_shifts: th.Tensor) -> th.Tensor:
            first.inner.copy_(x.transpose(1, 2).unsqueeze(2))
            film[:] = reversed(scales_and_shifts[:, :, None, None].split(sizes, dim=1))
            for part in work:
                part()
            return last().squeeze(2).transpose(1, 2)

        return velocity


def _unet(net: VelocityUNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
    packed = _packed(net)
    of_steps = packed.film_of_steps(num_steps)
    m = w.shape[1]
    noises, of_cond = w.flatten(0, 1), packed.film_of_cond(cond)
    rows = min(BLOCK_SIZE, len(noises))
    chunks = th.empty_like(noises)
    full = len(noises) - len(noises) % rows
    for begin, end, size in ((0, full, rows), (full, len(noises), len(noises) - full)):
        if begin == end:
            continue
        with packed.program(size) as program:
            for start in range(begin, end, size):
                x = noises[start : start + size]
                owners = th.arange(start, start + size, device=w.device) // m
                film = of_cond[owners] if m > 1 else of_cond[start : start + size]
                for i in range(num_steps):
                    x = th.add(x, program(x, film + of_steps[i]), alpha=1.0 / num_steps)
                chunks[start : start + size] = x
    return chunks.reshape(w.shape)


_PACKED: WeakKeyDictionary[VelocityUNet, tuple[Any, list[nn.Parameter], _PackedUNet]] = WeakKeyDictionary()


def _packed(net: VelocityUNet) -> _PackedUNet:
    """Packs the weights again only when they have changed."""
    cached = _PACKED.get(net)
    # Walking through all modules takes a millisecond. So the parameters are those of the last walk, as long as the first
    # one is still the net's own.
    if cached is not None and cached[1][0] is next(net.parameters()):
        parameters = cached[1]
        state = [(p._version, p.data_ptr()) for p in parameters]
        if cached[0] == state:
            return cached[2]
    parameters = list(net.parameters())
    packed = _PackedUNet(net)
    _PACKED[net] = ([(p._version, p.data_ptr()) for p in parameters], parameters, packed)
    return packed
