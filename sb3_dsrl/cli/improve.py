"""Everything in one call: tries what costs nothing, learns within a budget of env steps, and keeps the best.

    sb3-dsrl improve --awsc_checkpoint runs/pickcube_flow/flow --budget 100000

What comes out is not worse than the flow, but for a chance of --alpha. In runs/<exp_name>: report.json, and policy, a folder
that SteeredPolicy.from_pretrained plays.
"""

from dataclasses import dataclass

from sb3_dsrl import improve
from sb3_dsrl.cli.common import EvalArgs, FlowArgs, Run, env_kwargs, load_flow, make_env
from sb3_dsrl.cli.demo_args import DemoArgs


@dataclass(kw_only=True)
class Args(DemoArgs, EvalArgs, FlowArgs):
    """Improve a flow."""

    budget: int = 100_000
    """Env steps of everything but the final evaluation."""
    num_envs: int = 8
    """Simulated envs; worker processes share them, one a core."""
    alpha: float = 0.05
    """Chance to deploy a policy that is no better than the flow."""


def main(args: Args) -> None:
    """Improves, evaluates and saves the policy."""
    demos = args.load_demos()
    flow = load_flow(args, args.awsc_checkpoint)
    env_id, kwargs = env_kwargs(args, flow)
    run = Run("improve", args, env_id)
    policy = improve(
        flow,
        env_id,
        demos,
        args.budget,
        n_envs=args.num_envs,
        seed=args.seed,
        alpha=args.alpha,
        progress_bar=True,
        **kwargs,
    )
    policy.save_pretrained(run.folder / "policy")
    print(f"\n{policy.report}")
    if args.num_eval_episodes:
        eval_env = make_env(args, flow, args.num_eval_envs)
        run.evaluate("prior", "prior", eval_env)
        run.evaluate("zero", "zero", eval_env)
        run.evaluate(policy.report.name, policy, eval_env)
        eval_env.close()
    run.finish(env_steps=policy.report.env_steps, improve=policy.report.as_dict())
