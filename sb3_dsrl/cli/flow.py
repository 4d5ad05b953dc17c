"""Stage 0: a flow policy and its chunk critic from ManiSkill demos, state or images.

    sb3-dsrl flow --demo_path demos/PickCube-v1.h5 --exp_name pickcube_flow

The result is a folder, runs/<exp_name>/flow, that FlowPolicy.from_pretrained and the scripts of the other stages load.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sb3_dsrl import (
    FlowPolicy,
    Validation,
    VecLatentSteering,
    VelocityMLP,
    VelocityUNet,
    demo_transitions,
    evaluate,
    load_demos,
    train_critic,
    train_flow,
)
from sb3_dsrl.cli.common import EVAL_SEED, Run, TrainingArgs, layout_of, make_env


@dataclass(kw_only=True)
class Args(TrainingArgs):
    """Stage 0."""

    demo_path: Path
    """ManiSkill trajectory file (.h5, its .json beside it)."""
    num_demos: int | None = None
    """Use the first so many demos; all if not given."""
    obs_mode: str | None = None
    """A check: the demos must have this observation mode."""
    control_mode: str | None = None
    """A check: the demos must be for this controller."""
    policy: Literal["shortcut", "diffusion"] = "shortcut"
    """Shortcut flow, or diffusion policy decoded by DDIM."""
    network: Literal["unet", "mlp"] = "unet"
    """Velocity network."""
    size: Literal["small", "medium", "large"] = "small"
    """Size of the network."""
    width: int | None = None
    """In place of the size's: hidden units of the MLP, or channels of the U-Net's first stage (later ones: times 2 and 4)."""
    spatial_features: bool = True
    """State demos: with features of where things are to each other. The demos say what their state is made of, or else the
    task is made once and asked."""
    normalize_actions: bool = True
    """Let the network see actions with mean 0 and std 1, which are those of its noise."""
    obs_horizon: int | None = None
    """Frames that the policy sees; 2 for state, 1 for images if not given."""
    pred_horizon: int = 16
    """Length of a chunk."""
    act_horizon: int = 8
    """Env steps of each chunk that are executed."""
    num_inference_steps: int = 8
    """Decoding steps."""
    total_iters: int = 3_000
    """Optimiser steps of the flow."""
    critic_iters: int = 2_000
    """Optimiser steps of the critic; 0 trains none."""
    batch_size: int = 128
    """Windows in a batch."""
    lr: float = 1e-3
    """Learning rate of the flow."""
    eval_freq: int = 0
    """Iterations between two judgements of the flow on a tenth of the demos, which is held out, and by success in 48 episodes.
    The best one is kept; with --num_eval_episodes 0 by the held-out loss. 0 learns from all demos and keeps the last."""
    gamma: float = 0.99
    """Discount per env step."""
    reward_scale: float = 1.0
    """Factor on rewards."""


#: Hidden units and blocks of the MLP, channels of the U-Net's first stage.
SIZES = {"small": (256, 3, 64), "medium": (512, 4, 128), "large": (1024, 6, 256)}


def network(args: Args) -> dict[str, Any]:
    """The flags of the network as arguments of ``train_flow``."""
    width, n_blocks, channels = SIZES[args.size]
    if args.network == "mlp":
        return dict(net_class=VelocityMLP, net_kwargs=dict(width=args.width or width, n_blocks=n_blocks))
    channels = args.width or channels
    return dict(net_class=VelocityUNet, net_kwargs=dict(widths=(channels, 2 * channels, 4 * channels)))


class Success:
    """Scores a flow by its success in the simulator, w ~ N(0, I)."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self._env: VecLatentSteering | None = None

    def __call__(self, flow: FlowPolicy) -> float:
        if self._env is None:  # the flow is the same object every time
            self._env = make_env(self.args, flow, self.args.num_eval_envs)
        return evaluate("prior", self._env, 48, seed=EVAL_SEED + 100_000).success_at_end

    def close(self) -> None:
        """Ends the simulators."""
        if self._env is not None:
            self._env.close()


def main(args: Args) -> None:
    """Trains, evaluates the unsteered flow and saves it."""
    demos = load_demos(args.demo_path, args.num_demos, args.control_mode)
    for flag, wanted, found in (("obs_mode", args.obs_mode, demos.obs_mode), ("env_id", args.env_id, demos.env_id)):
        if wanted is not None and wanted != found:
            raise ValueError(f"--{flag} is {wanted}, but {args.demo_path} holds {found}")
    assert demos.env_id is not None  # ManiSkill's files name it
    run = Run("train_flow", args, demos.env_id)
    checkpoint = run.checkpoint()
    policy_class: type[FlowPolicy] = FlowPolicy
    if args.policy == "diffusion":
        from sb3_dsrl.policies.diffusion import DiffusionPolicy

        policy_class = DiffusionPolicy
    success = Success(args)
    score = success if args.num_eval_episodes else None
    layout = layout_of(demos) if args.spatial_features else None
    flow = train_flow(
        demos,
        spatial_features=args.spatial_features,
        state_layout=layout,
        normalize_actions=args.normalize_actions,
        policy_class=policy_class,
        **network(args),
        obs_horizon=args.obs_horizon or (1 if demos.image_shapes else 2),
        pred_horizon=args.pred_horizon,
        act_horizon=args.act_horizon,
        num_steps=args.num_inference_steps,
        gamma=args.gamma,
        reward_scale=args.reward_scale,
        n_iterations=args.total_iters,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        device=args.device,
        tensorboard_log=run.tensorboard / "flow",
        progress_bar=True,
        checkpoint=checkpoint,
        validation=Validation(freq=args.eval_freq, score=score) if args.eval_freq else None,
    )
    success.close()
    if args.critic_iters:
        transitions = demo_transitions(flow, demos, ignore_terminations=args.ignore_terminations)
        train_critic(
            flow,
            transitions,
            n_iterations=args.critic_iters,
            tensorboard_log=run.tensorboard / "critic",
            progress_bar=True,
            checkpoint=checkpoint,
        )
    flow.save_pretrained(run.folder / "flow")
    if args.num_eval_episodes:
        env = make_env(args, flow, args.num_eval_envs)
        for control in ("prior", "zero"):
            run.evaluate(control, control, env)
        env.close()
    flow.generate_model_card(results=run.rows).save(run.folder / "flow" / "README.md")
    run.finish(demos=len(demos.episodes))
