"""What the scripts of the three stages share: flags, the run folder, and how a flow is found."""

import json
import resource
import shutil
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

from sb3_dsrl import (
    EvalResult,
    FlowPolicy,
    TrainingCheckpoint,
    VecLatentSteering,
    evaluate,
    make_latent_env,
    results_table,
)
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.policies.awsc import load_awsc_checkpoint
from sb3_dsrl.steering.contract import SteerMode
from sb3_dsrl.utils.checkpoint import atomic_file
from sb3_dsrl.utils.integrity import check_zip

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
    sim_backend: Literal["physx_cpu", "physx_cuda", "cpu", "gpu"] = "physx_cpu"
    """Simulator; cpu and gpu are short for the other two."""
    max_episode_steps: int | None = None
    """Time limit in env steps; the registered one if not given."""
    reward_mode: str = "normalized_dense"
    """ManiSkill reward mode."""
    ignore_terminations: bool | None = None
    """Go on after success until the time limit. If not given: yes, except with a sparse reward. (A dense reward that ends at
    success pays for stalling.)"""
    track: bool = False
    """Log to Weights & Biases as well (extra: wandb)."""
    wandb_project_name: str = "sb3_dsrl"
    """Weights & Biases project."""
    torch_threads: int = 1
    """Threads of this process; simulators have processes of their own."""

    @property
    def steering(self) -> dict[str, Any]:
        """What the flags say about steering; the flow's own if nothing."""
        return {}

    @property
    def ignores_terminations(self) -> bool:
        """Whether episodes go on after success."""
        return self.reward_mode != "sparse" if self.ignore_terminations is None else self.ignore_terminations


@dataclass(kw_only=True)
class EvalArgs:
    """Flags of every script that evaluates."""

    num_eval_envs: int = 8
    """Simulated envs of evaluations."""
    num_eval_episodes: int = 100
    """Episodes of each final evaluation."""
    capture_video: bool = False
    """Film two episodes of each evaluated policy."""


@dataclass(kw_only=True)
class TrainingArgs(RunArgs, EvalArgs):
    """Flags of every script that trains."""

    resume: bool = False
    """Go on with the run of this name, which was started with the same flags, from its newest checkpoint."""
    save_freq: int | None = None
    """Env steps (stage 2) or iterations (stages 0 and 1) between two checkpoints; 3,000 of each env or 500 if not given."""


#: Flags that may be others after a resume.
FREE_FLAGS = {
    "resume",
    "save_freq",
    "exp_name",
    "num_eval_envs",
    "num_eval_episodes",
    "capture_video",
    "track",
    "wandb_project_name",
}


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
    """Factor on rewards; of a .pt file also the one that its critic was trained with."""
    steer_mode: SteerMode = "full"
    """Steer all of the noise, only the rows of the actions that are executed, or one row that is repeated."""

    @property
    def steering(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("gamma", "reward_scale") if getattr(self, name) is not None}
        return dict(steer_mode=self.steer_mode, num_steps=self.num_inference_steps, **given)


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


def make_env(args: RunArgs, flow: FlowPolicy, n_envs: int, seed: int | None = None) -> VecLatentSteering:
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
        seed=seed,
        **(dict(gamma=flow.gamma) | args.steering),
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
        self.resumes = isinstance(args, TrainingArgs) and args.resume
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
        if self.resumes:
            self._check_flags(flags)
        else:
            self._clear()
            with atomic_file(self.folder / "args.json") as file:
                file.write(f"{json.dumps(flags, indent=2)}\n".encode())
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project_name, name=self.name, config=flags, sync_tensorboard=True, dir=self.folder)
        set_random_seed(args.seed)
        th.set_num_threads(args.torch_threads)
        self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        self.rows: list[EvalResult] = []

    def _check_flags(self, flags: dict[str, Any]) -> None:
        path = self.folder / "args.json"
        if not path.is_file():
            raise ValueError(f"--resume: there is no run in {self.folder}; start it without --resume")
        before = json.loads(path.read_text())
        for key in sorted((flags.keys() | before.keys()) - FREE_FLAGS):
            if before.get(key) != flags.get(key):
                raise ValueError(
                    f"--resume: {self.folder} was started with --{key} {before.get(key)}, now it is {flags.get(key)}; "
                    f"resume with the same flags"
                )
        if not (self.folder / "resume").is_dir():
            print(f"--resume: {self.folder} has no checkpoint yet, it begins at its beginning")

    def _clear(self) -> None:
        """Makes room for a new run of this name."""
        report, checkpoints = self.folder / "report.json", self.folder / "resume"
        if checkpoints.is_dir() and not report.is_file():
            raise ValueError(
                f"{self.folder} holds a run that is not complete: go on with --resume, take another --exp_name, or remove it"
            )
        shutil.rmtree(checkpoints, ignore_errors=True)
        report.unlink(missing_ok=True)

    def checkpoint(self) -> TrainingCheckpoint:
        """Keeps the state of stage 0 or 1."""
        assert isinstance(self.args, TrainingArgs)
        return TrainingCheckpoint(self.folder / "resume", self.args.save_freq or 500, self.resumes)

    @property
    def tensorboard(self) -> Path:
        """Folder for TensorBoard."""
        return self.folder / "tensorboard"

    def evaluate(self, name: str, actor: Actor, env: VecLatentSteering, *, deterministic: bool = True) -> None:
        """Adds a row to the report; the same episodes for every actor."""
        assert isinstance(self.args, EvalArgs)
        result = evaluate(
            actor,
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
            from sb3_dsrl.evaluation.video import record_video

            path = self.folder / "videos" / f"{name}.mp4"
            record_video(path, env, actor, seed=EVAL_SEED, deterministic=deterministic, progress_bar=True)

    def finish(self, **report: Any) -> None:
        """Writes ``report.json`` and prints the table."""
        self.writer.close()
        seconds = round(time.time() - self.start, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report = dict(env_id=self.env_id, seed=self.args.seed, wall_seconds=seconds, peak_memory_mb=round(peak), **report)
        report["rows"] = [row.as_row() for row in self.rows]
        with atomic_file(self.folder / "report.json") as file:
            file.write(f"{json.dumps(report, indent=2)}\n".encode())
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
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).stem}: stopped at once; checkpoints stay as they are", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
