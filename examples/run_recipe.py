"""The whole method on one task: demos, a flow that imitates them, and steering that makes it better.

    python examples/run_recipe.py StackCube-v1 --seed 0
    python examples/run_recipe.py "PushCube-v1 rgb" --seed 0

A recipe (examples/recipes, one file a task) says how. Stage 0 learns a flow from the demos, which are made if the file is not
there; stage 1 a latent policy from rollouts of that flow; stage 2 improves it with stock PPO. The result is a table, and in
runs/<task> report.json, report.png, before.mp4, after.mp4 and policy, a folder that SteeredPolicy.from_pretrained plays.
"""

import json
import runpy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import make_demos
import matplotlib
import torch as th
import tyro
from recipes import RECIPES
from recipes.recipe import Recipe
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed

from sb3_dsrl import (
    DemoStarts,
    EvalResult,
    FlowPolicy,
    SteeredPolicy,
    collect_rollouts,
    demo_transitions,
    evaluate,
    find_ticket,
    load_demos,
    make_latent_env,
    ppo_kwargs,
    pretrain_latent,
    results_table,
    train_critic,
    train_flow,
)
from sb3_dsrl.cli.common import EVAL_SEED, cli, layout_of
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.evaluation.video import record_video
from sb3_dsrl.stage2.callbacks import SuccessEvalCallback

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    """Demos, flow and steering of one task."""

    recipe: Annotated[str, tyro.conf.Positional] = "PushCube-v1"
    """A task of examples/recipes, or the path of a file like those."""
    seed: int = 0
    """Seed of all three stages."""
    demo_path: Path | None = None
    """ManiSkill trajectory file; it is made if it is not there. demos/<recipe>.h5 if not given, a blank being a hyphen."""
    output: Path | None = None
    """Folder for the results; runs/<recipe> if not given, a blank being a hyphen."""
    num_eval_episodes: int = 200
    """Episodes of each final evaluation."""
    video_episodes: int = 2
    """Episodes in before.mp4 and after.mp4; 0 films none."""


def find_recipe(name: str) -> Recipe:
    """
    :param name: a task, or the path of a file with a ``RECIPE``
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"There is no recipe {name}; there is one for {', '.join(RECIPES)}, or pass the path of your own")
    recipe = runpy.run_path(str(path)).get("RECIPE")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} must define RECIPE, a recipes.recipe.Recipe; found {type(recipe).__name__}")
    return recipe


def plot(path: Path, title: str, curve: SuccessEvalCallback, rows: dict[str, EvalResult]) -> None:
    """Success against env steps with 95% intervals; the controls as lines."""
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    steps, means, samples = zip(*curve.history, strict=True)
    for results, label, colour in (
        (means, "stages 1 + 2, mean of pi", "tab:blue"),
        (samples, "stages 1 + 2, sampled", "tab:orange"),
    ):
        axes.plot(steps, [r.success_at_end for r in results], color=colour, marker="o", ms=3, label=label)
        axes.fill_between(steps, [r.ci_low for r in results], [r.ci_high for r in results], color=colour, alpha=0.15, lw=0)
    for name, label, style in (
        ("prior", "frozen flow, w ~ N(0, I)", "--"),
        ("zero", "frozen flow, w = 0", ":"),
        ("ticket", "frozen flow, best fixed w", "-."),
    ):
        axes.axhline(rows[name].success_at_end, color="0.3", ls=style, lw=1.2, label=label)
    axes.axhspan(rows["prior"].ci_low, rows["prior"].ci_high, color="0.3", alpha=0.1, lw=0)
    axes.set(xlabel="env steps, those of stage 1 included", ylabel="success at the end of the episode", ylim=(-0.02, 1.02))
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def train_base(recipe: Recipe, demo_path: Path, seed: int, log: Path) -> FlowPolicy:
    """Stage 0: a flow that imitates the demos, and a critic of its chunks."""
    if not demo_path.exists():
        print(f"{demo_path} is not there and is made", flush=True)
        make_demos.main(make_demos.Args(env_id=recipe.env_id, output=demo_path, **recipe.demos))
    demos = load_demos(demo_path)
    layout = layout_of(demos) if recipe.spatial_features else None
    kwargs = dict(recipe.flow, spatial_features=recipe.spatial_features, state_layout=layout)
    flow = train_flow(demos, **kwargs, seed=seed, tensorboard_log=log / "flow", progress_bar=True)
    if recipe.critic_iterations:
        transitions = demo_transitions(flow, demos, ignore_terminations=True)
        n = recipe.critic_iterations
        train_critic(flow, transitions, n_iterations=n, tensorboard_log=log / "critic", progress_bar=True)
    return flow


def main(args: Args) -> None:
    """Runs the three stages and writes the report."""
    start = time.time()
    recipe = find_recipe(args.recipe)
    folder_name = recipe.name.replace(" ", "-")
    output = args.output or Path("runs") / folder_name
    output.mkdir(parents=True, exist_ok=True)
    set_random_seed(args.seed)
    th.set_num_threads(1)  # the other cores are for the simulators
    log = output / "tensorboard"

    demo_path = args.demo_path or Path("demos") / f"{folder_name}.h5"
    flow = train_base(recipe, demo_path, args.seed, log)
    flow.save_pretrained(output / "flow")
    stage0_seconds = time.time() - start

    # How good is it?
    starts = None if recipe.demo_starts is None else DemoStarts(demo_path, **recipe.demo_starts)
    env = make_latent_env(recipe.env_id, flow, recipe.n_envs, seed=args.seed, starts=starts, **recipe.env)
    eval_env = make_latent_env(recipe.env_id, flow, recipe.n_envs, **recipe.env)
    rows: dict[str, EvalResult] = {}

    def add_row(name: str, actor: Actor, deterministic: bool = True) -> None:
        episodes = args.num_eval_episodes
        row = rows[name] = evaluate(
            actor, eval_env, episodes, name=name, seed=EVAL_SEED, deterministic=deterministic, progress_bar=True
        )
        print(f"{name}: success at the end {row.success_at_end:.2f} ({row.ci_low:.2f} to {row.ci_high:.2f})", flush=True)

    add_row("prior", "prior")
    add_row("zero", "zero")
    add_row("ticket", find_ticket(eval_env, rounds=recipe.ticket_rounds, seed=args.seed, progress_bar=True).w)

    # Stage 1: which noises went well? No gradient ever reaches the flow.
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, **recipe.ppo), seed=args.seed, tensorboard_log=str(log))
    add_row("narrow", model, deterministic=False)  # untrained, it plays the prior at its own smaller std
    rollouts = collect_rollouts(flow, env, recipe.rollout_episodes, seed=args.seed, progress_bar=True)
    pretrain_latent(model, rollouts=rollouts, tensorboard_log=log / "stage1", progress_bar=True)
    model.policy.save(str(output / "stage1.pt"))
    add_row("stage1", model)
    add_row("stage1_stochastic", model, deterministic=False)

    # Stage 2: stock PPO
    macro_steps = (recipe.total_timesteps - rollouts.env_steps) // flow.act_horizon
    curve = SuccessEvalCallback(
        eval_env,
        eval_freq=macro_steps * flow.act_horizon // 4,
        n_eval_episodes=min(48, args.num_eval_episodes),
        stochastic=True,
        env_steps=rollouts.env_steps,
    )
    stage2_start = time.time()
    model.learn(total_timesteps=macro_steps, callback=curve, progress_bar=True, tb_log_name="stage2")
    stage2_seconds = time.time() - stage2_start
    model.save(output / "model.zip")
    policy = SteeredPolicy.of(model)
    policy.deterministic = recipe.deterministic
    policy.save_pretrained(output / "policy")
    add_row("stage2", model)
    add_row("stage2_stochastic", model, deterministic=False)
    env.close()

    report = {
        "env_id": recipe.name,
        "seed": args.seed,
        "env_steps": curve.env_steps,
        "stage1_env_steps": rollouts.env_steps,
        "stage0_seconds": round(stage0_seconds, 1),
        "stage2_seconds": round(stage2_seconds, 1),
        "wall_seconds": round(time.time() - start, 1),
        "rows": [row.as_row() for row in rows.values()],
    }
    if not recipe.deterministic:
        report["deterministic"] = False  # the result samples
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(output / "report.png", f"{recipe.name}, seed {args.seed}", curve, rows)
    actors: dict[str, Actor] = {"before.mp4": "prior", "after.mp4": policy}
    for name, actor in actors.items() if args.video_episodes else ():
        record_video(output / name, eval_env, actor, args.video_episodes, seed=EVAL_SEED, progress_bar=True)
    eval_env.close()

    print(f"\n{recipe.name}, seed {args.seed}: {report['env_steps']:,} env steps, {time.time() - start:.0f} s in all\n")
    print(results_table(list(rows.values())))
    print(f"\nReport, picture, videos, flow, model and policy are in {output}/")


if __name__ == "__main__":
    cli(main, Args)
