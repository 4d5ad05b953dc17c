"""What the commands share: flags, the run folder, and how a flow is found."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch as th
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from torch.utils.tensorboard import SummaryWriter

import sb3_dsrl
from sb3_dsrl import (
    EvalResult,
    FlowPolicy,
    SteerablePolicy,
    SteeredPolicy,
    TrainingCheckpoint,
    VecLatentSteering,
    evaluate,
    make_latent_env,
    results_table,
)
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.policies.awsc import load_awsc_checkpoint
from sb3_dsrl.policies.spatial_features import StateLayout
from sb3_dsrl.stage0.demos import Demos
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
    """Go on after success until the time limit. If not given: with a dense reward yes, with a sparse one no. (A dense reward
    that ends at success pays for stalling.)"""
    track: bool = False
    """Log to Weights & Biases as well (extra: wandb)."""
    wandb_project_name: str = "sb3_dsrl"
    """Weights & Biases project."""
    device: str = "auto"
    """Device of the networks, as SB3 names it; "auto" is a GPU where there is one."""
    torch_threads: int = 1
    """Threads of this process; simulators have processes of their own."""

    @property
    def steering(self) -> dict[str, Any]:
        """What the flags say about steering; the flow's own if nothing."""
        return {}


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
class SteeringArgs(RunArgs):
    """Flags of every script that steers a flow."""

    steer_mode: SteerMode | None = None
    """Steer all of the noise ("full", if not given), only the rows of the actions that are executed, or one row that is
    repeated."""
    num_inference_steps: int | None = None
    """Decoding steps; the flow's own if not given."""
    gamma: float | None = None
    """Discount per env step; the flow's own if not given."""
    reward_scale: float | None = None
    """Factor on rewards; the flow's own if not given."""
    control_mode: str | None = None
    """ManiSkill controller of a .pt file. Otherwise a check: it must be the flow's."""
    obs_horizon: int | None = None
    """Frames that the policy of a .pt file saw. Otherwise a check."""
    pred_horizon: int | None = None
    """Length of the chunks of a .pt file. Otherwise a check."""
    act_horizon: int | None = None
    """Env steps of each chunk that are executed; the flow's own if not given. A latent policy and a critic are for one number
    only. With --policy a check."""
    obs_mode: str | None = None
    """A check: the flow must see observations of this ManiSkill mode."""

    @property
    def steering(self) -> dict[str, Any]:
        flags = dict(
            steer_mode=self.steer_mode,
            num_steps=self.num_inference_steps,
            gamma=self.gamma,
            reward_scale=self.reward_scale,
        )
        return {name: value for name, value in flags.items() if value is not None}


@dataclass(kw_only=True)
class FlowArgs(SteeringArgs):
    """Flags of every script that starts from a flow."""

    awsc_checkpoint: Path
    """The flow: a folder written by stage 0, or a .pt file of AWShortCutFlowAgent. What such a file does not tell is
    taken from the flags, or else from the defaults of its authors' scripts."""


#: What a .pt file of AWShortCutFlowAgent does not tell, as the scripts that wrote it have it.
PT_DEFAULTS: dict[str, Any] = dict(
    obs_horizon=2,
    pred_horizon=16,
    num_inference_steps=8,
    control_mode="pd_ee_delta_pose",
    gamma=0.99,
    reward_scale=1.0,
)


def load_flow(args: SteeringArgs, path: Path) -> FlowPolicy:
    """
    The flow in a folder or a .pt file, checked against the flags.

    :param args: flags
    :param path: of ``--awsc_checkpoint``
    :raises ValueError: if a flag disagrees with the flow
    """
    if path.suffix == ".pt":
        flow = _load_pt(args, path)
    else:
        flow = FlowPolicy.from_pretrained(path, device=args.device)
    if args.act_horizon is not None:
        flow = flow.with_act_horizon(args.act_horizon)
    check_flow(args, flow, path)
    return flow


def check_flow(args: SteeringArgs, flow: SteerablePolicy, path: Path) -> None:
    """
    :param args: flags that are checks
    :param flow: what they are checked against
    :param path: where it is from
    :raises ValueError: if a flag disagrees with the flow
    """
    for name in ("obs_horizon", "pred_horizon", "act_horizon", "control_mode", "obs_mode"):
        flag, found = getattr(args, name), getattr(flow, name)
        if flag not in (None, found):
            raise ValueError(f"--{name} is {flag}, but the flow in {path} has {found}")


def _load_pt(args: SteeringArgs, path: Path) -> FlowPolicy:
    given: dict[str, Any] = {name: getattr(args, name) for name in PT_DEFAULTS if getattr(args, name) is not None}
    assumed = {name: value for name, value in PT_DEFAULTS.items() if name not in given}
    settings = PT_DEFAULTS | given
    flow = load_awsc_checkpoint(
        path, num_steps=settings.pop("num_inference_steps"), env_id=args.env_id, device=args.device, **settings
    )
    if assumed:
        taken = ", ".join(f"{name} {value}" for name, value in assumed.items())
        flags = ", ".join(f"--{name}" for name in assumed)
        print(f"{path} does not tell all that is needed: {taken} are the original's defaults; others with {flags}")
    return flow


def refuse(given: Mapping[str, object], why: str) -> None:
    """
    :param given: flags that would do nothing, and their values; None was not given
    :param why: the rest of the sentence
    :raises ValueError: if one of them was given
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} {why}")


def env_kwargs(args: RunArgs, flow: SteerablePolicy) -> tuple[str, dict[str, Any]]:
    """
    :param args: flags
    :param flow: the policy that is steered
    :return: the task, and arguments of ``make_latent_env``, as the flags say
    :raises ValueError: if nobody says what the task is
    """
    env_id = args.env_id or flow.env_id
    if env_id is None:
        raise ValueError("The flow does not know its task: pass --env_id")
    names = ("sim_backend", "reward_mode", "ignore_terminations", "max_episode_steps")
    return env_id, {name: getattr(args, name) for name in names} | args.steering


def make_env(args: RunArgs, flow: SteerablePolicy, n_envs: int, seed: int | None = None, **steering: Any) -> VecLatentSteering:
    """
    Steered envs as the flags say.

    :param args: flags
    :param flow: the policy that is steered
    :param n_envs: number of envs
    :param seed: of the envs
    :param steering: arguments of ``make_latent_env`` that do not come from flags
    """
    env_id, kwargs = env_kwargs(args, flow)
    return make_latent_env(env_id, flow, n_envs, seed=seed, **(kwargs | steering))


class Run:
    """
    The folder of a run, its TensorBoard log and its report.

    :param script: name of the script
    :param args: its flags
    :param env_id: task
    """

    def __init__(self, script: str, args: RunArgs, env_id: str) -> None:
        if isinstance(args, EvalArgs) and args.capture_video and not args.num_eval_episodes:
            raise ValueError("--capture_video does nothing with --num_eval_episodes 0: it films what is evaluated")
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


def load_model(path: Path, env: VecLatentSteering, device: str) -> PPO:
    """A model of stage 2, for the same flow. Its zip file holds pickles, which can run code: load your own only."""
    check_zip(path)
    try:
        return PPO.load(path, env=env, device=device)
    except (KeyError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no model of PPO ({error})") from error


def steering_of(policy: SteeredPolicy) -> dict[str, Any]:
    """
    :param policy: a steered policy
    :return: arguments of the env that it plays in, beside the flow
    """
    names = ("gamma", "noise_bound", "steer_mode", "num_steps", "reward_scale", "residual_scale")
    return {name: getattr(policy.contract, name) for name in names}


def layout_of(demos: Demos) -> StateLayout | None:
    """What the states of demos are made of: as the demos say, or else as the task says; None if they are images."""
    if demos.image_shapes or demos.env_id is None:
        return None
    return demos.state_layout or sb3_dsrl.state_layout(demos.env_id, demos.control_mode)  # ManiSkill is imported here only


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
