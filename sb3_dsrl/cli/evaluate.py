"""Evaluates a flow, and what steers it, on the same episodes.

    sb3-dsrl evaluate --awsc_checkpoint runs/pickcube_flow/flow --stage1_checkpoint runs/pickcube_stage1/stage1.pt \\
        --model runs/pickcube_stage2/checkpoints/final.zip
    sb3-dsrl evaluate --policy runs/pickcube_stage2/policy
"""

from dataclasses import dataclass
from pathlib import Path

from sb3_dsrl import LatentPolicy, SteeredPolicy
from sb3_dsrl.cli.common import EvalArgs, Run, SteeringArgs, check_flow, load_flow, load_model, make_env, refuse, steering_of
from sb3_dsrl.evaluation.play import Actor


@dataclass(kw_only=True)
class Args(SteeringArgs, EvalArgs):
    """Evaluation."""

    awsc_checkpoint: Path | None = None
    """The flow: a folder written by stage 0, or a .pt file of AWShortCutFlowAgent; not needed with --policy."""
    policy: Path | None = None
    """Steered policy, flow and all: the folder "policy" of stage 1 or 2."""
    stage1_checkpoint: Path | None = None
    """Latent policy of stage 1."""
    model: Path | None = None
    """Model of stage 2."""


def main(args: Args) -> None:
    """Prints a table: the flow's prior, w = 0, and each policy, deterministic and sampled."""
    actors: dict[str, Actor] = {}
    if args.policy is not None:
        steering = ("steer_mode", "num_inference_steps", "gamma", "reward_scale")
        given = {name: getattr(args, name) for name in ("awsc_checkpoint", *steering)}
        refuse(given, f"and --policy exclude each other: {args.policy} holds a flow and says how it is steered")
        actors["policy"] = policy = SteeredPolicy.from_pretrained(args.policy, device=args.device)
        flow = policy.flow
        check_flow(args, flow, args.policy)
        env = make_env(args, flow, args.num_eval_envs, **steering_of(policy))
    elif args.awsc_checkpoint is not None:
        flow = load_flow(args, args.awsc_checkpoint)
        env = make_env(args, flow, args.num_eval_envs)
    else:
        raise ValueError("Nothing to evaluate: pass --policy, or --awsc_checkpoint and perhaps what steers it")
    if args.stage1_checkpoint is not None:
        actors["stage1"] = LatentPolicy.load(args.stage1_checkpoint, args.device)
    if args.model is not None:
        actors["stage2"] = load_model(args.model, env, args.device)
    run = Run("evaluate", args, args.env_id or str(flow.env_id))
    for control in ("prior", "zero"):
        run.evaluate(control, control, env)
    for name, actor in actors.items():
        run.evaluate(name, actor, env)
        run.evaluate(f"{name}_stochastic", actor, env, deterministic=False)
    env.close()
    run.finish()
