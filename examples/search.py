"""Search noise in the simulator, then distil what was found: a latent policy that needs no search.

    python examples/search.py --awsc_checkpoint runs/stackcube_flow/flow --rounds 2 --search_episodes 48

At every macro-step some noises are tried ahead in the simulator, which goes back afterwards, and the best is played. A policy
learns from all scores; the next round searches around that policy, and a new policy learns from all rounds (expert iteration).
Each round's search is in runs/<exp_name>/search.npz, the policy in policy.pt.
"""

from dataclasses import dataclass

from sb3_dsrl import LatentPolicy, SearchResult, pretrain_latent, search_noise
from sb3_dsrl.cli.common import EvalArgs, FlowArgs, Run, cli, load_flow, make_env


@dataclass(kw_only=True)
class Args(EvalArgs, FlowArgs):
    """Search and distil."""

    num_envs: int = 8
    """Simulated envs; worker processes share them, one a core."""
    rounds: int = 2
    """Searches, each with the policy so far as proposal."""
    search_episodes: int = 48
    """Searched episodes of each round."""
    num_candidates: int = 8
    """Noises that are tried at a macro-step."""
    horizon: int = 3
    """Macro-steps that each of them is followed."""
    share: float = 1.0
    """Share of the macro-steps that are searched."""
    bootstrap: bool = False
    """From the second round on, add the value of what was found to scores at the horizon."""


def main(args: Args) -> None:
    """Runs the rounds, and prints what search and policies reach."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, found {args.rounds}")
    flow = load_flow(args, args.awsc_checkpoint)
    env = make_env(args, flow, args.num_envs, args.seed)
    run = Run("search", args, args.env_id or str(flow.env_id))

    eval_env = make_env(args, flow, args.num_eval_envs)
    run.evaluate("zero", "zero", eval_env)
    policy: LatentPolicy | None = None
    everything: SearchResult | None = None
    for i in range(args.rounds):
        found = search_noise(
            env,
            flow if policy is None else policy,
            args.search_episodes,
            n_candidates=args.num_candidates,
            horizon=args.horizon,
            share=args.share,
            value=policy if args.bootstrap else None,
            seed=args.seed + 1_000 * i,
            progress_bar=True,
        )
        everything = found if everything is None else everything + found
        everything.save(run.folder / "search.npz")
        outcome = found.result
        outcome.name = f"search, round {i + 1}"
        run.rows.append(outcome)
        policy = pretrain_latent(flow, search=everything, warm_start_value=args.bootstrap, seed=args.seed, progress_bar=True)
        policy.save(run.folder / "policy.pt")
        run.evaluate(f"distilled, round {i + 1}", policy, eval_env)
    for each in (env, eval_env):
        each.close()
    assert everything is not None
    run.finish(env_steps=everything.env_steps)


if __name__ == "__main__":
    cli(main, Args)
