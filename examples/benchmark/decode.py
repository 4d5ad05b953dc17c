"""Decoding against a plain loop."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils.flop_counter import FlopCounterMode

from benchmark.measuring import N_STEPS, A, Args, T, side_by_side, unet_flow
from benchmark.peers import plain_decode
from sb3_dsrl.policies.networks import VelocityNet


def matmul_limit(repeats: int, device: str) -> float:
    """FLOP/s of a matrix product of the size that dominates the U-Net."""
    x, y = th.randn(1024, 1280, device=device), th.randn(1280, 256, device=device)
    timed = side_by_side({"matmul": lambda: [x @ y for _ in range(20)]}, repeats, device)
    return 20 * 2 * 1024 * 1280 * 256 / timed["matmul"]


def unet_flop(net: VelocityNet) -> float:
    """FLOP of one forward pass of one sample."""
    counter = FlopCounterMode(display=False)
    p = next(net.parameters())
    x, t = th.randn(1, T, A, device=p.device), th.zeros(1, device=p.device)
    with counter:
        net(x, t, t, th.zeros(1, net.cond_dim, device=p.device))
    return float(counter.get_total_flops())


@th.no_grad()
def bench_decode(args: Args, limit: float) -> list[dict[str, Any]]:
    """Part a: decode against the plain loop."""
    rows = []
    for cond_dim in (64, 562):
        flow = unet_flow(cond_dim, args.device)
        flop = unet_flop(flow.net)
        for batch in args.batches:
            cond, w = th.randn(batch, cond_dim, device=args.device), th.randn(batch, T, A, device=args.device)
            # at large batches the time per sample is flat: half the steps tell the ratio
            steps = N_STEPS if batch <= 256 else 2
            parts: dict[str, Callable[[], Any]] = {
                "plain": lambda c=cond, w=w, n=steps, f=flow: plain_decode(f.net, c, w, n),  # type: ignore[misc]
                "ours": lambda c=cond, w=w, n=steps, f=flow: f.decode(c, w, n),  # type: ignore[misc]
                "ours, 2 steps": lambda c=cond, w=w, f=flow: f.decode(c, w, 2),  # type: ignore[misc]
            }
            if args.device != "cpu":
                quick = unet_flow(cond_dim, args.device).accelerate(th.bfloat16, dict(mode="reduce-overhead"))
                parts["compiled, bf16"] = lambda c=cond, w=w, n=steps, f=quick: f.decode(c, w, n)  # type: ignore[misc]
            timed = side_by_side(parts, args.repeats, args.device)
            error = (plain_decode(flow.net, cond, w, steps) - flow.decode(cond, w, steps)).abs().max().item()
            per_step = timed["ours"] / steps
            rows.append(
                {
                    "C": cond_dim,
                    "B": batch,
                    "plain_ms_per_step": 1e3 * timed["plain"] / steps,
                    "ours_ms_per_step": 1e3 * per_step,
                    "decode_speedup": timed["plain"] / timed["ours"],
                    "decode_2step_speedup": timed["plain"] * N_STEPS / steps / timed["ours, 2 steps"],
                    "plain_of_matmul_limit": flop * batch / (timed["plain"] / steps) / limit,
                    "ours_of_matmul_limit": flop * batch / per_step / limit,
                    "max_error": error,
                }
            )
            if "compiled, bf16" in timed:
                rows[-1]["compiled_bf16_speedup"] = timed["plain"] / timed["compiled, bf16"]
            print({key: round(value, 7 if key == "max_error" else 2) for key, value in rows[-1].items()}, flush=True)
    return rows
