"""Stage 1, offline: a latent policy over the noise of a frozen flow.

    sb3-dsrl stage1 --awsc_checkpoint runs/pickcube_flow/flow --exp_name pickcube_stage1

It learns from rollouts of the flow, or with --demo_path, without a single env step, from demos and the flow's critic. With
--ticket it first looks for the one fixed noise that succeeds most and starts there. In runs/<exp_name>: stage1.pt, the best
policies so far in checkpoints, and policy, which SteeredPolicy.from_pretrained loads.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from stable_baselines3 import PPO

from sb3_dsrl import (
    CandidateSettings,
    ExecutedSettings,
    Gate,
    InvertedSettings,
    LatentPolicy,
    Rollouts,
    SteeredPolicy,
    Ticket,
    TrainingCheckpoint,
    VecLatentSteering,
    collect_rollouts,
    evaluate,
    find_ticket,
    load_demos,
    ppo_kwargs,
    pretrain_latent,
)
from sb3_dsrl.cli.common import FlowArgs, Run, TrainingArgs, load_flow, make_env, refuse
from sb3_dsrl.stage1.pretrain import Weighting
from sb3_dsrl.stage2.resume import RECONFIGURE
from sb3_dsrl.utils.checkpoint import atomic_file

CURVE_SEED = 1_010_000  # not the episodes of the final evaluations, or the best policy would look too good there
POOL_SIZE = 64  # candidates that are fresh in every batch take hours on a CPU


@dataclass(kw_only=True)
class Args(FlowArgs, TrainingArgs):
    """Stage 1."""

    demo_path: Path | None = None
    """Demos, whose states candidates are for, or whose chunks are inverted."""
    num_demos: int | None = None
    """Use the first so many demos; all if not given."""
    weighting: Literal["auto", "executed", "inverted", "candidates", "none"] = "auto"
    """Weigh the noises that rollouts executed, those that demos need (and of rollouts), or candidates scored by the critic;
    "none" keeps the start (a ticket, say); "auto" is "candidates" with --demo_path and "executed" without."""
    rollout_episodes: int | None = None
    """Episodes of the frozen flow to learn from; if not given, none with --demo_path and 256 without."""
    num_envs: int | None = None
    """Simulated envs of rollouts, ticket and gate, 8 if not given; worker processes share them, one a core."""
    ticket: bool = False
    """Start from a golden ticket: the policy's mean is that noise, its std --std."""
    ticket_noises: int | None = None
    """Noises that the search for a ticket starts with; 32 if not given."""
    std: float | None = None
    """Standard deviation of a new policy, 1 is the prior's; 0.45, or 0.3 with shared noise, if not given."""
    gate_episodes: int = 0
    """Test the result on fresh episodes, so many at most, and keep the start (a ticket, say) if that was better; 0 keeps the
    result."""
    total_iters: int | None = None
    """Optimiser steps; 500 for executed noises and 2,000 for candidates if not given."""
    eval_freq: int = 1_000
    """Iterations between two evaluations of --num_eval_episodes each; 0 evaluates at the end only."""
    log_freq: int = 100
    """Iterations between two records in TensorBoard."""
    batch_size: int = 256
    """States in a batch."""
    lr: float = 3e-4
    """Learning rate."""
    num_candidates: int | None = None
    """Candidates of a state in a batch; 16 if not given."""
    pool_size: int | None = None
    """Candidates of a state that are decoded and scored once, beforehand; 64 if not given, 0 draws fresh ones every time."""
    ucb_kappa: float | None = None
    """Scores are mean - kappa * std over the critic ensemble; 1 if not given."""
    advantage_temperature: float | None = None
    """Temperature of the weights; 0.3 for executed noises and 1 for candidates if not given."""
    tau: float | None = None
    """Temperature of the soft baseline; 5 if not given."""
    kl_coef: float | None = None
    """Weight of KL(pi || N(0, I)); 0.01 for executed noises and 0.001 for candidates if not given."""

    @property
    def mode(self) -> str:
        """The weighting that is meant."""
        return self.weighting if self.weighting != "auto" else "candidates" if self.demo_path else "executed"

    @property
    def n_rollouts(self) -> int:
        """Episodes to collect."""
        if self.mode == "none":
            return 0
        return self.rollout_episodes if self.rollout_episodes is not None else 0 if self.demo_path else 256

    @property
    def collects(self) -> bool:
        """Whether anything is played to learn from it."""
        return bool(self.n_rollouts or self.ticket or self.gate_episodes)

    @property
    def n_iterations(self) -> int:
        """Optimiser steps."""
        defaults = dict(
            executed=ExecutedSettings.n_iterations,
            inverted=InvertedSettings.n_iterations,
            candidates=CandidateSettings.n_iterations,
            none=0,
        )
        return defaults[self.mode] if self.total_iters is None else self.total_iters

    def check(self) -> None:
        """Refuses flags that would do nothing."""
        of_candidates = ("num_candidates", "pool_size", "ucb_kappa", "tau")
        of_learning = ("rollout_episodes", "total_iters", "advantage_temperature", "kl_coef")
        for names, useless, why in (
            (of_candidates, self.mode != "candidates", f"does nothing with --weighting {self.mode}: it is for candidates"),
            (("demo_path",), self.mode in ("executed", "none"), f"does nothing with --weighting {self.mode}"),
            (of_learning, self.mode == "none", "does nothing with --weighting none, which learns nothing"),
            (("num_demos",), self.demo_path is None, "does nothing without --demo_path"),
            (("ticket_noises",), not self.ticket, "does nothing without --ticket"),
            (("num_envs",), not self.collects, "does nothing without rollouts, --ticket and --gate_episodes"),
        ):
            if useless:
                refuse({name: getattr(self, name) for name in names}, why)

    def settings(self) -> dict[str, Any]:
        """Those that the weighting knows; None is the recommended value."""
        common = dict(
            n_iterations=self.n_iterations,
            batch_size=self.batch_size,
            learning_rate=self.lr,
            beta=self.advantage_temperature,
            kl_coef=self.kl_coef,
        )
        if self.mode != "candidates":
            return common
        pool_size = max(POOL_SIZE, self.num_candidates or 0) if self.pool_size is None else self.pool_size or None
        return common | dict(n_candidates=self.num_candidates, pool_size=pool_size, kappa=self.ucb_kappa, tau=self.tau)


class Curve:
    """
    Evaluates the policy now and then, and keeps the best ones so far. A resumed run goes on with it.

    :param run: of this script
    :param env: to evaluate in
    :param episodes: of each evaluation
    """

    def __init__(self, run: Run, env: VecLatentSteering, episodes: int) -> None:
        self.run, self.env, self.episodes = run, env, episodes
        self.path = run.folder / "resume" / "curve.json"
        #: what was found so far, in order
        self.points: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else []

    def measure(self, done: int, policy: LatentPolicy) -> None:
        """
        Adds a point. Points after it are of a run that was resumed from before them.

        :param done: iterations so far
        :param policy: as it is then
        """
        self.env.set_options(dict(RECONFIGURE))  # to the last bit the same, whatever was played before
        result = evaluate(policy, self.env, self.episodes, seed=CURVE_SEED, progress_bar=True, name=f"iteration {done}")
        before = [point for point in self.points if point["iteration"] < done]
        point: dict[str, Any] = dict(iteration=done, episodes=self.episodes)
        for key in ("success_once", "success_at_end"):
            point[key] = getattr(result, key)
            self.run.writer.add_scalar(f"eval/{key}", point[key], done)
            if point[key] > max((other[key] for other in before), default=-1.0):
                policy.save(self.run.folder / "checkpoints" / f"best_eval_{key}.pt")
        self.points = [*before, point]
        with atomic_file(self.path) as file:
            file.write(json.dumps(self.points).encode())


def learn(args: Args, run: Run, checkpoint: TrainingCheckpoint, model: PPO, env: VecLatentSteering, curve: Curve) -> int:
    """
    Stage 1 itself.

    :return: env steps that were played for it
    """
    rollouts = None
    if args.n_rollouts:
        actor = model if args.ticket else env.steering.flow
        rollouts = checkpoint.once(
            "rollouts",
            Rollouts,
            lambda: collect_rollouts(actor, env, args.n_rollouts, seed=args.seed, progress_bar=True),
        )
    gate = Gate(env, args.gate_episodes) if args.gate_episodes else None

    def measure(done: int, policy: LatentPolicy) -> None:
        if done < args.n_iterations:  # the last time is when the gate has decided
            curve.measure(done, policy)

    pretrain_latent(
        model,
        None if args.demo_path is None else load_demos(args.demo_path, args.num_demos),
        rollouts,
        weighting=cast(Weighting, args.mode),
        gate=gate,
        callback=measure if args.eval_freq and args.num_eval_episodes else None,
        callback_freq=args.eval_freq or 1,
        log_interval=args.log_freq,
        tensorboard_log=run.tensorboard / "stage1",
        progress_bar=True,
        checkpoint=checkpoint,
        **args.settings(),
    )
    return (0 if rollouts is None else rollouts.env_steps) + (0 if gate is None else gate.env_steps)


def main(args: Args) -> None:
    """Trains, evaluates and saves the latent policy."""
    args.check()
    flow = load_flow(args, args.awsc_checkpoint)
    if args.mode == "candidates" and flow.critic is not None:
        flow.check_critic(flow.critic)
    eval_env = make_env(args, flow, args.num_eval_envs if args.num_eval_episodes else 1)
    env = make_env(args, flow, args.num_envs or 8, args.seed) if args.collects else eval_env
    run = Run("train_latent_offline", args, args.env_id or str(flow.env_id))
    checkpoint = run.checkpoint()
    curve = Curve(run, eval_env, args.num_eval_episodes)
    env_steps, policy_kwargs = 0, dict[str, Any]()
    if args.std is not None:
        policy_kwargs["log_std_init"] = float(np.log(args.std))
    if args.ticket:
        noises = args.ticket_noises or 32
        rounds = ((noises, 8), (max(1, noises // 6), 32))
        ticket = checkpoint.once("ticket", Ticket, lambda: find_ticket(env, rounds=rounds, seed=args.seed, progress_bar=True))
        env_steps += ticket.env_steps
        policy_kwargs["centre"] = ticket.w
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=policy_kwargs, seed=args.seed, device=args.device))
    assert isinstance(model.policy, LatentPolicy)
    if args.mode != "none":
        env_steps += learn(args, run, checkpoint, model, env, curve)
    model.policy.save(run.folder / "stage1.pt")
    policy = SteeredPolicy.of(model)
    policy.save_pretrained(run.folder / "policy")
    if args.num_eval_episodes:
        if not curve.points or curve.points[-1]["iteration"] < args.n_iterations:
            curve.measure(args.n_iterations, model.policy)
        run.evaluate("prior", "prior", eval_env)
        run.evaluate("stage1", model, eval_env)
        run.evaluate("stage1_stochastic", model, eval_env, deterministic=False)
    eval_env.close()
    if env is not eval_env:
        env.close()
    policy.generate_model_card(results=run.rows, env_steps=env_steps).save(run.folder / "policy" / "README.md")
    run.finish(env_steps=env_steps, weighting=args.mode, curve=curve.points)
