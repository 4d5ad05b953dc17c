"""MetaWorld: a flow that imitates its scripted experts when their hand shakes, before and after its noise is steered.

    pip install "sb3-dsrl[metaworld]"
    python examples/meta_world.py peg-insert-side-v3 --seed 0

MetaWorld's expert makes the demos, with noise on its actions; a flow learns from them; stage 1 and stock PPO learn which noise
to feed it. Beside that: the noise 0 and the best fixed noise. MetaWorld is simulated by EnvPool. The result is a table, and in
runs/<task> report.json and policy, a folder that SteeredPolicy.from_pretrained plays.
"""

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import envpool
import numpy as np
import torch as th
import tyro
from metaworld.policies import ENV_POLICY_MAP
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed

from sb3_dsrl import (
    Demos,
    EvalResult,
    FlowPolicy,
    SteeredPolicy,
    VecLatentSteering,
    VelocityMLP,
    collect_rollouts,
    evaluate,
    find_ticket,
    ppo_kwargs,
    pretrain_latent,
    results_table,
    train_flow,
)
from sb3_dsrl.cli.common import EVAL_SEED, cli
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.vector_adapter import EnvPoolAdapter

#: Of an observation. What is called "pos" is a place, whose differences to other places the flow sees finely.
LAYOUT = [
    ("hand_pos", 3),
    ("gripper", 1),
    ("object_pos", 3),
    ("object_quaternion", 4),
    ("second_object", 7),
    ("before", 18),  # the same, one step earlier
    ("goal_pos", 3),
]
ACTION_NOISE = np.array([1.0, 1.0, 1.0, 0.3])  # of x, y, z and gripper: a gripper that shakes more drops things


@dataclass(frozen=True)
class Task:
    """
    Settings of one task.

    :param max_episode_steps: time limit, a multiple of H: EnvPool cuts chunks there
    :param demo_noise: standard deviation of the noise on the expert's actions, which lie in [-1, 1]
    :param n_demos: successful episodes that the flow learns from
    """

    max_episode_steps: int
    demo_noise: float
    n_demos: int


TASKS: Mapping[str, Task] = {
    "pick-place-v3": Task(max_episode_steps=100, demo_noise=0.6, n_demos=12),
    "push-v3": Task(max_episode_steps=100, demo_noise=0.5, n_demos=9),
    "basketball-v3": Task(max_episode_steps=140, demo_noise=0.4, n_demos=15),
}


@dataclass
class Args:
    """Demos, flow and steering of one task."""

    task: Annotated[str, tyro.conf.Positional] = "pick-place-v3"
    """One of TASKS."""
    seed: int = 0
    """Seed of demos, flow and steering; evaluations are the same for all seeds."""
    output: Path | None = None
    """Folder for the results; runs/<task> if not given."""
    n_demos: int | None = None
    """Successful episodes that the flow learns from; the task's own number if not given."""
    n_iterations: int = 1_500
    """Gradient steps of the flow."""
    n_envs: int = 16
    """Simulated envs."""
    num_threads: int = 1
    """Threads of EnvPool."""
    ticket_rounds: tuple[tuple[int, int], ...] = ((12, 16), (3, 32))
    """Golden ticket: noises and episodes of each, in every round."""
    rollout_episodes: int = 128
    """Stage 1 learns from so many episodes of the frozen flow."""
    total_timesteps: int = 200_000
    """Budget of stages 1 and 2 in env steps."""
    num_eval_episodes: int = 100
    """Episodes of each final evaluation."""


def make_pool(task: str, num_envs: int, num_threads: int, seed: int) -> Any:
    """MetaWorld's task in EnvPool, with the goal in the observation; another start in every episode."""
    name = "".join(word.capitalize() for word in task.removesuffix("-v3").split("-"))
    kwargs = dict(num_envs=num_envs, num_threads=num_threads, max_episode_steps=TASKS[task].max_episode_steps)
    return envpool.make(f"MetaWorld/{name}-v3", env_type="gymnasium", seed=seed, partially_observable=False, **kwargs)


class SeededPool(EnvPoolAdapter):
    """EnvPool takes its seed when it is made: this one is made anew when it is reset with a seed, so that episodes repeat."""

    takes_seeds = True

    def __init__(self, task: str, num_envs: int, num_threads: int) -> None:
        self._args = task, num_envs, num_threads
        super().__init__(make_pool(*self._args, seed=0))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: N seeds, of which the first counts: env i gets it plus i; None goes on
        :param options: "env_idx" are the envs that are reset; None are all
        :return: observations of all envs, info
        """
        if seed is not None:
            self.venv.close()
            super().__init__(make_pool(*self._args, seed=int(seed[0])))
        return super().reset(options=options)


def make_env(args: Args, flow: FlowPolicy, seed: int | None = None) -> VecLatentSteering:
    """The task, steered."""
    pool = SeededPool(args.task, args.n_envs, args.num_threads)
    env = BatchedChunkEnv(pool, flow.act_horizon, flow.obs_horizon, flow.gamma, reward_scale=flow.reward_scale)
    latent = VecLatentSteering(env, flow)
    latent.seed(seed)
    return latent


def make_demos(args: Args, num_envs: int = 32) -> tuple[Demos, float]:
    """Episodes of the expert that are successful at their end, and which part of all episodes these are."""
    task, rng = TASKS[args.task], np.random.default_rng(args.seed)
    n_demos = args.n_demos or task.n_demos
    expert = ENV_POLICY_MAP[args.task]()
    pool = make_pool(args.task, num_envs, args.num_threads, seed=10_000 + args.seed * 1_000)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    played = 0
    while len(kept) < n_demos:
        obs = [pool.reset()[0]]
        actions = []
        for _ in range(task.max_episode_steps):
            wanted = np.stack([expert.get_action(row) for row in obs[-1]]).clip(-1, 1)
            noise = task.demo_noise * ACTION_NOISE * rng.standard_normal(wanted.shape)
            actions.append((wanted + noise).clip(-1, 1).astype(np.float32))
            seen, _, _, _, info = pool.step(actions[-1])
            obs.append(seen)
        successful = np.flatnonzero(info["success"])
        episodes, chunks = np.stack(obs, axis=1).astype(np.float32), np.stack(actions, axis=1)
        kept += [(episodes[i], chunks[i]) for i in successful]
        played += num_envs
        if played >= 20 * max(n_demos, num_envs):
            raise ValueError(f"{args.task}: {len(kept)} of {played} episodes of the expert succeed, lower demo_noise")
    share = len(kept) / played
    columns = zip(*kept[:n_demos], strict=True)
    demos = Demos.from_arrays(*columns, env_id=args.task, control_mode="pos_delta", state_layout=LAYOUT)
    pool.close()
    return demos, share


def main(args: Args) -> None:
    """Runs the three stages and writes the report."""
    if args.task not in TASKS:
        raise ValueError(f"There are settings for {', '.join(TASKS)}, found {args.task}")
    start = time.time()
    output = args.output or Path("runs") / args.task
    output.mkdir(parents=True, exist_ok=True)
    set_random_seed(args.seed)
    th.set_num_threads(1)

    demos, share = make_demos(args)
    print(f"{len(demos.episodes)} demos; {share:.2f} of the shaking expert's episodes succeed", flush=True)
    flow = train_flow(
        demos,
        net_class=VelocityMLP,
        pred_horizon=8,
        act_horizon=4,
        num_steps=4,
        reward_scale=0.1,  # MetaWorld's rewards go up to 10
        n_iterations=args.n_iterations,
        seed=args.seed,
        progress_bar=True,
    )
    flow.save_pretrained(output / "flow")
    stage0_seconds = time.time() - start

    env, eval_env = make_env(args, flow, args.seed), make_env(args, flow)
    rows: dict[str, EvalResult] = {}

    def add_row(name: str, actor: Actor, deterministic: bool = True) -> None:
        row = evaluate(actor, eval_env, args.num_eval_episodes, name=name, seed=EVAL_SEED, deterministic=deterministic)
        rows[name] = row
        print(f"{name}: success once {row.success_once:.2f}, at the end {row.success_at_end:.2f}", flush=True)

    add_row("prior", "prior")
    add_row("zero", "zero")
    ticket = find_ticket(eval_env, rounds=args.ticket_rounds, seed=args.seed, progress_bar=True)
    add_row("ticket", ticket.w)

    # Stage 1: which noises went well?
    model = PPO("LatentPolicy", env, **ppo_kwargs(env), seed=args.seed)
    add_row("narrow", model, deterministic=False)  # untrained, it plays the prior at its own smaller std
    rollouts = collect_rollouts(flow, env, args.rollout_episodes, seed=args.seed, progress_bar=True)
    pretrain_latent(model, rollouts=rollouts, progress_bar=True)
    add_row("stage1", model)

    # Stage 2: stock PPO
    macro_steps = (args.total_timesteps - rollouts.env_steps) // flow.act_horizon
    stage2_start = time.time()
    model.learn(total_timesteps=macro_steps, progress_bar=True)
    stage2_seconds = time.time() - stage2_start
    SteeredPolicy.of(model).save_pretrained(output / "policy")
    add_row("stage2", model)
    add_row("stage2_stochastic", model, deterministic=False)

    report = {
        "env_id": args.task,
        "seed": args.seed,
        "expert_success": share,
        "env_steps": rollouts.env_steps + model.num_timesteps * flow.act_horizon,
        "stage1_env_steps": rollouts.env_steps,
        "stage0_seconds": round(stage0_seconds, 1),
        "stage2_seconds": round(stage2_seconds, 1),
        "wall_seconds": round(time.time() - start, 1),
        "rows": [row.as_row() for row in rows.values()],
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{args.task}, seed {args.seed}: {report['env_steps']:,} env steps, {time.time() - start:.0f} s in all\n")
    print(results_table(list(rows.values())))
    print(f"\nReport, flow and policy are in {output}/")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Constant.s. may be too high")  # MetaWorld's experts, of themselves
    cli(main, Args)
