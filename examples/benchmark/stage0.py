"""Stage 0 against the same training with torch's own Mish, in float32, with an AdamW of many small operations."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch as th

from benchmark.measuring import Args, side_by_side
from sb3_dsrl import Validation, VelocityMLP, load_demos, train_flow
from sb3_dsrl.policies import activations
from sb3_dsrl.stage0 import precision
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.utils.progress import ProgressLoop

ITERATIONS = 400


@contextmanager
def plainly() -> Iterator[None]:
    """Without what makes it quick."""
    adamw = th.optim.AdamW
    with ExitStack() as stack:
        stack.enter_context(patch.object(activations, "MIN_SIZE", float("inf")))
        stack.enter_context(patch.object(precision, "multiplies_bfloat16", lambda: False))
        stack.enter_context(
            patch.object(th.optim, "AdamW", lambda *args, **kwargs: adamw(*args, **(kwargs | {"fused": False})))
        )
        yield


def bench_stage0(args: Args) -> dict[str, Any]:
    """Seconds of both trainings, one thread, taking turns, and the loss on held-out demos that each ends with."""
    demos, threads = load_demos(args.demo_path), th.get_num_threads()
    losses: dict[str, float] = {}
    th.set_num_threads(1)
    try:
        timed = side_by_side({name: lambda name=name: _train(demos, name, losses) for name in ("plain", "ours")}, args.repeats)  # type: ignore[misc]
    finally:
        th.set_num_threads(threads)
    return {"stage0_speedup": timed["plain"] / timed["ours"], "stage0_validation_loss": losses}


def _train(demos: Demos, name: str, losses: dict[str, float]) -> None:
    record = ProgressLoop.record

    def keep(loop: ProgressLoop, scalars: Any) -> None:
        losses[name] = scalars.get("flow/validation_loss", losses.get(name))
        record(loop, scalars)

    with ExitStack() as stack:
        stack.enter_context(patch.object(ProgressLoop, "record", keep))
        if name == "plain":
            stack.enter_context(plainly())
        sizes: dict[str, Any] = dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=8, act_horizon=8)
        train_flow(demos, n_iterations=ITERATIONS, seed=0, validation=Validation(freq=ITERATIONS), device="cpu", **sizes)
