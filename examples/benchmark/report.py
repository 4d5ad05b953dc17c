"""The tables that a benchmark prints."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmark.measuring import Args, M, T


def print_report(args: Args, report: dict[str, Any]) -> None:
    """
    Prints all that was measured.

    :param args: the flags
    :param report: what ``report.json`` holds
    """
    table(f"decode, U-Net, T = {T}, against {report['matmul_gflops']:.0f} GFLOP/s of a matrix product", report["decode"])
    table("decode on the CPU, times faster than the original's, 8 steps", report["decode_peer"])
    keys = [key for key in report if key.startswith("stage1_") and key.endswith("speedup")]
    table(f"stage 1, B = {args.stage1_batch}, M = {M}: times faster than plain", [{key: report[key] for key in keys}])
    if args.simulate:
        print(f"stage 0, small MLP: {report['stage0_speedup']:.2f} times faster than plain, to the same held-out loss")
        table("env steps per second of one env: ManiSkill's own, fast, and physics alone; H = 8", report["fast"])
        table("env steps per second: make_latent_env, and stock SubprocVecEnv with raw envs; H = 8", report["envs"])
        rows = [{"env": env_id, "stacked_ratio": ratio} for env_id, ratio in report["stacked_ratio"].items()]
        table("4 envs in one worker, evaluated together: times the rate of ManiSkill's own stepping; H = 8", rows)
        print(f"cores that step raw envs and never wait for each other: {report['raw_ceiling']:.0f} env steps/s")
        print(f"128 x 128 images, H = 8, one env: {report['image_speedup']:.1f} times the rate of rendering every step")
        print(f"8 envs in one worker a core over 8 envs in one worker: {report['cores_gain']:.2f}")
        start, memory = report["start_s"], report["worker_mb"]
        print(f"8 envs start in {start['first']:.1f} s, later ones in {start['later']:.1f} s")
        print("MB of a worker, the last not shared: " + ", ".join(f"{kind} {mb:.0f}" for kind, mb in memory.items()))
        table("shares of the wall time of stage 2, make demo's flow", [report["stage2_share"]])
        if report["envpool_steps_per_second"]:
            rows = [{"task": task, **rates} for task, rates in report["envpool_steps_per_second"].items()]
            table("env steps per second of 16 envs in EnvPool on one core, H = 4", rows)
        table("us per env step beside the physics, batched envs", [report["us_per_env_step"]])
        print(f"64 envs over 8: {report['growth_64_over_8']:.2f}")
        table(
            "success at the end after stage 1 from demos, 500 iterations, fresh and cached candidates",
            [report["stage1_success"]],
        )
    print(f"\n{report['seconds']:.0f} s; all figures are in {args.output}/report.json")


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows."""
    print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format)}", flush=True)


def markdown(report: dict[str, Any]) -> str:
    """
    The tables of the README.

    :param report: what ``report.json`` holds
    """
    batches = list(report["decode_peer_ratio"]["64"])
    lines = [f"| features C | {' | '.join(f'B = {batch}' for batch in batches)} |", f"|---|{'---|' * len(batches)}"]
    for features, ratios in report["decode_peer_ratio"].items():
        lines.append(f"| {features} | {' | '.join(f'{ratios[batch]:.1f}' for batch in batches)} |")
    names = ("fast_ratio", "stacked_ratio", "physics_ratio")
    lines += ["", "| task | one env | 4 envs in one process | physics alone | steered, 4 envs | steered, 8 envs |"]
    lines += ["|---|---|---|---|---|---|"]
    for task, ratios in report["env_ratio"].items():
        cells = [*(report[name][task] for name in names), ratios["4"], ratios["8"]]
        lines.append(f"| {task} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines)
