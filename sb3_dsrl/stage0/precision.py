"""Matrix products in bfloat16 where the processor multiplies it faster than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

#: Instructions that multiply bfloat16, as ``torch.cpu.get_capabilities`` names them.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


@contextmanager
def fast_products() -> Iterator[None]:
    """
    Within this block oneDNN may round the factors of matrix products and convolutions to bfloat16, on a CPU with instructions
    for that; sums, weights, activations and the optimiser stay in float32. It is torch's own switch, and if somebody has set
    it, it stays: ``torch.backends.mkldnn.matmul.fp32_precision = "ieee"`` keeps float32.
    """
    known: list[Any] = [getattr(th.backends.mkldnn, name, None) for name in ("matmul", "conv")]  # not before torch 2.9
    ours = [backend for backend in known if backend is not None and backend.fp32_precision == "none"]
    if not multiplies_bfloat16():
        ours = []
    for backend in ours:
        backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        for backend in ours:
            backend.fp32_precision = "none"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    found = th.cpu.get_capabilities() if hasattr(th.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in INSTRUCTIONS)
