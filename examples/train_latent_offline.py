"""Stage 1, offline: a latent policy over the noise of a frozen flow.

    python examples/train_latent_offline.py --awsc_checkpoint runs/pickcube_flow/flow --exp_name pickcube_stage1

It learns from rollouts of the flow, or with --weighting candidates from demos and the flow's critic. With --ticket it
first looks for the one fixed noise that succeeds most and starts there. The result is runs/<exp_name>/stage1.pt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from common import FlowArgs, Run, TrainingArgs, cli, load_flow, make_env
from stable_baselines3 import PPO

from sb3_dsrl import Gate, Rollouts, Ticket, collect_rollouts, find_ticket, ppo_kwargs, pretrain_latent


@dataclass(kw_only=True)
class Args(FlowArgs, TrainingArgs):
    """Stage 1."""

    demo_path: Path | None = None
    """Demos; needed for --weighting candidates without rollouts."""
    num_demos: int | None = None
    """Use the first so many demos; all if not given."""
    weighting: Literal["executed", "candidates", "none"] = "executed"
    """Weigh the noises that rollouts executed, or candidates scored by the critic; "none" keeps the start (a ticket, say)."""
    rollout_episodes: int = 256
    """Episodes of the frozen flow to learn from."""
    ticket: bool = False
    """Start from a golden ticket: the policy's mean is that noise, its std --std."""
    ticket_noises: int = 32
    """Noises that the search for a ticket starts with."""
    std: float = 0.45
    """Standard deviation of a new policy; 1 is the prior's."""
    gate_episodes: int = 0
    """Test the result on so many fresh episodes and keep the start (a ticket, say) if that was better; 0 keeps the result."""
    total_iters: int | None = None
    """Optimiser steps; 500 for executed noises and 2,000 for candidates if not given."""
    batch_size: int = 256
    """States in a batch."""
    lr: float = 3e-4
    """Learning rate."""
    num_candidates: int = 16
    """Candidates a state."""
    pool_size: int | None = None
    """Decode and score so many candidates a state once, beforehand."""
    ucb_kappa: float = 1.0
    """Scores are mean - kappa * std over the critic ensemble."""
    advantage_temperature: float | None = None
    """Temperature of the weights; 0.3 for executed noises and 1 for candidates if not given."""
    tau: float = 5.0
    """Temperature of the soft baseline."""
    kl_coef: float | None = None
    """Weight of KL(pi || N(0, I)); 0.01 for executed noises and 0.001 for candidates if not given."""


def settings(args: Args) -> dict[str, Any]:
    """Those that the weighting knows."""
    common = dict(
        n_iterations=args.total_iters,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        beta=args.advantage_temperature,
        kl_coef=args.kl_coef,
    )
    if args.weighting == "executed":
        return common
    return common | dict(n_candidates=args.num_candidates, pool_size=args.pool_size, kappa=args.ucb_kappa, tau=args.tau)


def main(args: Args) -> None:
    """Trains, evaluates and saves the latent policy."""
    flow = load_flow(args)
    env = make_env(args, flow, args.num_envs, args.seed)
    run = Run("train_latent_offline", args, args.env_id or str(flow.env_id))
    checkpoint = run.checkpoint()
    env_steps, policy_kwargs = 0, dict[str, Any](log_std_init=float(np.log(args.std)))
    if args.ticket:
        rounds = ((args.ticket_noises, 8), (max(1, args.ticket_noises // 6), 32))
        ticket = checkpoint.once("ticket", Ticket, lambda: find_ticket(env, rounds=rounds, seed=args.seed, progress_bar=True))
        env_steps += ticket.env_steps
        policy_kwargs["centre"] = ticket.w
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=policy_kwargs, seed=args.seed))
    if args.weighting != "none":
        rollouts = None
        if args.rollout_episodes:
            actor = model if args.ticket else flow
            rollouts = checkpoint.once(
                "rollouts",
                Rollouts,
                lambda: collect_rollouts(actor, env, args.rollout_episodes, seed=args.seed, progress_bar=True),
            )
            env_steps += rollouts.env_steps
        gate = Gate(env, args.gate_episodes) if args.gate_episodes else None
        pretrain_latent(
            model,
            args.demo_path if args.weighting == "candidates" else None,
            rollouts,
            weighting=args.weighting,
            gate=gate,
            tensorboard_log=run.tensorboard / "stage1",
            progress_bar=True,
            checkpoint=checkpoint,
            **settings(args),
        )
        env_steps += 0 if gate is None else gate.env_steps
    model.policy.save(str(run.folder / "stage1.pt"))
    if args.num_eval_episodes:
        run.evaluate("prior", "prior", env)
        run.evaluate("stage1", model, env)
        run.evaluate("stage1_stochastic", model, env, deterministic=False)
    env.close()
    run.finish(env_steps=env_steps)


if __name__ == "__main__":
    cli(main, Args)
