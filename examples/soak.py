"""Soak test of stage 2: workers are killed at random while PPO learns, and nothing may be lost, leak or hang.

    python examples/soak.py --minutes 30 --kill_every 120 --workers 8

Every episode carries a number of its own from the worker that plays it. At the end each one that was started must have
finished, have been truncated because its worker died, or still be open; and the memory of all processes must not have grown.
The exit code is 1 if that is not so.
"""

import itertools
import json
import os
import random
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch as th
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    SteerablePolicy,
    VecLatentSteering,
    VelocityMLP,
    WorkerSettings,
    ppo_kwargs,
    train_flow,
)
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv

DEMOS = Path(__file__).parent / "demos" / "PushCube-v1.h5"
WARM_UP = 0.1  # part of the time in which memory may still grow


@dataclass
class Args:
    """Stage 2 under fire."""

    minutes: float = 30.0
    """Wall time."""
    kill_every: float = 120.0
    """Mean seconds between two kills (SIGKILL) of a random worker; 0 kills none."""
    workers: int = 8
    """Worker processes, one env in each."""
    env_id: str = "PushCube-v1"
    """ManiSkill task."""
    flow: Path | None = None
    """Folder of the flow; if not given, one is quickly trained on the demos of PushCube-v1."""
    output: Path | None = None
    """Write the report there as JSON, too."""
    seed: int = 0
    """Of everything but the moments of the kills."""


@dataclass
class Report:
    """What came of it; memory in MB, ``rss`` of all processes together."""

    seconds: float = 0.0
    env_steps: int = 0
    workers_killed: int = 0
    workers_restarted: int = 0
    episodes_started: int = 0
    episodes_finished: int = 0
    episodes_truncated_by_fault: int = 0
    episodes_open: int = 0
    rss_first: float = 0.0
    rss_last: float = 0.0
    main_rss_first: float = 0.0
    main_rss_last: float = 0.0
    open_files_first: int = 0
    open_files_last: int = 0
    processes_left: int = 0
    errors: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Adds what is not as it should be to the errors."""
        accounted = self.episodes_finished + self.episodes_truncated_by_fault + self.episodes_open
        for wrong, sentence in (
            (accounted != self.episodes_started, f"{self.episodes_started} episodes were started, {accounted} accounted for"),
            (self.workers_restarted != self.workers_killed, "not every worker that was killed was started again"),
            (self.rss_last > 1.05 * self.rss_first, "memory grew by more than 5%"),
            (self.main_rss_last > 1.05 * self.main_rss_first, "memory of the main process grew by more than 5%"),
            (self.open_files_last > self.open_files_first, "more files are open than at the start"),
            (self.processes_left > 0, "workers outlived the end"),
        ):
            if wrong:
                self.errors.append(sentence)


class Tagged(gym.Wrapper):
    """Tells in every ``info`` which episode this is and which process plays it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode with a new number."""
        self._tag = dict(episode_id=uuid.uuid4().hex, pid=os.getpid())
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, info | self._tag

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One macro-step."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward), terminated, truncated, info | self._tag


class Ledger(BaseCallback):
    """
    Keeps the books of episodes, counts env steps, samples memory, and ends the learning when the time is over.

    :param report: is written to
    :param seconds: wall time
    """

    def __init__(self, report: Report, seconds: float) -> None:
        super().__init__()
        self.report, self.seconds = report, seconds
        self.processes: list[psutil.Process] = []
        #: of each episode: None while it is open
        self.fates: dict[str, str | None] = {}
        self._samples: list[tuple[float, float, float, int]] = []
        self._start = time.time()

    def _on_training_start(self) -> None:
        self._start = time.time()
        self._begin(range(self.training_env.num_envs))

    def _begin(self, envs: Sequence[int]) -> None:
        infos = self.training_env.unwrapped.reset_infos  # type: ignore[attr-defined]
        self.processes = [psutil.Process(info["pid"]) for info in infos if psutil.pid_exists(info["pid"])]
        self._playing = [info["episode_id"] for info in infos]
        for i in envs:
            if self._playing[i] in self.fates:
                self.report.errors.append(f"env {i} goes on with an episode that had begun before")
            self.fates[self._playing[i]] = None

    def _on_step(self) -> bool:
        ended = []
        for i, (info, done) in enumerate(zip(self.locals["infos"], self.locals["dones"], strict=True)):
            self.report.env_steps += info["chunk_length"]
            failed = info.get("worker_failed", False)
            if not failed and info["episode_id"] != self._playing[i]:
                self.report.errors.append(f"env {i} plays another episode than the one that it began")
            if done:
                self.fates[self._playing[i]] = "truncated by fault" if failed else "finished"
                ended.append(i)
        if ended:
            self._begin(ended)
        return time.time() - self._start < self.seconds

    def _on_rollout_end(self) -> None:
        main = psutil.Process()
        rss = [_rss(process) for process in (main, *main.children(recursive=True))]
        self._samples.append((time.time() - self._start, sum(rss), rss[0], main.num_fds()))

    def close(self) -> None:
        """Completes the report."""
        report, count = self.report, Counter(self.fates.values())
        report.episodes_started = len(self.fates)
        report.episodes_finished, report.episodes_open = count["finished"], count[None]
        report.episodes_truncated_by_fault = count["truncated by fault"]
        report.seconds = round(time.time() - self._start, 1)
        report.workers_restarted = self.training_env.unwrapped.n_restarts  # type: ignore[attr-defined]
        samples = np.array([row[1:] for row in self._samples if row[0] >= WARM_UP * self.seconds])
        if not len(samples):
            report.errors.append("no rollout ended after the warm-up")
            return
        window = max(1, len(samples) // 10)  # a worker that has just been started is smaller: medians of a tenth of the time
        first, last = np.median(samples[:window], axis=0), np.median(samples[-window:], axis=0)
        report.rss_first, report.main_rss_first, report.open_files_first = round(first[0]), round(first[1]), int(first[2])
        report.rss_last, report.main_rss_last, report.open_files_last = round(last[0]), round(last[1]), int(last[2])


def _rss(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / 1e6
    except psutil.Error:  # it has just been killed
        return 0.0


@contextmanager
def killer(recorder: Ledger, report: Report, kill_every: float) -> Iterator[None]:
    """Kills a worker now and then, at any moment of its work, from a thread."""
    over, rng = threading.Event(), random.Random()

    def run() -> None:
        while not over.wait(kill_every * rng.uniform(0.5, 1.5)):
            if recorder.processes:
                victim = rng.choice(recorder.processes)
                recorder.processes.remove(victim)  # until it has been started again
                try:
                    if victim.status() != psutil.STATUS_ZOMBIE:
                        victim.kill()
                        report.workers_killed += 1
                except psutil.NoSuchProcess:  # it was killed before, and the learner has not noticed yet
                    pass

    thread = threading.Thread(target=run, daemon=True)
    if kill_every:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if kill_every:
            thread.join()


def soak(
    make: Callable[[], gym.Env],
    flow: SteerablePolicy,
    seconds: float,
    kill_every: float,
    workers: int,
    seed: int = 0,
    **ppo: Any,
) -> Report:
    """
    :param make: makes an env
    :param flow: the policy that is steered
    :param seconds: wall time
    :param kill_every: mean seconds between two kills; 0 kills none
    :param workers: processes with one env each
    :param seed: of envs and PPO
    :param ppo: arguments of PPO
    """

    def chunked() -> gym.Env:
        return Tagged(ActionChunkWrapper(make(), flow.act_horizon, flow.obs_horizon, flow.gamma, ignore_terminations=True))

    report = Report()
    recorder = Ledger(report, seconds)
    venv = WorkerVecEnv([chunked] * workers, WorkerSettings(workers, on_failure="restart", timeout=120.0))
    env = VecLatentSteering(venv, flow)
    env.seed(seed)
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, seed=seed, **ppo))
    with killer(recorder, report, kill_every), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s)Worker .*started again")
        try:
            model.learn(10**9, recorder)
        except Exception as error:
            report.errors.append(f"{type(error).__name__}: {error}")
    if not report.errors:  # a worker that was killed after the last step is found to be dead now
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, _, dones, infos = env.step(np.zeros((workers, *flow.noise_shape), np.float32))
        recorder.locals = dict(infos=infos, dones=dones)
        recorder.on_step()
    recorder.close()
    env.close()
    report.processes_left = len(psutil.wait_procs(recorder.processes, timeout=10)[1])
    report.judge()
    return report


def main(args: Args) -> Report:
    """Trains a flow if none is given, then soaks."""
    from sb3_dsrl.envs.maniskill import maniskill_kwargs

    th.set_num_threads(1)
    th.manual_seed(args.seed)
    if args.flow is not None:
        flow = FlowPolicy.from_pretrained(args.flow)
    else:
        sizes: dict[str, Any] = dict(net_class=VelocityMLP, pred_horizon=4, act_horizon=4, num_steps=2)
        flow = train_flow(DEMOS, n_iterations=200, **sizes)  # what it can do does not matter here
    kwargs = maniskill_kwargs(args.env_id, flow.obs_mode, control_mode=flow.control_mode, reward_mode="normalized_dense")
    env_id = f"mani_skill.envs:{args.env_id}"  # a worker must import ManiSkill, too
    return soak(lambda: gym.make(env_id, **kwargs), flow, 60 * args.minutes, args.kill_every, args.workers, args.seed)


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    result = main(arguments)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(asdict(result), indent=2) + "\n")
    rows = {name: value for name, value in asdict(result).items() if name != "errors"}
    print("\n".join(f"{name.replace('_', ' '):28}{value:>12}" for name, value in rows.items()))
    growth = result.rss_last / max(result.rss_first, 1) - 1
    print(f"{'memory growth':28}{growth:>12.1%}")
    print(f"{'errors':28}{len(result.errors):>12}")
    print("\n".join(f"  {error}" for error in itertools.islice(result.errors, 20)))
    sys.exit(bool(result.errors))
