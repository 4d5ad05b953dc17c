"""The U-Net on a CPU: weights packed once, buffers made once, and a program of a few calls a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dsrl.policies.activations import mish
from sb3_dsrl.policies.decoding.layers import Convolution, FeatureMap, NormMish, Scratch, has_onednn
from sb3_dsrl.policies.decoding.loop import Integrate, integrate_plainly, step_times
from sb3_dsrl.policies.networks import VelocityUNet

#: Noises that are decoded together on a CPU, so that the activations of the U-Net stay in a core's cache.
BLOCK_SIZE = 64

#: For so many noises the buffers of a decode are kept for the next one: making them takes a third of a step.
KEEP_BUFFERS = frozenset({*range(1, 9), BLOCK_SIZE})

#: Velocity of x (N, T, A), given the parts of all scales and shifts that depend on the observation, (N, all), and on the step,
#: (1, all); it is overwritten by the next call.
Program = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]


class _Block:
    """A :class:`~sb3_dsrl.policies.networks.FiLMResidualBlock` whose scale and shift are given."""

    def __init__(self, block: Any, onednn: bool) -> None:
        (conv1, norm1, _), (conv2, norm2, _) = block.conv1, block.conv2
        self.conv1, self.conv2 = Convolution.of(conv1, onednn), Convolution.of(conv2, onednn)
        self.norm1, self.norm2 = NormMish(norm1), NormMish(norm2)
        self.skip = Convolution.of(block.skip, onednn) if isinstance(block.skip, nn.Conv1d) else None
        self.channels = conv1.out_channels

    def between(
        self, source: FeatureMap, middle: FeatureMap, target: FeatureMap, scratch: Scratch
    ) -> Callable[[th.Tensor, th.Tensor], None]:
        """
        :param source: the map that it reads
        :param middle: a map of the target's shape for the block's own use
        :param target: the map that it writes
        :param scratch: for the convolutions
        :return: runs the block, given scale and shift (N, C, 1, 1)
        """
        conv1, conv2 = self.conv1.reading(source, scratch), self.conv2.reading(middle, scratch)
        skip = None if self.skip is None else self.skip.reading(source, scratch)

        def run(scale: th.Tensor, shift: th.Tensor) -> None:
            th.addcmul(shift, self.norm1(conv1()), scale, out=middle.inner)
            th.add(self.norm2(conv2()), source.inner if skip is None else skip(), out=target.inner)

        return run


class _PackedUNet:
    """The weights of a :class:`~sb3_dsrl.policies.networks.VelocityUNet` in the order in which decoding reads them."""

    def __init__(self, net: VelocityUNet, onednn: bool) -> None:
        self._of_steps: dict[int, th.Tensor] = {}
        self._idle: dict[int, list[Program]] = {}
        stages: list[Any] = [*net.down, net.mid, *net.up]
        modules = [block for stage in stages for block in (stage.block1, stage.block2)]
        self.blocks = [_Block(module, onednn) for module in modules]
        films = [module.film[1] for module in modules]
        n_embed = films[0].in_features - net.cond_dim
        self.film_step, self.film_cond = (
            part.contiguous() for part in th.cat([film.weight for film in films]).split([n_embed, net.cond_dim], dim=1)
        )
        self.film_bias = th.cat([film.bias for film in films])
        self.step_embedding, self.pred_horizon, self.action_dim = net.step_embedding, net.pred_horizon, net.action_dim
        resamples = [stage.resample for stage in stages]
        self.downsample = [Convolution.of(r, onednn) if isinstance(r, nn.Conv1d) else None for r in resamples[: len(net.down)]]
        self.upsample = [Convolution.of_transposed(r, onednn) for r in resamples if isinstance(r, nn.ConvTranspose1d)]
        conv, norm, _, last = net.outlet
        self.norm = NormMish(norm)
        self.conv, self.last = Convolution.of(conv, onednn), Convolution.of(last, onednn)
        self.rim = max(1, self.conv.padding)

    def film_of_steps(self, num_steps: int) -> th.Tensor:
        """The part of all scales and shifts that depends on (t, d), (n, 1, all)."""
        if num_steps not in self._of_steps:
            embedding = self.step_embedding(*step_times(num_steps, self.film_bias))
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
        if n in KEEP_BUFFERS:
            idle.append(program)

    @th.inference_mode(False)  # the next decode may run outside of it
    @th.no_grad()
    def _new_program(self, n: int) -> Program:
        """Allocates all buffers for N noises."""
        blocks = iter(self.blocks)
        work: list[Callable[[], Any]] = []  # in order
        film = self.film_bias.new_empty(n, len(self.film_bias))
        sizes = [block.channels for block in self.blocks for _ in range(2)]
        scales_and_shifts = iter(film[:, :, None, None].split(sizes, dim=1))
        scratch = Scratch(self.film_bias)
        middles: dict[tuple[int, int], FeatureMap] = {}

        def new_map(t: int, channels: int) -> FeatureMap:
            return FeatureMap(n, t, channels, self.rim, self.film_bias)

        def add_stage(source: FeatureMap) -> FeatureMap:
            for _ in range(2):
                block = next(blocks)
                target = new_map(source.t, block.channels)
                shape = source.t, block.channels
                if shape not in middles:
                    middles[shape] = new_map(*shape)
                run = block.between(source, middles[shape], target, scratch)
                work.append(partial(run, next(scales_and_shifts), next(scales_and_shifts)))
                source = target
            return source

        def add_conv(conv: Convolution, source: FeatureMap, t: int, upsampled: bool = False) -> FeatureMap:
            convolve = conv.reading(source, scratch, upsampled)
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
        last = self.last.reading(h, scratch)
        work.append(lambda: h.inner.copy_(self.norm(h.inner)))

        def velocity(x: th.Tensor, of_cond: th.Tensor, of_step: th.Tensor) -> th.Tensor:
            first.inner.copy_(x.transpose(1, 2).unsqueeze(2))
            th.add(of_cond, of_step, out=film)
            for part in work:
                part()
            return last().squeeze(2).transpose(1, 2)

        return velocity


def _integrate(net: VelocityUNet, onednn: bool, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
    packed = _packed(net, onednn)
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
                of_owners = of_cond[owners] if m > 1 else of_cond[start : start + size]
                for i in range(num_steps):
                    x = th.add(x, program(x, of_owners, of_steps[i]), alpha=1.0 / num_steps)
                chunks[start : start + size] = x
    return chunks.reshape(w.shape)


#: The packed networks of each network, and the parameters that they were packed from.
_PACKED: WeakKeyDictionary[VelocityUNet, tuple[Any, list[nn.Parameter], dict[bool, _PackedUNet]]] = WeakKeyDictionary()


def _packed(net: VelocityUNet, onednn: bool) -> _PackedUNet:
    """Packs the weights again only when they have changed."""
    cached = _PACKED.get(net)
    # Walking through all modules takes a millisecond. So the parameters are those of the last walk, as long as the first
    # one is still the net's own.
    if cached is None or cached[1][0] is not next(net.parameters()) or cached[0] != _state(cached[1]):
        parameters = list(net.parameters())
        cached = _PACKED[net] = (_state(parameters), parameters, {})
    packed = cached[2]
    if onednn not in packed:
        with th.inference_mode(False), th.no_grad():  # the next decode may run outside of it
            packed[onednn] = _PackedUNet(net, onednn)
    return packed[onednn]


def _state(parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(p._version, p.data_ptr()) for p in parameters]


def integrate_unet(onednn: bool) -> Integrate:
    """
    :param onednn: oneDNN computes large matrix products; otherwise torch's BLAS computes all
    :return: decodes a ``VelocityUNet`` on a CPU, without gradients
    """
    return lambda net, cond, w, num_steps: _integrate(cast(VelocityUNet, net), onednn, cond, w, num_steps)


#: Ways to decode a U-Net on this machine, by name. The first is the default.
PATHS: dict[str, Integrate] = {
    **({"onednn": integrate_unet(True)} if has_onednn() else {}),
    "blas": integrate_unet(False),
    "loop": integrate_plainly,
}
