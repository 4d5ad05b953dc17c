"""Can latent steering help this flow? A report from a few hundred episodes, before any training.

    sb3-dsrl steerability --awsc_checkpoint runs/pickcube_flow/flow --demo_path demos/PickCube-v1.h5

It tries w = 0, fixed noises and the critic's choice, compares how far noise moves the actions with the demos, and ends in a
verdict. Text, report.json and steerability.png are in runs/<exp_name>.
"""

from dataclasses import dataclass

from sb3_dsrl import steerability
from sb3_dsrl.cli.common import FlowArgs, Run, load_flow, make_env
from sb3_dsrl.cli.demo_args import DemoArgs


@dataclass(kw_only=True)
class Args(DemoArgs, FlowArgs):
    """Steerability of a flow."""

    num_envs: int = 8
    """Simulated envs; worker processes share them, one a core."""
    episodes: int = 400
    """Episodes, at most."""
    num_tickets: int = 16
    """Fixed noises to try."""
    num_candidates: int = 16
    """Noises that the critic chooses from."""
    ucb_kappa: float = 1.0
    """Scores are mean - kappa * std over the critic ensemble."""


def main(args: Args) -> None:
    """Prints the report and writes it with its figure."""
    demos = args.load_demos()
    flow = load_flow(args, args.awsc_checkpoint)
    env = make_env(args, flow, args.num_envs, args.seed)
    run = Run("steerability", args, args.env_id or str(flow.env_id))
    report = steerability(
        flow,
        env,
        demos=demos,
        episodes=args.episodes,
        n_tickets=args.num_tickets,
        n_candidates=args.num_candidates,
        kappa=args.ucb_kappa,
        seed=args.seed,
        progress_bar=True,
    )
    env.close()
    report.plot(run.folder / "steerability.png")
    print(f"\n{report.findings}")
    run.rows = report.rows
    run.finish(**report.as_dict())
