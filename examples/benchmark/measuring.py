"""What every part measures with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from sb3_dsrl import FlowPolicy

#: Of the decodes and of stage 1: action dim, pred_horizon, act_horizon, decoding steps, candidates
A, T, H, N_STEPS, M = 8, 16, 8, 8, 16
Timed = dict[str, float]


@dataclass
class Args:
    """Benchmark of decode, stage 1 and simulation."""

    env_id: str = "PushCube-v1"
    """ManiSkill task."""
    demo_path: Path = Path(__file__).parents[1] / "demos" / "PushCube-v1.h5"
    """Demos for the flow of the simulation part."""
    output: Path = Path("runs/bench")
    """Folder for report.json."""
    repeats: int = 5
    """Repeats of each measurement; their median counts."""
    device: str = "cpu"
    """Device of decode and stage 1; with "cuda", compiled and bf16 decodes are measured too."""
    batches: tuple[int, ...] = (1, 8, 64, 256, 4096)
    """B of the decodes."""
    peer_batches: tuple[int, ...] = (1, 8, 64, 256, 1024)
    """B of the decodes that are compared with the original's."""
    stage1_batch: int = 256
    """Observations in a batch of stage 1, with 16 candidates each."""
    simulate: bool = True
    """Measure the simulator too."""
    fast_tasks: tuple[str, ...] = (
        "PushCube-v1",
        "PickCube-v1",
        "LiftPegUpright-v1",
        "StackCube-v1",
        "PegInsertionSide-v1",
    )
    """Tasks on which fast stepping is measured."""
    cuda_envs: tuple[int, ...] = ()
    """Measure physx_cuda with these numbers of envs; needs a GPU and SAPIEN's GPU PhysX library."""


def side_by_side(parts: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Timed:
    """Median seconds of each part; the parts take turns, so that a slow minute of the machine hits them all."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if device != "cpu":
                th.cuda.synchronize()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def unet_flow(cond_dim: int, device: str) -> FlowPolicy:
    """The default U-Net, untrained."""
    th.manual_seed(0)
    return FlowPolicy.create(cond_dim, A, obs_horizon=1, pred_horizon=T, act_horizon=H, num_steps=N_STEPS).freeze().to(device)
