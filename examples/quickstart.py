"""The whole method on one task: a frozen flow policy that succeeds half the time gets better, on a laptop CPU.

    python examples/quickstart.py --seed 0

Stage 0 learns a flow and its critic from the demos in examples/demos, stage 1 a latent policy from rollouts of that
flow, stage 2 improves it with stock PPO. The result is a table, and in runs/quickstart report.json, report.png, before.mp4,
after.mp4 and policy, a folder that SteeredPolicy.from_pretrained plays.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch as th
from common import cli
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed

from sb3_dsrl import (
    EvalResult,
    SteeredPolicy,
    VelocityMLP,
    collect_rollouts,
    demo_transitions,
    evaluate,
    load_demos,
    make_latent_env,
    ppo_kwargs,
    pretrain_latent,
    results_table,
    train_critic,
    train_flow,
)
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.evaluation.video import record_video
from sb3_dsrl.stage2.callbacks import SuccessEvalCallback

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVAL_SEED = 1_000_000  # far from the demos' and the training envs' seeds


@dataclass
class Args:
    """Improve a frozen flow policy on a ManiSkill task."""

    seed: int = 0
    """Seed of all three stages."""
    env_id: str = "PushCube-v1"
    """ManiSkill task; the demos must be of the same."""
    demo_path: Path = Path(__file__).parent / "demos" / "PushCube-v1.h5"
    """ManiSkill trajectory file."""
    output: Path = Path("runs/quickstart")
    """Folder for the results."""
    n_envs: int = 8
    """Simulated envs; worker processes share them, one a core."""
    total_iters: int = 1_000
    """Stage 0: optimiser steps of the flow."""
    critic_iters: int = 300
    """Stage 0: optimiser steps of the critic."""
    rollout_episodes: int = 256
    """Stage 1: episodes in each round of rollouts to learn from."""
    rollout_rounds: int = 1
    """Stage 1: rounds; the first one plays the unsteered flow."""
    total_timesteps: int = 90_000
    """Stages 1 and 2: budget in env steps."""
    num_eval_episodes: int = 200
    """Episodes of each final evaluation."""
    video_episodes: int = 2
    """Episodes in before.mp4 and after.mp4; 0 films none."""


def plot(path: Path, args: Args, curve: SuccessEvalCallback, rows: dict[str, EvalResult]) -> None:
    """Success against env steps with 95% intervals; the controls as lines."""
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    steps, means, samples = zip(*curve.history, strict=True)
    for results, label, colour in (
        (means, "stages 1 + 2, mean of pi", "tab:blue"),
        (samples, "stages 1 + 2, sampled", "tab:orange"),
    ):
        axes.plot(steps, [r.success_at_end for r in results], color=colour, marker="o", ms=3, label=label)
        axes.fill_between(steps, [r.ci_low for r in results], [r.ci_high for r in results], color=colour, alpha=0.15, lw=0)
    for name, label, style in (("prior", "frozen flow, w ~ N(0, I)", "--"), ("zero", "frozen flow, w = 0", ":")):
        row = rows[name]
        axes.axhline(row.success_at_end, color="0.3", ls=style, lw=1.2, label=label)
    axes.axhspan(rows["prior"].ci_low, rows["prior"].ci_high, color="0.3", alpha=0.1, lw=0)
    axes.set(xlabel="env steps, those of stage 1 included", ylabel="success at the end of the episode", ylim=(-0.02, 1.02))
    axes.set_title(f"{args.env_id}, seed {args.seed}", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    """Runs the three stages and writes the report."""
    start = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    set_random_seed(args.seed)
    th.set_num_threads(1)  # the second core is for the simulators
    log = args.output / "tensorboard"

    # Stage 0: a flow that imitates a few imperfect demos, and a critic of its chunks
    demos = load_demos(args.demo_path)
    flow = train_flow(
        demos,
        net_class=VelocityMLP,
        obs_horizon=2,
        pred_horizon=4,
        act_horizon=4,
        num_steps=4,
        n_iterations=args.total_iters,
        seed=args.seed,
        tensorboard_log=log / "flow",
        progress_bar=True,
    )
    transitions = demo_transitions(flow, demos, ignore_terminations=True)
    train_critic(flow, transitions, n_iterations=args.critic_iters, tensorboard_log=log / "critic", progress_bar=True)
    flow.save_pretrained(args.output / "flow")

    # How good is it?
    env = make_latent_env(args.env_id, flow, n_envs=args.n_envs, seed=args.seed)
    eval_env = make_latent_env(args.env_id, flow, n_envs=args.n_envs)
    rows: dict[str, EvalResult] = {}

    def add_row(name: str, actor: PPO | str, deterministic: bool = True) -> None:
        rows[name] = evaluate(
            actor,
            eval_env,
            args.num_eval_episodes,
            name=name,
            seed=EVAL_SEED,
            deterministic=deterministic,
            progress_bar=True,
        )

    add_row("prior", "prior")
    add_row("zero", "zero")

    # Stage 1: which noises went well? No gradient ever reaches the flow. The first round learns from the frozen flow
    # itself, further ones from what has been learned so far.
    model = PPO("LatentPolicy", env, **ppo_kwargs(env), seed=args.seed, tensorboard_log=str(log))
    stage1_steps = 0
    for i in range(args.rollout_rounds):
        rollouts = collect_rollouts(
            flow if i == 0 else model, env, args.rollout_episodes, seed=args.seed + 1_000 * i, progress_bar=True
        )
        pretrain_latent(model, rollouts=rollouts, tensorboard_log=log / f"stage1_{i}", progress_bar=True)
        stage1_steps += rollouts.env_steps
    model.policy.save(str(args.output / "stage1.pt"))
    add_row("stage1", model)
    add_row("stage1_stochastic", model, deterministic=False)

    # Stage 2: stock PPO
    macro_steps = (args.total_timesteps - stage1_steps) // flow.act_horizon
    curve = SuccessEvalCallback(
        eval_env,
        eval_freq=macro_steps * flow.act_horizon // 4,
        n_eval_episodes=min(48, args.num_eval_episodes),
        stochastic=True,
        env_steps=stage1_steps,
    )
    model.learn(total_timesteps=macro_steps, callback=curve, progress_bar=True, tb_log_name="stage2")
    model.save(args.output / "model.zip")
    SteeredPolicy.of(model).save_pretrained(args.output / "policy")
    add_row("stage2", model)
    add_row("stage2_stochastic", model, deterministic=False)
    env.close()

    report = {
        "env_id": args.env_id,
        "seed": args.seed,
        "env_steps": curve.env_steps,
        "wall_seconds": round(time.time() - start, 1),
        "rows": [row.as_row() for row in rows.values()],
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(args.output / "report.png", args, curve, rows)
    actors: dict[str, Actor] = {"before.mp4": "prior", "after.mp4": model}
    for name, actor in actors.items() if args.video_episodes else ():
        record_video(args.output / name, eval_env, actor, args.video_episodes, seed=EVAL_SEED, progress_bar=True)
    eval_env.close()

    print(f"\n{args.env_id}, seed {args.seed}: {report['env_steps']:,} env steps, {time.time() - start:.0f} s in all\n")
    print(results_table(list(rows.values())))
    print(f"\nReport, picture, videos, flow, model and policy are in {args.output}/")


if __name__ == "__main__":
    cli(main, Args)
