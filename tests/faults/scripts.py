"""The scripts of the three stages with bad input: exit code 2 and the same sentences."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch as th

from tests.demo_files import scripted_episode, write_demos
from tests.envs import tiny_flow
from tests.faults.case import Case
from tests.faults.flow_files import cut
from tests.faults.running import full_disk

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PUSHCUBE = dict(obs_dim=35, action_dim=8, pred_horizon=4, act_horizon=4, control_mode="pd_joint_delta_pos")


@cache
def _module(script: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(script)
    finally:
        sys.path.remove(str(EXAMPLES))


@contextlib.contextmanager
def _in(folder: Path, *argv: object) -> Iterator[None]:
    before = os.getcwd(), sys.argv, th.get_num_threads()
    os.chdir(folder)
    sys.argv = [str(x) for x in argv]
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        th.set_num_threads(before[2])


def script(name: str, *flags: object, prepare: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], Any]:
    """Runs a script in this process, in the folder."""

    def play(folder: Path) -> None:
        prepare(folder)
        module = _module(name)
        with _in(folder, f"{name}.py", *flags), contextlib.redirect_stdout(None):
            module.cli(module.main, module.Args)

    return play


def demos(folder: Path) -> None:
    episodes = [scripted_episode(9, 35, 8), scripted_episode(9, 35, 8)]
    write_demos(folder / "demos.h5", episodes)


def flow(**kwargs: Any) -> Callable[[Path], Any]:
    return lambda folder: tiny_flow(**(PUSHCUBE | dict(env_id="PushCube-v1") | kwargs)).save_pretrained(folder / "flow")


def also(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for step in steps:
            step(folder)

    return prepare


def bad(name: str, sentence: str, script_name: str, *flags: object, prepare: Callable[[Path], Any] = lambda _: None) -> Case:
    return Case(f"{script_name}.py: {name}", script(script_name, *flags, prepare=prepare), sentence, SystemExit)


TRAIN = ("train_flow", "--demo_path", "demos.h5")
QUICK = ("--network", "mlp", "--total_iters", 2, "--critic_iters", 0, "--num_eval_episodes", 0, "--batch_size", 4)
QUICK += ("--no-spatial_features",)  # the states of these demos are no task's
OFFLINE = ("train_latent_offline", "--awsc_checkpoint", "flow", "--num_envs", 1, "--num_eval_envs", 1)
ONLINE = ("train_latent_online", "--awsc_checkpoint", "flow", "--num_envs", 1, "--num_eval_envs", 1)
EVALUATE = ("evaluate", "--awsc_checkpoint", "flow", "--num_eval_envs", 1, "--num_eval_episodes", 1, "--max_episode_steps", 4)


def on_a_full_disk(folder: Path) -> None:
    with full_disk(100_000):
        script(*TRAIN, *QUICK, prepare=demos)(folder)


CASES = [
    bad("no demos", "train_flow: demos.h5 does not exist; expected the demo file", *TRAIN),
    bad(
        "demos cut short",
        "train_flow: demos.h5 cannot be read as HDF5; it is damaged or cut short",
        *TRAIN,
        prepare=also(demos, lambda folder: cut(folder / "demos.h5")),
    ),
    bad("--env_id", "--env_id is PickCube-v1, but demos.h5 holds PushCube", *TRAIN, "--env_id", "PickCube-v1", prepare=demos),
    bad("--obs_mode", "--obs_mode is rgb, but demos.h5 holds state", *TRAIN, "--obs_mode", "rgb", prepare=demos),
    bad("--control_mode", "expected 'pd_ee_pose': replay it with", *TRAIN, "--control_mode", "pd_ee_pose", prepare=demos),
    bad(
        "--act_horizon > --pred_horizon",
        r"train_flow: act_horizon must lie in 1..4 \(pred_horizon - action_offset\), found 8",
        *TRAIN,
        *QUICK,
        *("--pred_horizon", 4, "--act_horizon", 8),
        prepare=demos,
    ),
    bad(
        "negative --gamma",
        r"train_flow: gamma is the discount per env step and must lie in \(0, 1\], found -0.5",
        *(*TRAIN, *QUICK, "--gamma", -0.5),
        prepare=demos,
    ),
    bad("--total_iters 0", "n_iterations must be at least 1, found 0", *TRAIN, *QUICK, "--total_iters", 0, prepare=demos),
    bad("--lr too high", "check the data or lower the learning rate", *TRAIN, *QUICK, "--lr", 1e30, prepare=demos),
    bad(
        "run folder that cannot be made",
        "train_flow: .*(Not a directory: 'runs|File exists: 'runs')",
        *(*TRAIN, *QUICK, "--exp_name", "a"),
        prepare=also(demos, lambda folder: (folder / "runs").touch()),
    ),
    Case("train_flow.py: disk full", on_a_full_disk, r"checkpoint cannot be written: File too large", SystemExit),
    bad(
        "no flow",
        "runs/no/flow is neither a folder written by FlowPolicy.save_pretrained nor a model",
        *("train_latent_offline", "--awsc_checkpoint", "runs/no/flow"),
    ),
    bad(
        "flow damaged",
        "train_latent_offline: flow does not hold a valid FlowPolicy",
        *OFFLINE,
        prepare=also(flow(), lambda folder: cut(folder / "flow" / "model.safetensors")),
    ),
    bad("--env_id unknown", "'PushCub-v1' is not a ManiSkill environment", *OFFLINE, "--env_id", "PushCub-v1", prepare=flow()),
    bad("no env id", "The flow does not know its task: pass --env_id", *OFFLINE, prepare=flow(env_id=None)),
    bad(
        "--env_id of another task",
        "The flow was trained on PickCube-v1, but the env is PushCube-v1",
        *(*OFFLINE, "--env_id", "PushCube-v1"),
        prepare=flow(env_id="PickCube-v1"),
    ),
    bad(
        "flow with another A",
        r"its chunks have shape \(H, A\) = \(4, 8\), but the flow's are \(4, 7\)",
        *OFFLINE,
        prepare=flow(action_dim=7),
    ),
    bad("flow with another D", "its observations have shape", *OFFLINE, prepare=flow(obs_dim=20)),
    bad("--control_mode", "--control_mode is pd_ee_pose, but", *OFFLINE, "--control_mode", "pd_ee_pose", prepare=flow()),
    bad("--reward_mode", "PushCube-v1 cannot be made as asked for", *OFFLINE, "--reward_mode", "nothing", prepare=flow()),
    bad(
        "control mode that the task does not have",
        "PushCube-v1 cannot be made as asked for: pd_nothing not in supported modes",
        *OFFLINE,
        prepare=flow(control_mode="pd_nothing"),
    ),
    bad("--gamma 1.5", r"must lie in \(0, 1\], found 1.5", *ONLINE, "--gamma", 1.5, prepare=flow()),
    bad("--act_horizon > T", "act_horizon must lie in 1..4", *ONLINE, "--act_horizon", 8, prepare=flow()),
    bad(
        "--act_horizon and a critic for another one",
        "The critic scores chunks of 4 actions, but 2 of each chunk are executed: train one for act_horizon=2",
        *(*OFFLINE, "--weighting", "candidates", "--act_horizon", 2),
        prepare=flow(),
    ),
    bad("--prior_mix_ratio 2", r"prior_mix must lie in \[0, 1\], found 2.0", *ONLINE, "--prior_mix_ratio", 2, prepare=flow()),
    bad(
        "no stage 1",
        "none.pt does not exist; expected a file written by LatentPolicy.save",
        *(*ONLINE, "--stage1_checkpoint", "none.pt"),
        prepare=flow(),
    ),
    bad(
        "stage 1 that is none",
        "flow/config.json is no file of LatentPolicy.save, or it is damaged",
        *(*ONLINE, "--stage1_checkpoint", "flow/config.json"),
        prepare=flow(),
    ),
    bad("no model", "none.zip does not exist; expected a model", *EVALUATE, "--model", "none.zip", prepare=flow()),
    bad("model that is none", "config.json is no zip file", *EVALUATE, "--model", "flow/config.json", prepare=flow()),
    bad(
        "no agent's checkpoint",
        r"agent.pt does not exist; expected an AWShortCutFlowAgent checkpoint \(.pt\)",
        *("evaluate", "--awsc_checkpoint", "agent.pt"),
    ),
    bad("nothing to evaluate", "Nothing to evaluate: pass --policy, or --awsc_checkpoint", "evaluate"),
    bad(
        "--policy that is none",
        "flow holds no flow: expected a folder written by SteeredPolicy.save_pretrained",
        *("evaluate", "--policy", "flow"),
        prepare=flow(),
    ),
    bad(
        "--policy and a flow",
        "--awsc_checkpoint and --policy exclude each other: policy holds a flow and says how it is steered",
        *(*EVALUATE, "--policy", "policy"),
    ),
    bad(
        "--policy and steering",
        "--steer_mode and --policy exclude each other",
        *("evaluate", "--policy", "policy", "--steer_mode", "full"),
    ),
    bad(
        "videos of nothing",
        "--capture_video does nothing with --num_eval_episodes 0",
        *(*ONLINE, "--num_eval_episodes", 0, "--capture_video"),
        prepare=flow(),
    ),
    bad("--std and stage 1", "--std does nothing with --stage1_checkpoint", *ONLINE, "--std", 1, "--checkpoint", "none.pt"),
    *(
        bad(name, sentence, *OFFLINE, *flags)
        for name, sentence, flags in (
            ("--num_candidates", "--num_candidates does nothing with --weighting executed", ("--num_candidates", 8)),
            (
                "demos",
                "--demo_path does nothing with --weighting exec",
                ("--weighting", "executed", "--demo_path", "demos.h5"),
            ),
            ("--total_iters", "--total_iters does nothing with --weighting none", ("--weighting", "none", "--total_iters", 9)),
            ("--num_demos", "--num_demos does nothing without --demo_path", ("--num_demos", 3)),
            ("--ticket_noises", "--ticket_noises does nothing without --ticket", ("--ticket_noises", 3)),
            ("--num_envs", "--num_envs does nothing without rollouts, --ticket and", ("--demo_path", "demos.h5")),
        )
    ),
    bad(
        "--num_demos of no demos",
        "--num_demos does nothing without --demo_path",
        *("steerability", "--awsc_checkpoint", "flow", "--num_demos", 3),
    ),
]
