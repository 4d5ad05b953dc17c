"""The decode of AWShortCutFlowAgent's latent policy in plain torch, as a peer: what steering cost before this package.

The network is the agent's ``ShortCutVelocityUNet1D`` (https://github.com/Desperodoo/rl-vla, ``rlft``) in its own layout, so
that a checkpoint's tensors fit by their names. Every step is a full forward pass: it embeds t and d, although the network has
no use for d, and computes each FiLM anew from the embedding and the features.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn

from benchmark.measuring import N_STEPS, A, T
from sb3_dsrl.policies.awsc import legacy_name
from sb3_dsrl.policies.decoding import integrate
from sb3_dsrl.policies.networks import TimestepEmbedding, VelocityUNet


class Sinusoid(nn.Module):
    """The transformer's embedding of whole numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.n_freqs = dim // 2

    def forward(self, t: th.Tensor) -> th.Tensor:
        angles = t[:, None] * th.exp(th.arange(self.n_freqs, device=t.device) * -(math.log(10_000) / (self.n_freqs - 1)))[None]
        return th.cat([angles.sin(), angles.cos()], dim=-1)


class Convolved(nn.Module):
    """Convolution, group norm, Mish."""

    def __init__(self, c_in: int, c_out: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(c_in, c_out, kernel, padding=kernel // 2), nn.GroupNorm(groups, c_out), nn.Mish())

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.block(x)


class Residual(nn.Module):
    """Two of them with a FiLM in between."""

    def __init__(self, c_in: int, c_out: int, cond: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Convolved(c_in, c_out, kernel, groups), Convolved(c_out, c_out, kernel, groups)])
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * c_out))
        self.residual_conv = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: th.Tensor, cond: th.Tensor) -> th.Tensor:
        scale, shift = self.cond_encoder(cond).unflatten(1, (2, -1, 1)).unbind(1)
        return self.blocks[1](scale * self.blocks[0](x) + shift) + self.residual_conv(x)


class Resampled(nn.Module):
    """A strided convolution under the name that the checkpoints have for it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(x)


class OriginalUNet(nn.Module):
    """
    The agent's velocity field, with the weights of ours.

    :param net: ours; its embedding is the agent's, a ``TimestepEmbedding``
    """

    def __init__(self, net: VelocityUNet) -> None:
        super().__init__()
        embed, kernel, groups = net.step_embedding.dim, net.config["kernel_size"], net.config["n_groups"]
        widths = net.config["widths"]
        sizes = (embed + net.cond_dim, kernel, groups)
        self.step_size_embed = nn.Sequential(nn.Linear(1, embed), nn.Mish(), nn.Linear(embed, embed))
        self.unet = nn.Module()
        self.unet.diffusion_step_encoder = nn.Sequential(
            Sinusoid(embed), nn.Linear(embed, 4 * embed), nn.Mish(), nn.Linear(4 * embed, embed)
        )
        pairs = list(zip([net.action_dim, *widths], widths, strict=False))
        self.unet.down_modules = nn.ModuleList(
            nn.ModuleList(
                [
                    Residual(a, b, *sizes),
                    Residual(b, b, *sizes),
                    Resampled(nn.Conv1d(b, b, 3, 2, 1)) if i < len(pairs) else nn.Identity(),
                ]
            )
            for i, (a, b) in enumerate(pairs, start=1)
        )
        self.unet.mid_modules = nn.ModuleList([Residual(widths[-1], widths[-1], *sizes) for _ in range(2)])
        self.unet.up_modules = nn.ModuleList(
            nn.ModuleList([Residual(2 * b, a, *sizes), Residual(a, a, *sizes), Resampled(nn.ConvTranspose1d(a, a, 4, 2, 1))])
            for a, b in reversed(pairs[1:])
        )
        self.unet.final_conv = nn.Sequential(
            Convolved(widths[0], widths[0], kernel, groups), nn.Conv1d(widths[0], net.action_dim, 1)
        )
        self.unet.load_state_dict({legacy_name(name): value for name, value in net.state_dict().items()})
        self.eval()

    def forward(self, x: th.Tensor, t: th.Tensor, d: th.Tensor, cond: th.Tensor) -> th.Tensor:
        self.step_size_embed(d.unsqueeze(-1))
        unet: Any = self.unet
        film = th.cat([unet.diffusion_step_encoder((t * 100).long()), cond], dim=-1)
        h, skips = x.movedim(-1, -2), []
        for block1, block2, resample in unet.down_modules:
            h = block2(block1(h, film), film)
            skips.append(h)
            h = resample(h)
        for block in unet.mid_modules:
            h = block(h, film)
        for block1, block2, resample in unet.up_modules:
            h = resample(block2(block1(th.cat([h, skips.pop()], dim=1), film), film))
        return unet.final_conv(h).movedim(-1, -2)


@th.no_grad()
def original_decode(net: OriginalUNet, cond: th.Tensor, w: th.Tensor, num_steps: int) -> th.Tensor:
    """
    The agent's ``sample_actions_from_latent``.

    :param net: its velocity field
    :param cond: (B, C)
    :param w: noises, (B, T, A)
    :param num_steps: n
    :return: chunks, (B, T, A)
    """
    x, dt = w.clone(), 1.0 / num_steps
    d = th.full((len(w),), dt, device=w.device)
    for i in range(num_steps):
        x = x + dt * net(x, th.full((len(w),), i * dt, device=w.device), d, cond)
    return x.clamp(-1.0, 1.0)


def times_faster(part: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> list[float]:
    """How many times faster a part is than its peer, sorted, one ratio for each pair of runs side by side."""
    ratios = []
    for repeat in range(repeats + 1):
        seconds = []
        for run in (peer, part):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if repeat:  # the first round warms up
            ratios.append(seconds[0] / seconds[1])
    return sorted(ratios)


@th.no_grad()
def bench_peer(repeats: int, batches: Sequence[int], cond_dims: Sequence[int] = (64, 562)) -> dict[str, Any]:
    """
    The default U-Net's decode against the peer on the CPU, with the same weights.

    :param repeats: pairs of runs; their median counts; eight times as many up to B = 8
    :param batches: B, each with its own noise
    :param cond_dims: C
    :return: ``decode_peer_ratio``, C -> B -> times faster; ``decode_peer``, the same in rows with the lowest and the highest
    """
    rows = []
    for cond_dim in cond_dims:
        th.manual_seed(0)
        net = VelocityUNet(A, T, cond_dim, step_embedding=TimestepEmbedding(64)).eval()
        peer = OriginalUNet(net)
        for batch in batches:
            cond, w = th.randn(batch, cond_dim), th.randn(batch, T, A)

            def ours(net: VelocityUNet = net, cond: th.Tensor = cond, w: th.Tensor = w) -> th.Tensor:
                return integrate(net, cond, w[:, None], N_STEPS)[:, 0].clamp(-1.0, 1.0)

            def theirs(peer: OriginalUNet = peer, cond: th.Tensor = cond, w: th.Tensor = w) -> th.Tensor:
                return original_decode(peer, cond, w, N_STEPS)

            ratios = times_faster(ours, theirs, repeats * 8 if batch <= 8 else repeats)
            error = (ours() - theirs()).abs().max().item()
            spread = {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
            rows.append({"C": cond_dim, "B": batch, **spread, "max_error": error})
            print({key: round(value, 7 if key == "max_error" else 2) for key, value in rows[-1].items()}, flush=True)
    ratio = {str(c): {str(row["B"]): row["median"] for row in rows if row["C"] == c} for c in cond_dims}
    return {"decode_peer_ratio": ratio, "decode_peer": rows}
