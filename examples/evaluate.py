"""Evaluates a flow, and what steers it, on the same episodes.

    python examples/evaluate.py --awsc_checkpoint runs/pickcube_flow/flow --stage1_checkpoint runs/pickcube_stage1/stage1.pt \\
        --model runs/pickcube_stage2/checkpoints/final.zip
"""

from dataclasses import dataclass
from pathlib import Path

from common import EvalArgs, FlowArgs, Run, cli, load_flow, load_model, make_env

from sb3_dsrl import LatentPolicy
from sb3_dsrl.evaluation.play import Actor


@dataclass(kw_only=True)
class Args(FlowArgs, EvalArgs):
    """Evaluation."""

    stage1_checkpoint: Path | None = None
    """Latent policy of train_latent_offline.py."""
    model: Path | None = None
    """Model of train_latent_online.py."""


def main(args: Args) -> None:
    """Prints a table: the flow's prior, w = 0, and each policy, deterministic and sampled."""
    flow = load_flow(args)
    env = make_env(args, flow, args.num_eval_envs)
    actors: dict[str, Actor] = {}
    if args.stage1_checkpoint is not None:
        actors["stage1"] = LatentPolicy.load(str(args.stage1_checkpoint))
    if args.model is not None:
        actors["stage2"] = load_model(args.model, env)
    run = Run("evaluate", args, args.env_id or str(flow.env_id))
    for control in ("prior", "zero"):
        run.evaluate(control, control, env)
    for name, actor in actors.items():
        run.evaluate(name, actor, env)
        run.evaluate(f"{name}_stochastic", actor, env, deterministic=False)
    env.close()
    run.finish()


if __name__ == "__main__":
    cli(main, Args)
