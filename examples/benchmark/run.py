"""What steering costs beside the physics, and what the fast code gains over a plain version of the same thing.

    python examples/benchmark/run.py

Everything is measured side by side in one run, medians of several repeats; only the ratios mean anything, since the speed of
a machine drifts. The table goes to the terminal, the figures to runs/bench/report.json.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch as th
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this folder is the package "benchmark"

from benchmark.decode import bench_decode, matmul_limit
from benchmark.envs import bench_envs
from benchmark.fast import bench_fast
from benchmark.learning import bench_learning
from benchmark.measuring import Args
from benchmark.original import bench_peer
from benchmark.peers import raw_ceiling
from benchmark.pool import bench_envpool
from benchmark.report import print_report
from benchmark.simulator import bench_cuda, bench_growth, bench_images, bench_workers
from benchmark.stage0 import bench_stage0
from benchmark.stage1 import bench_stage1, bench_success
from sb3_dsrl import VelocityMLP, demo_transitions, load_demos, train_critic, train_flow


def main(args: Args) -> None:
    """Runs all parts and writes the report."""
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.time()
    limit = matmul_limit(args.repeats, args.device)
    report: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": th.__version__},
        "device": args.device if args.device == "cpu" else th.cuda.get_device_name(),
        "threads": th.get_num_threads(),
        "matmul_gflops": limit / 1e9,
    }
    decode = bench_decode(args, limit)
    for key in ("decode_speedup", "decode_2step_speedup"):
        report[key] = {str(c): {str(row["B"]): row[key] for row in decode if row["C"] == c} for c in (64, 562)}
    report["decode"] = decode
    report |= bench_peer(args.repeats, args.peer_batches)
    report |= bench_stage1(args)
    if args.simulate:
        report |= bench_stage0(args)
        demos = load_demos(args.demo_path)
        kwargs = dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=4, act_horizon=4, num_steps=4)
        flow = train_flow(demos, n_iterations=1_000, seed=0, progress_bar=True, **kwargs)  # type: ignore[arg-type]
        train_critic(flow, demo_transitions(flow, demos, ignore_terminations=True), n_iterations=300, progress_bar=True)
        th.set_num_threads(1)  # as in run_recipe.py: the other cores are for the simulators
        report |= bench_workers(args, flow)  # before others start workers
        report |= bench_fast(args) | bench_envs(args) | bench_envpool(args)
        report |= bench_learning(args, flow) | bench_growth(args, flow)
        report["raw_ceiling"] = raw_ceiling(args.env_id, str(flow.control_mode))
        report |= bench_images(args, flow)
        th.set_num_threads(report["threads"])
        report["stage1_success"] = bench_success(args, flow, demos)
        if args.cuda_envs:
            report |= bench_cuda(args, flow.to(args.device))
    report["seconds"] = time.time() - start
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(args, report)


if __name__ == "__main__":
    main(tyro.cli(Args))
