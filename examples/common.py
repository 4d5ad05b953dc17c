"""What the scripts of the three stages share: flags, the run folder, and how a flow is found."""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch as th
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from torch.utils.tensorboard import SummaryWriter

from sb3_dsrl import EvalResult, FlowPolicy, VecLatentSteering, evaluate, make_latent_env, results_table
from sb3_dsrl.evaluation import Player
from sb3_dsrl.integrity import check_zip
from sb3_dsrl.legacy import load_awsc_checkpoint

EVAL_SEED = 1_000_000  # far from the seeds of demos and training


@dataclass(kw_only=True)
class RunArgs:
    """Flags of every script."""

    env_id: str | None = None
    """ManiSkill task; the flow's own if not given."""
    exp_name: str | None = None
    """Name of the run: its files are in runs/<exp_name>. <script>__<env_id>__<seed> if not given."""
    seed: int = 0
    """Seed of everything."""
    sim_backend: Literal["auto", "physx_cpu", "physx_cuda"] = "auto"
    """Simulator."""
    num_eval_envs: int = 8
    """Simulated envs of evaluations."""
    num_eval_episodes: int = 100
    """Episodes of each final evaluation."""
    max_episode_steps: int | None = None
    """Time limit in env steps; the registered one if not given."""
    reward_mode: str = "normalized_dense"
    """ManiSkill reward mode."""
    ignore_terminations: bool | None = None
    """Go on after success until the time limit. If not given: yes, except with a sparse reward. (A dense reward that ends at
    success pays for stalling.)"""
    capture_video: bool = False
    """Film two episodes of each evaluated policy."""
    track: bool = False
    """Log to Weights & Biases as well (extra: wandb)."""
    wandb_project_name: str = "sb3_dsrl"
    """Weights & Biases project."""
    torch_threads: int = 1
    """Threads of this process; simulators have processes of their own."""

    @property
    def ignores_terminations(self) -> bool:
        """Whether episodes go on after success."""
        return self.reward_mode != "sparse" if self.ignore_terminations is None else self.ignore_terminations


@dataclass(kw_only=True)
class FlowArgs(RunArgs):
    """Flags of every script that starts from a flow."""

    awsc_checkpoint: Path
    """The flow: a folder written by train_flow.py, or a .pt file of AWShortCutFlowAgent, which also needs --obs_horizon,
    --pred_horizon, --num_inference_steps, --control_mode, --gamma and --reward_scale."""
    num_envs: int = 8
    """Simulated envs of training; worker processes share them, one a core."""
    num_inference_steps: int | None = None
    """Decoding steps; the flow's own if not given."""
    obs_horizon: int | None = None
    """Of a .pt file: frames that the policy saw."""
    pred_horizon: int | None = None
    """Of a .pt file: length of its chunks."""
    control_mode: str | None = None
    """Of a .pt file: ManiSkill controller. Otherwise a check: it must be the flow's."""
    gamma: float | None = None
    """Discount per env step; the flow's own if not given."""
    reward_scale: float | None = None
    """Of a .pt file: factor on the rewards that its critic was trained with."""
    steer_mode: Literal["full", "act_horizon"] = "full"
    """Steer all of the noise, or only the rows of the actions that are executed."""


def load_flow(args: FlowArgs) -> FlowPolicy:
    """The flow of ``--awsc_checkpoint``, checked against the flags."""
    if args.awsc_checkpoint.suffix == ".pt":
        return load_awsc_checkpoint(
            args.awsc_checkpoint,
            obs_horizon=args.obs_horizon,
            pred_horizon=args.pred_horizon,
            num_steps=args.num_inference_steps,
            control_mode=args.control_mode,
            gamma=args.gamma,
            reward_scale=args.reward_scale,
            env_id=args.env_id,
        )
    flow = FlowPolicy.from_pretrained(args.awsc_checkpoint)
    for name, flag in (
        ("obs_horizon", args.obs_horizon),
        ("pred_horizon", args.pred_horizon),
        ("control_mode", args.control_mode),
    ):
        if flag is not None and flag != getattr(flow, name):
            raise ValueError(f"--{name} is {flag}, but the flow in {args.awsc_checkpoint} has {getattr(flow, name)}")
    return flow


def make_env(args: FlowArgs, flow: FlowPolicy, n_envs: int, seed: int | None = None) -> VecLatentSteering:
    """Steered envs as the flags say."""
    env_id = args.env_id or flow.env_id
    if env_id is None:
        raise ValueError("The flow does not know its task: pass --env_id")
    return make_latent_env(
        env_id,
        flow,
        n_envs,
        sim_backend=args.sim_backend,
        reward_mode=args.reward_mode,
        ignore_terminations=args.ignores_terminations,
        max_episode_steps=args.max_episode_steps,
        gamma=flow.gamma if args.gamma is None else args.gamma,
        steer_mode=args.steer_mode,
        num_steps=args.num_inference_steps,
        seed=seed,
    )


class Run:
    """
    The folder of a run, its TensorBoard log and its report.

    :param script: name of the script
    :param args: its flags
    :param env_id: task
    """

    def __init__(self, script: str, args: RunArgs, env_id: str) -> None:
        self.args, self.env_id, self.start = args, env_id, time.time()
        self.name = args.exp_name or f"{script}__{env_id}__{args.seed}"
        self.folder = Path("runs") / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
        (self.folder / "args.json").write_text(json.dumps(flags, indent=2) + "\n")
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project_name, name=self.name, config=flags, sync_tensorboard=True, dir=self.folder)
        set_random_seed(args.seed)
        th.set_num_threads(args.torch_threads)
        self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        self.rows: list[EvalResult] = []

    @property
    def tensorboard(self) -> Path:
        """Folder for TensorBoard."""
        return self.folder / "tensorboard"

    def evaluate(
        self, name: str, player: Player, env: VecLatentSteering, flow: FlowPolicy, deterministic: bool = True
    ) -> None:
        """Adds a row to the report; the same episodes for every player."""
        result = evaluate(
            player,
            env,
            self.args.num_eval_episodes,
            name=name,
            seed=EVAL_SEED,
            deterministic=deterministic,
            progress_bar=True,
        )
        self.rows.append(result)
        for key in ("success_once", "success_at_end", "mean_return"):
            self.writer.add_scalar(f"final/{name}/{key}", getattr(result, key), 0)
        if self.args.capture_video:
            from sb3_dsrl.video import record_video

            limit = {} if self.args.max_episode_steps is None else dict(max_episode_steps=self.args.max_episode_steps)
            (self.folder / "videos").mkdir(exist_ok=True)
            path = self.folder / "videos" / f"{name}.mp4"
            record_video(
                path, self.env_id, flow, player, seed=EVAL_SEED, deterministic=deterministic, progress_bar=True, **limit
            )

    def finish(self, **report: Any) -> None:
        """Writes ``report.json`` and prints the table."""
        self.writer.close()
        seconds = round(time.time() - self.start, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report = dict(env_id=self.env_id, seed=self.args.seed, wall_seconds=seconds, peak_memory_mb=round(peak), **report)
        report["rows"] = [row.as_row() for row in self.rows]
        (self.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if self.rows:
            print(f"\n{results_table(self.rows)}")
        print(f"\n{self.env_id}, seed {self.args.seed}: {seconds:.0f} s; everything is in {self.folder}/")
        if self.args.track:
            import wandb

            wandb.finish()


Args = TypeVar("Args")


def load_model(path: Path, env: VecLatentSteering) -> PPO:
    """A model of stage 2, for the same flow. Its zip file holds pickles, which can run code: load your own only."""
    check_zip(path)
    try:
        return PPO.load(path, env=env)
    except (KeyError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no model of PPO ({error})") from error


def cli(main: Callable[[Args], None], args_class: type[Args]) -> NoReturn:
    """Reads the flags and runs a script; bad input, or a disk that takes no files, is one sentence and exit code 2."""
    args = tyro.cli(args_class)
    try:
        main(args)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
