"""Stage 2, online: stock PPO improves the latent policy in the simulator.

    sb3-dsrl stage2 --awsc_checkpoint runs/pickcube_flow/flow \\
        --stage1_checkpoint runs/pickcube_stage1/stage1.pt --total_timesteps 200000 --exp_name pickcube_stage2

The models are in runs/<exp_name>/checkpoints: latest, best_success_at_end, best_success_once and final. In policy beside them
is what SteeredPolicy.from_pretrained loads.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_dsrl import (
    DemoStarts,
    LatentPolicy,
    NoiseSpace,
    ResumeCallback,
    SteeredPolicy,
    SuccessEvalCallback,
    VecLatentSteering,
    ppo_kwargs,
    resume,
)
from sb3_dsrl.cli.common import FlowArgs, Run, TrainingArgs, load_flow, make_env, refuse
from sb3_dsrl.utils.checkpoint import atomic_file


@dataclass(kw_only=True)
class Args(FlowArgs, TrainingArgs):
    """Stage 2."""

    stage1_checkpoint: Annotated[Path | None, tyro.conf.arg(aliases=["--checkpoint"])] = None
    """Latent policy of stage 1; a new one if not given."""
    num_envs: int = 8
    """Simulated envs of training; worker processes share them, one a core."""
    demo_starts: Path | None = None
    """Demos along which episodes of training start, at first near their end, then earlier as success allows."""
    total_timesteps: int = 200_000
    """Env steps of stage 2."""
    rollout_steps: int | None = None
    """Macro-steps of each env between two updates; 512 over all envs, but at least 16 of each, if not given."""
    ppo_epochs: int = 10
    """Epochs of an update."""
    batch_size: int | None = None
    """Macro-steps in a minibatch; about a quarter of the rollout if not given."""
    lr: float | None = None
    """Learning rate, which falls linearly to 0; one that fits the number of entries of the noise if not given."""
    value_lr: float = 1e-3
    """Learning rate of the value network; it falls in proportion."""
    ppo_clip: float = 0.2
    """Clip range of PPO's ratio."""
    entropy_coef: float = 1e-3
    """Weight of the entropy bonus."""
    prior_mix_ratio: float | None = None
    """Part of the noises that comes from N(0, I) while data is collected; 0.03, or 0 with shared noise, if not given."""
    prior_mix_decay: float = 0.995
    """Factor on it per rollout."""
    std: float | None = None
    """Standard deviation of a new policy; 0.45, or 0.3 with shared noise, if not given."""
    eval_freq: int = 25_000
    """Env steps between two evaluations."""
    eval_freq_episodes: int = 48
    """Episodes of each of them."""
    log_freq: int = 1
    """Rollouts between two records in TensorBoard."""


def settings(args: Args, env: VecLatentSteering) -> dict[str, Any]:
    """Keyword arguments of PPO: the method's, where the flags say nothing else."""
    policy_kwargs: dict[str, Any] = dict(prior_mix_decay=args.prior_mix_decay, value_lr=args.value_lr)
    if args.prior_mix_ratio is not None:
        policy_kwargs["prior_mix"] = args.prior_mix_ratio
    if args.std is not None:
        policy_kwargs["log_std_init"] = float(np.log(args.std))
    schedule: dict[str, Any] = {} if args.lr is None else dict(learning_rate=LinearSchedule(args.lr, 0.0, 1.0))
    return ppo_kwargs(
        env,
        **schedule,
        n_steps=args.rollout_steps,
        batch_size=args.batch_size,
        n_epochs=args.ppo_epochs,
        clip_range=args.ppo_clip,
        ent_coef=args.entropy_coef,
        policy_kwargs=policy_kwargs,
        seed=args.seed,
    )


def with_gamma_of(env: VecLatentSteering, stage1: LatentPolicy) -> LatentPolicy:
    """
    Stage 1's policy for an env with another discount. Of a discount its weights know nothing but what was worth learning; the
    value function is new.
    """
    space, gamma = stage1.action_space, env.steering.contract.gamma
    if not isinstance(space, NoiseSpace) or space.contract.gamma == gamma:
        return stage1
    print(f"Stage 1 learned with gamma {space.contract.gamma}, stage 2 goes on with {gamma}")
    return stage1.copy(action_space=NoiseSpace(space.noise_shape, replace(space.contract, gamma=gamma)))


def steps_of(stage1_checkpoint: Path) -> int:
    """Env steps of the run that a latent policy is from; 0 if that is unknown."""
    for folder in stage1_checkpoint.absolute().parents[:2]:  # of stage1.pt, and of what is in checkpoints
        if (folder / "report.json").is_file():
            return json.loads((folder / "report.json").read_text()).get("env_steps", 0)
    return 0


def main(args: Args) -> None:
    """Trains, evaluates and saves the model."""
    if args.stage1_checkpoint is not None:
        refuse(dict(std=args.std), "does nothing with --stage1_checkpoint, which holds its own")
    flow = load_flow(args, args.awsc_checkpoint)
    stage1 = None if args.stage1_checkpoint is None else LatentPolicy.load(args.stage1_checkpoint, args.device)
    starts = dict[str, Any]() if args.demo_starts is None else dict(starts=DemoStarts(args.demo_starts))
    env = make_env(args, flow, args.num_envs, args.seed, **starts)
    eval_env = make_env(args, flow, args.num_eval_envs)
    run = Run("train_latent_online", args, args.env_id or str(flow.env_id))

    saved = run.folder / "resume" / "stage2.zip"
    model = resume(PPO, saved, env, device=args.device) if run.resumes else None
    if model is None:
        model = PPO("LatentPolicy", env, tensorboard_log=str(run.tensorboard), device=args.device, **settings(args, env))
        if stage1 is not None:
            with_gamma_of(env, stage1).copy_into(model)
    stage1_steps = 0 if args.stage1_checkpoint is None else steps_of(args.stage1_checkpoint)

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
    policy = SteeredPolicy.of(model)
    policy.save_pretrained(run.folder / "policy")
    if args.num_eval_episodes:
        run.evaluate("prior", "prior", eval_env)
        run.evaluate("stage2", model, eval_env)
        run.evaluate("stage2_stochastic", model, eval_env, deterministic=False)
    policy.generate_model_card(results=run.rows, env_steps=curve.env_steps).save(run.folder / "policy" / "README.md")
    env.close()
    eval_env.close()
    points = [
        dict(env_steps=steps, success_once=mean.success_once, success_at_end=mean.success_at_end)
        for steps, mean, _ in curve.history
    ]
    run.finish(env_steps=curve.env_steps, stage1_env_steps=stage1_steps, env_steps_per_second=rate, curve=points)
