"""LeRobot's DiffusionPolicy on PushT, before and after its noise is steered.

    .venv-lerobot/bin/python examples/pusht.py --seed 0

Demos of a scripted pusher are recorded as a LeRobotDataset, unless they are there; LeRobot's own DiffusionPolicy learns from
them; stock PPO learns which noise to feed it. Beside that: the noise 0, the best fixed noise, and SB3's SAC from scratch with
as many env steps. One run is one seed of everything; runs/pusht/results has a report of each and a table of all.
"""

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from pusht_base import ENV_ID, ENV_KWARGS, OBS_KEYS, record_demos, train_policy
from scipy.stats import t as students_t
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from sb3_dsrl import (
    LeRobotPolicy,
    SteerablePolicy,
    VecLatentSteering,
    WorkerSettings,
    find_ticket,
    make_latent_env,
    ppo_kwargs,
)
from sb3_dsrl.cli.common import EVAL_SEED, cli
from sb3_dsrl.evaluation.play import Actor, count_env_steps, play
from sb3_dsrl.evaluation.results import wilson_interval

ACTION_BOUNDS = (0.0, 512.0)  # px


@dataclass
class Args:
    """Demos, policy and steering of one seed."""

    seed: int = 0
    """Seed of policy, noise and RL; demos and evaluations are the same for all seeds."""
    folder: Path = Path("runs/pusht")
    """Where demos and policies are, or come to be."""
    results: Path = Path("runs/pusht/results")
    """Where seed<seed>.json and pusht.csv come to be; the table is of all seeds whose reports are there."""
    n_demos: int = 100
    """Episodes of the pusher that the policy learns from."""
    base_iterations: int = 3_000
    """Gradient steps of LeRobot's policy."""
    env_steps: int = 100_000
    """Env steps of PPO, and of SAC."""
    num_envs: int = 8
    """Simulated envs."""
    num_workers: int = 2
    """Processes that simulate them."""
    ticket_rounds: tuple[tuple[int, int], ...] = ((16, 8), (4, 16))
    """Golden ticket: noises and episodes of each, in every round."""
    num_eval_episodes: int = 100
    """Episodes of each final evaluation."""


class Progress(gym.Wrapper):
    """Rewards what the coverage gains in a step, and success with 1 more."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        obs, info = self.env.reset(**kwargs)
        self._coverage = self.env.unwrapped._get_coverage()  # type: ignore[attr-defined]
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One env step."""
        obs, _, terminated, truncated, info = self.env.step(action)
        gain, self._coverage = info["coverage"] - self._coverage, info["coverage"]
        return obs, gain + float(terminated), terminated, truncated, info


class Direct(SteerablePolicy):
    """No policy at all: what is fed as noise is the action. So SAC from scratch learns in the same env and is judged alike."""

    def __init__(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            OBS_KEYS["observation.state"]: (2,),
            OBS_KEYS["observation.environment_state"]: (16,),
        }
        super().__init__(obs_shapes=shapes, obs_horizon=1, noise_shape=(1, 2), cond_dim=18, act_horizon=1)

    def encode(self, obs: Any) -> th.Tensor:
        """Positions in [-1, 1]."""
        return th.cat([th.as_tensor(obs[key])[:, -1] for key in OBS_KEYS.values()], dim=1).float() / 256 - 1

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """The same."""
        return w.clamp(-1.0, 1.0)


class Budget(BaseCallback):
    """Counts env steps, and ends the training after so many."""

    def __init__(self, env_steps: int) -> None:
        super().__init__()
        self.limit, self.env_steps = env_steps, 0

    def _on_step(self) -> bool:
        self.env_steps += count_env_steps(self.locals["infos"])
        return self.env_steps < self.limit


def make_env(args: Args, flow: SteerablePolicy, **steering: Any) -> VecLatentSteering:
    """PushT, steered."""
    return make_latent_env(
        ENV_ID,
        flow,
        args.num_envs,
        env_kwargs=ENV_KWARGS,
        wrapper_class=Progress,
        workers=WorkerSettings(args.num_workers),
        seed=args.seed,
        **steering,
    )


def measured(actor: Actor, env: VecLatentSteering, episodes: int, **kwargs: Any) -> dict[str, float]:
    """Success, and coverage at the end of the episode, with 95% intervals; the same episodes for every actor."""
    success, coverage, lengths = [], [], []
    for step in play(actor, env, episodes, EVAL_SEED, **kwargs):
        for i in np.flatnonzero(step.dones & step.counts):
            info = step.infos[i]
            success.append(info["success_once"])
            coverage.append(info["coverage"])
            lengths.append(info["episode_length"])
    mean, half = np.mean(coverage), students_t.ppf(0.975, episodes - 1) * np.std(coverage, ddof=1) / np.sqrt(episodes)
    low, high = wilson_interval(int(np.sum(success)), episodes)
    return dict(
        episodes=episodes,
        success=float(np.mean(success)),
        success_low=low,
        success_high=high,
        coverage=float(mean),
        coverage_low=float(mean - half),
        coverage_high=float(mean + half),
        length=float(np.mean(lengths)),
    )


def base_policy(args: Args) -> LeRobotPolicy:
    """LeRobot's policy of this seed, trained unless it is there."""
    demos, policy = args.folder / "demos", args.folder / f"policy{args.seed}"
    if not demos.exists():
        record_demos(demos, args.n_demos)
    if not (policy / "model.safetensors").exists():
        train_policy(demos, policy, n_demos=args.n_demos, n_iterations=args.base_iterations, seed=args.seed)
    return LeRobotPolicy.from_pretrained(policy, obs_keys=OBS_KEYS, action_bounds=ACTION_BOUNDS, device="cpu")


def table(folder: Path) -> pd.DataFrame:
    """All reports of a folder, a row for each seed and policy."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))]
    rows = [dict(seed=report["seed"], name=name, **row) for report in reports for name, row in report["rows"].items()]
    return pd.DataFrame(rows)


class Report:
    """Measures policies, and keeps what was found: the report of this seed and the table are written after each of them."""

    def __init__(self, args: Args) -> None:
        self.args, self.start = args, time.time()
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, name: str, actor: Actor, env: VecLatentSteering, env_steps: int, **kwargs: Any) -> None:
        """Adds a row: a policy, and how many env steps it took to find it."""
        row = measured(actor, env, self.args.num_eval_episodes, **kwargs) | dict(env_steps=env_steps)
        self.rows[name] = row | dict(seconds=round(time.time() - self.start))
        success = f"success {row['success']:.2f} ({row['success_low']:.2f} to {row['success_high']:.2f})"
        coverage = f"coverage {row['coverage']:.3f} ({row['coverage_low']:.3f} to {row['coverage_high']:.3f})"
        print(f"{name}: {success}, {coverage}", flush=True)
        folder, seed = self.args.results, self.args.seed
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in asdict(self.args).items() if key not in ("folder", "results")}
        (folder / f"seed{seed}.json").write_text(json.dumps(settings | dict(rows=self.rows), indent=2) + "\n")
        table(folder).to_csv(folder / "pusht.csv", index=False, float_format="%.4g")


def main(args: Args) -> None:
    """Runs one seed, and writes its report and the table."""
    set_random_seed(args.seed)
    th.set_num_threads(1)
    report = Report(args)
    flow = base_policy(args)
    env = make_env(args, flow)
    report.add("prior", "prior", env, 0)
    report.add("zero", "zero", env, 0)
    ticket = find_ticket(env, rounds=args.ticket_rounds, seed=args.seed, progress_bar=True)
    report.add("ticket", ticket.w, env, ticket.env_steps)

    model = PPO("LatentPolicy", env, **ppo_kwargs(env), seed=args.seed)
    budget = Budget(args.env_steps)
    model.learn(args.env_steps, callback=budget, progress_bar=True)
    model.save(args.folder / f"steered{args.seed}")
    report.add("steered", model, env, budget.env_steps)
    report.add("steered, sampled", model, env, budget.env_steps, deterministic=False)
    env.close()

    scratch_env = make_env(args, Direct(), noise_bound=1.0)
    sac = SAC("MlpPolicy", scratch_env, gamma=0.99, gradient_steps=args.num_envs // 4, seed=args.seed)
    budget = Budget(args.env_steps)
    sac.learn(args.env_steps, callback=budget, progress_bar=True)
    report.add("SAC from scratch", sac, scratch_env, budget.env_steps)
    scratch_env.close()
    frame = table(args.results).drop(columns=["episodes", "seconds"])
    print(f"\n{frame.to_string(index=False, float_format='{:.3f}'.format)}")
    print(f"\nThe table is {args.results}/pusht.csv")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="pygame")
    cli(main, Args)
