"""Make ManiSkill demonstrations on a CPU: no download, no GPU.

    sb3-dsrl demos --env-id StackCube-v1 --num-demos 500 --styles 3 --output demos/StackCube-v1.h5

Scripted experts (``sb3_dsrl/experts``) solve five tasks in closed loop, in the control mode you train with, while smooth noise
pushes them off their way: the data shows how to recover. For other tasks, ``--expert planner`` tracks the plans of ManiSkill's
own motion planner. The two files (an ``.h5`` and a ``.json``) have the format of ManiSkill's ``RecordEpisode`` and
``replay_trajectory``. On one machine the same flags give the same data, with any number of workers, and after an interruption
the same command goes on where it was.
"""

import os
import shlex
import shutil
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from sb3_dsrl.experts import EXPERTS
from sb3_dsrl.experts.attempts import Part, join_parts, open_parts, run_attempts
from sb3_dsrl.experts.recipe import DemoRecipe
from sb3_dsrl.experts.servo import CONTROL_MODES as SERVO_MODES
from sb3_dsrl.utils.integrity import write_sums
from sb3_dsrl.utils.interrupt import StopSignals


@dataclass(kw_only=True)
class Args(DemoRecipe):
    """Demonstrations from scripted experts or ManiSkill's motion planner, in ManiSkill's trajectory format."""

    output: Path
    """The .h5 file to write; the .json and checksums (.sha256) go beside it. Existing files are replaced, at the very end."""
    num_demos: int = 40
    """Demos to keep."""
    max_attempts: int | None = None
    """Episodes to try at most; 10 * num_demos if not given."""
    workers: int | None = None
    """Processes; one for each core if not given."""


def fail(message: str, code: int = 1) -> NoReturn:
    """
    :param message: why there are no demos, or too few, with flags that are right
    :param code: exit code
    """
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr)
    sys.exit(code)


def check_expert(args: Args) -> None:
    """Decides ``args.expert`` and checks what only it knows."""
    args.expert = args.expert or ("scripted" if args.env_id in EXPERTS else "planner")
    if args.expert == "scripted":
        control_modes = SERVO_MODES
        if args.env_id not in EXPERTS:
            raise ValueError(f"no scripted expert for --env-id {args.env_id}; there is one for: {', '.join(EXPERTS)}.")
        for flag in ("speedup", "trim_pauses"):
            if getattr(args, flag) != getattr(DemoRecipe(), flag):
                raise ValueError(f"--{flag.replace('_', '-')} is for plans; add --expert planner, or leave it out.")
        styles = EXPERTS[args.env_id].styles
        if not 1 <= args.styles <= len(styles):
            raise ValueError(
                f"--styles is {args.styles}; the expert for {args.env_id} has 1 to {len(styles)}: "
                f"{', '.join(style.name for style in styles)}."
            )
    else:
        if int(np.__version__.split(".")[0]) >= 2:
            raise ValueError(f"numpy is {np.__version__}; the motion planner (mplib) needs 1.x: pip install 'numpy<2'.")
        try:
            from sb3_dsrl.experts.planner import CONTROL_MODES, solutions

            control_modes, planners = CONTROL_MODES, solutions()
        except ImportError as error:
            raise ValueError(f"ManiSkill with its motion planner is needed ({error}): pip install mani_skill.") from error
        if args.env_id not in planners:
            raise ValueError(
                f"no motion planner for --env-id {args.env_id}; there is one for: {', '.join(sorted(planners))}. "
                f"Scripted experts: {', '.join(EXPERTS)}."
            )
        if args.styles != 1:
            raise ValueError(f"--styles is {args.styles}; only scripted experts have styles.")
    if args.control_mode not in control_modes:
        raise ValueError(f"--control-mode {args.control_mode} is not supported; choose one of: {', '.join(control_modes)}.")


def check_args(args: Args) -> None:
    """The first thing that is wrong is an error of one sentence."""
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct
    from mani_skill.utils.registration import REGISTERED_ENVS

    check_expert(args)
    reward_modes = REGISTERED_ENVS[args.env_id].cls.SUPPORTED_REWARD_MODES
    if args.reward_mode not in reward_modes:
        raise ValueError(f"--reward-mode {args.reward_mode} is not one of {args.env_id}'s: {', '.join(reward_modes)}.")
    if args.obs_mode not in ("state", "state_dict"):
        try:
            parse_obs_mode_to_struct(args.obs_mode)
        except AssertionError as error:
            raise ValueError(f"--obs-mode {args.obs_mode} is not one of ManiSkill's, such as state or rgb: {error}") from None
    elif args.camera_size is not None:
        raise ValueError(f"--camera-size is {args.camera_size}, but --obs-mode {args.obs_mode} has no images.")
    if args.noise is not None and not (np.isfinite(args.noise) and args.noise >= 0):
        raise ValueError(f"--noise is {args.noise}; it is a standard deviation and must be 0 or more.")
    if not 0 <= args.noise_rho < 1:
        raise ValueError(f"--noise-rho is {args.noise_rho}; it is a correlation and must be at least 0 and below 1.")
    for flag in ("num_demos", "max_attempts", "workers", "speedup", "max_episode_steps", "camera_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}; it must be 1 or more.")
    for flag in ("extra_steps", "seed"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be 0 or more.")
    if args.output.suffix != ".h5" or args.output.is_dir():
        raise ValueError(f"--output is {args.output}; it must name a file that ends in .h5.")


def record(args: Args, recipe: DemoRecipe, folder: Path) -> tuple[list[Part], int, int, str]:
    """
    Attempts until there are enough demos, or no more may be made.

    :return: the demos that are kept, number of attempts, of successes, and the last complaint
    """
    max_attempts = args.max_attempts or 10 * args.num_demos
    workers = min(args.workers or len(os.sched_getaffinity(0)), args.num_demos)
    kept: list[Part] = []
    attempts, successes, complaint = 0, 0, ""
    signals = StopSignals("the end of this block of attempts")
    signals.listen()
    bar = tqdm(total=args.num_demos, desc=args.env_id, unit="demo")
    with bar, closing(run_attempts(recipe, folder, max_attempts, workers)) as parts:
        for part in parts:
            attempts += 1
            successes += part.success
            complaint = part.complaint or complaint
            if part.length:
                kept.append(part)
                bar.update()
            bar.set_postfix(attempts=attempts, success=f"{successes / attempts:.2f}")
            if len(kept) == args.num_demos:
                break
            if signals.received:
                break
    if signals.received and len(kept) < args.num_demos:
        signals.leave(f"{len(kept)} demos of {attempts} attempts are in {folder}; the same command goes on with them")
    signals.ignore()
    return kept, attempts, successes, complaint


def about(args: Args, recipe: DemoRecipe) -> dict[str, Any]:
    """What the JSON says about the source of the demos."""
    flags = ["--num-demos", str(args.num_demos)]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if value != field.default:
            name = field.name.replace("_", "-")
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    command = shlex.join(["sb3-dsrl", "demos", *flags])
    if recipe.expert == "planner":
        return dict(source_type="motionplanning", source_desc=f"ManiSkill's motion planner, replayed: {command}")
    styles = [style.name for style in EXPERTS[args.env_id].styles[: args.styles]]
    return dict(source_type="scripted", source_desc=f"Scripted expert in closed loop: {command}", styles=styles)


def main(args: Args) -> None:
    """Makes the demos and writes them."""
    check_args(args)
    recipe = DemoRecipe(**{field.name: getattr(args, field.name) for field in fields(DemoRecipe)})
    folder = args.output.with_suffix(".parts")
    open_parts(folder, recipe)
    try:
        kept, attempts, successes, complaint = record(args, recipe, folder)
    except BrokenProcessPool:
        fail(f"a worker process died; the same command goes on with what is in {folder}.")
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on with the attempts that are done.", code=130)
    if not kept:
        fail(f"no demo to keep after {attempts} attempts, nothing written; the last failure: {complaint}.")
    # In the same folder, so that the last step is a rename: an interrupted run leaves what was there.
    with tempfile.TemporaryDirectory(prefix=".make_demos_", dir=args.output.parent) as directory:
        path = Path(directory, args.output.name)
        join_parts(kept, path, about(args, recipe))
        files = [path, path.with_suffix(".json")]
        write_sums(path.with_suffix(".sha256"), files)  # load_demos verifies them: HDF5 and JSON have no checksums
        for suffix in (".h5", ".json", ".sha256"):
            os.replace(path.with_suffix(suffix), args.output.with_suffix(suffix))
    lengths = [part.length for part in kept]
    print(
        f"{args.output}: kept {len(lengths)} of {attempts} attempts, success {successes / attempts:.2f}, "
        f"{np.mean(lengths):.1f} steps on average ({min(lengths)} to {max(lengths)}), "
        f"{args.output.stat().st_size / 1e6:.2f} MB"
    )
    if len(kept) < args.num_demos:
        fail(f"only {len(kept)} of {args.num_demos} demos in {attempts} attempts; raise --max-attempts to go on.")
    shutil.rmtree(folder)
