"""Latent steering, its controls and SB3 baselines: the same env steps, the same evaluation episodes.

    python examples/compare/run.py --env_ids PushCube-v1 --methods prior ticket stage1_stage2 sac_dense --seeds 0 1 2

Each run is a file, runs/compare/<env_id>/<method>/<seed>.json. Finished runs are skipped, so the command can be stopped and
given again, with more seeds or methods, too; with another budget or other evaluations it needs a folder of its own.
results.csv, report.md and the plots are made anew each time from all of them.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import set_random_seed
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # "common", and this folder as the package "compare"

from compare.methods import ALL, METHODS, NO_SEED
from compare.report import write_report
from compare.trial import GAMMA, TASKS, Task, Trial
from sb3_dsrl import FlowPolicy, VelocityMLP, demo_transitions, evaluate, load_demos, train_critic, train_flow
from sb3_dsrl.cli.common import EVAL_SEED, cli
from sb3_dsrl.utils.checkpoint import atomic_file

EXAMPLES = Path(__file__).parents[1]
SETTINGS = ("budget", "num_envs", "num_eval_episodes")  # that all runs of a folder share


@dataclass(kw_only=True)
class Args:
    """Compare latent steering with its controls and with SB3 baselines."""

    env_ids: tuple[str, ...] = tuple(TASKS)
    """Tasks."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods; other recipes of stage 1 are in RECIPES of methods.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each method on each task."""
    budget: int | None = None
    """Env steps of each run, tickets and stage 1 included; the task's own if not given."""
    num_eval_episodes: int = 100
    """Episodes of the final evaluation, deterministic and sampled."""
    num_envs: int = 8
    """Simulated envs of a run."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each on one core."""
    output: Path = Path("runs/compare")
    """Folder of runs and report."""
    smoke: bool = False
    """Every method for a few env steps, to see that it runs, in a folder of its own; the figures mean nothing."""


def check_settings(args: Args) -> None:
    """
    Runs of one folder share budget, envs and evaluations.

    :raises ValueError: if the folder's runs have others
    """
    path = args.output / "settings.json"
    settings = {name: getattr(args, name) for name in SETTINGS}
    if path.is_file():
        for name, found in json.loads(path.read_text()).items():
            if found != settings[name]:
                raise ValueError(
                    f"--{name} is {settings[name]}, but {args.output} holds runs with {found}: expected the same, or another "
                    f"--output"
                )
    write_json(path, settings)


def prepare(task: Task, output: Path, smoke: bool) -> None:
    """Demos and stage 0 of a task, if they are not there yet: the frozen flow that all of its runs share."""
    folder, start = output / task.env_id, time.time()
    if (folder / "stage0.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = demo_path(task, output)
    if not path.is_file():
        flags = dict(task.demo_flags, env_id=task.env_id, max_episode_steps=task.max_episode_steps, output=path)
        command = [sys.executable, str(EXAMPLES / "make_demos.py"), "--expert", "planner", "--trim-pauses"]
        for key, value in flags.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        subprocess.run(command, check=True)
    th.set_num_threads(1)  # as in the runs: the number changes the last bits
    th.manual_seed(0)
    demos = load_demos(path)
    flow = train_flow(
        demos,
        net_class=VelocityMLP,
        pred_horizon=task.horizon,
        act_horizon=task.horizon,
        num_steps=4,
        gamma=GAMMA,
        n_iterations=10 if smoke else task.flow_iters,
        progress_bar=True,
    )
    train_critic(flow, demo_transitions(flow, demos, True), n_iterations=5 if smoke else 500, progress_bar=True)
    flow.save_pretrained(folder / "flow")
    steps = sum(len(episode.actions) for episode in demos.episodes)
    about = dict(demos=len(demos.episodes), demo_steps=steps, wall_seconds=round(time.time() - start, 1))
    write_json(folder / "stage0.json", about)


def demo_path(task: Task, output: Path) -> Path:
    """Demos that come with the examples, or those made for this comparison."""
    shipped = EXAMPLES / "demos" / f"{task.env_id}.h5"
    return shipped if shipped.is_file() else output / task.env_id / "demos.h5"


def run_path(output: Path, env_id: str, method: str, seed: int) -> Path:
    """The file of a run."""
    return output / env_id / method / f"{seed}.json"


def run(args: Args, env_id: str, method: str, seed: int) -> None:
    """One run, in a process of its own; its file appears when it is complete."""
    th.set_num_threads(1)
    set_random_seed(seed)
    task = TASKS[env_id]
    flow = FlowPolicy.from_pretrained(args.output / env_id / "flow")
    trial = Trial(task, seed, args.budget or task.budget, flow, demo_path(task, args.output), n_envs=args.num_envs)
    if args.smoke:
        trial.task = replace(task, max_episode_steps=8)
        trial.eval_points, trial.eval_point_episodes = 1, 1
        trial.ticket_rounds, trial.rollout_episodes, trial.stage1_iters = ((2, 1), (1, 1)), 2, 3
    start = time.time()
    try:
        actor = ALL[method][1](trial)
        about = dict(method=method, env_id=env_id, seed=seed, env_steps=trial.env_steps)
        seconds = round(time.time() - start - trial.measuring_seconds, 1)
        rows = []
        for deterministic in modes(actor):
            how: dict[str, Any] = dict(seed=EVAL_SEED, noise_seed=seed, deterministic=deterministic)
            result = evaluate(actor, trial.eval_env, args.num_eval_episodes, **how)
            success = dict(success_once=result.success_once, success_at_end=result.success_at_end)
            rows.append(about | dict(episodes=result.episodes, **success, deterministic=deterministic, wall_seconds=seconds))
    finally:
        trial.close()
    path = run_path(args.output, env_id, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(rows=rows, curve=trial.curve))


def end_with_parent() -> None:
    """Lets this process end when the comparison is killed, which a pool's processes would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def modes(actor: Any) -> tuple[bool, ...]:
    """Models play by their mean and sampled, controls have one way to play."""
    if isinstance(actor, np.ndarray) or actor == "zero":
        return (True,)
    return (True, False) if hasattr(actor, "policy") else (False,)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is either complete or not there."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def main(args: Args) -> None:
    """Runs what is missing and writes the report."""
    for name, given, known in (("env_ids", args.env_ids, TASKS), ("methods", args.methods, ALL)):
        if unknown := set(given) - set(known):
            raise ValueError(f"--{name}: {', '.join(sorted(unknown))} is unknown; expected some of {', '.join(known)}")
    if args.smoke:
        args = replace(args, env_ids=args.env_ids[:1], seeds=args.seeds[:1])
        args = replace(args, budget=128, num_envs=1, num_eval_episodes=1, output=args.output / "smoke")
    check_settings(args)
    for env_id in args.env_ids:
        prepare(TASKS[env_id], args.output, args.smoke)
    # seed by seed, so that an interrupted comparison is one of fewer seeds
    runs = [
        (env_id, method, seed)
        for seed in args.seeds
        for env_id in args.env_ids
        for method in args.methods
        if method not in NO_SEED or seed == args.seeds[0]
    ]
    missing = [run for run in runs if not run_path(args.output, *run).is_file()]
    failed = 0
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(run, args, *key): key for key in missing}
        bar = tqdm(as_completed(futures), total=len(futures), desc="runs", disable=not futures)
        try:
            for future in bar:
                error = future.exception()
                if error is not None:
                    failed += 1
                    bar.write(f"{' '.join(map(str, futures[future]))} failed: {type(error).__name__}: {error}")
        except KeyboardInterrupt:  # left alone the pool would start every run that waits
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(write_report(args.output))
    if failed:
        raise ValueError(f"{failed} of {len(runs)} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    cli(main, Args)
