"""Stage 2, online: stock PPO improves the latent policy in the simulator.

    python examples/train_latent_online.py --awsc_checkpoint runs/pickcube_flow/flow \\
        --stage1_checkpoint runs/pickcube_stage1/stage1.pt --total_timesteps 200000 --exp_name pickcube_stage2

The models are in runs/<exp_name>/checkpoints: latest, best_success_at_end, best_success_once and final.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import FlowArgs, Run, TrainingArgs, cli, load_flow, make_env
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_dsrl import LatentPolicy, ResumeCallback, SuccessEvalCallback, ppo_kwargs, resume
from sb3_dsrl.utils.checkpoint import atomic_file


@dataclass(kw_only=True)
class Args(FlowArgs, TrainingArgs):
    """Stage 2."""

    stage1_checkpoint: Path | None = None
    """Latent policy of train_latent_offline.py; the prior if not given."""
    total_timesteps: int = 200_000
    """Env steps of stage 2."""
    rollout_steps: int | None = None
    """Macro-steps of each env between two updates; 512 over all envs if not given."""
    ppo_epochs: int = 10
    """Epochs of an update."""
    batch_size: int | None = None
    """Macro-steps in a minibatch; a quarter of the rollout if not given."""
    lr: float = 3e-4
    """Learning rate; it falls linearly to 0."""
    value_lr: float = 1e-3
    """Learning rate of the value network; it falls in proportion."""
    prior_mix_ratio: float = 0.03
    """Part of the noises that comes from N(0, I) while data is collected."""
    prior_mix_decay: float = 0.995
    """Factor on it per rollout."""
    std: float = 0.45
    """Without --stage1_checkpoint: standard deviation of the new policy."""
    eval_freq: int = 25_000
    """Env steps between two evaluations."""
    eval_freq_episodes: int = 48
    """Episodes of each of them."""
    log_freq: int = 1
    """Rollouts between two records in TensorBoard."""
    act_horizon: int | None = None
    """A check: the flow must execute so many env steps of each chunk."""


def main(args: Args) -> None:
    """Trains, evaluates and saves the model."""
    flow = load_flow(args)
    if args.act_horizon not in (None, flow.act_horizon):
        raise ValueError(f"--act_horizon is {args.act_horizon}, but the flow in {args.awsc_checkpoint} has {flow.act_horizon}")
    stage1 = None if args.stage1_checkpoint is None else LatentPolicy.load(str(args.stage1_checkpoint))
    env = make_env(args, flow, args.num_envs, args.seed)
    eval_env = make_env(args, flow, args.num_eval_envs)
    run = Run("train_latent_online", args, args.env_id or str(flow.env_id))

    policy_kwargs: dict[str, Any] = dict(
        prior_mix=args.prior_mix_ratio,
        prior_mix_decay=args.prior_mix_decay,
        value_lr=args.value_lr,
        log_std_init=float(np.log(args.std)),
    )
    overrides: dict[str, Any] = dict(
        learning_rate=LinearSchedule(args.lr, 0.0, 1.0),
        n_epochs=args.ppo_epochs,
        policy_kwargs=policy_kwargs,
        seed=args.seed,
        tensorboard_log=str(run.tensorboard),
    )
    if args.rollout_steps is not None:
        overrides |= dict(n_steps=args.rollout_steps, batch_size=max(2, args.rollout_steps * args.num_envs // 4))
    if args.batch_size is not None:
        overrides["batch_size"] = args.batch_size
    saved = run.folder / "resume" / "stage2.zip"
    model = resume(PPO, saved, env) if run.resumes else None
    if model is None:
        model = PPO("LatentPolicy", env, **ppo_kwargs(env, **overrides))
        if stage1 is not None:
            stage1.copy_into(model)
    stage1_steps = 0
    if args.stage1_checkpoint is not None:
        report = args.stage1_checkpoint.parent / "report.json"
        stage1_steps = json.loads(report.read_text()).get("env_steps", 0) if report.is_file() else 0

    checkpoints = run.folder / "checkpoints"
    curve = SuccessEvalCallback(
        eval_env, args.eval_freq, args.eval_freq_episodes, stochastic=True, save_path=checkpoints, env_steps=stage1_steps
    )
    keeper = ResumeCallback(saved, args.save_freq, keep=[curve])
    model.learn(
        args.total_timesteps // flow.act_horizon - model.num_timesteps,
        [curve, keeper],
        args.log_freq,
        tb_log_name="stage2",
        reset_num_timesteps=model.num_timesteps == 0,
        progress_bar=True,
    )
    rate = round(curve.env_steps_per_second, 1)
    with atomic_file(checkpoints / "final.zip") as file:
        model.save(file)
    if args.num_eval_episodes:
        run.evaluate("prior", "prior", eval_env)
        run.evaluate("stage2", model, eval_env)
        run.evaluate("stage2_stochastic", model, eval_env, deterministic=False)
    env.close()
    eval_env.close()
    points = [
        dict(env_steps=steps, success_once=mean.success_once, success_at_end=mean.success_at_end)
        for steps, mean, _ in curve.history
    ]
    run.finish(env_steps=curve.env_steps, stage1_env_steps=stage1_steps, env_steps_per_second=rate, curve=points)


if __name__ == "__main__":
    cli(main, Args)
