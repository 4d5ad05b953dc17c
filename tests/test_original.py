"""The original's command lines, on a checkpoint as its agent writes them, and the page that maps its code to this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_dsrl import LatentPolicy, SteeredPolicy
from sb3_dsrl.steering.contract import Contract
from tests import test_awsc
from tests.pages import DOCS, blocks
from tests.scripts import EXAMPLES, run_script

pytestmark = pytest.mark.timeout(600)
ROOT = EXAMPLES.parent
PAGE = DOCS / "original.md"
BLOCKS = [block.text for block in blocks(PAGE, "python")]
COMMON = (
    *("--env_id", "PushCube-v1", "--awsc_checkpoint", "best_eval_success_once.pt", "--obs_mode", "state", "--seed", 0),
    *("--control_mode", "pd_joint_delta_pos", "--sim_backend", "physx_cpu", "--steer_mode", "act_horizon", "--act_horizon", 8),
    *("--num_eval_envs", 1, "--num_eval_episodes", 2, "--track", "--wandb_project_name", "maniskill_dsrl"),
)
STAGE_1 = (
    *("--demo_path", EXAMPLES / "demos" / "PushCube-v1.h5", "--num_demos", 3, "--total_iters", 6, "--eval_freq", 2),
    *("--log_freq", 2, "--num_candidates", 4, "--ucb_kappa", 0.5, "--advantage_temperature", 0.7, "--exp_name", "stage1"),
)
STAGE_2 = (
    *("--checkpoint", "runs/stage1/checkpoints/best_eval_success_at_end.pt", "--num_envs", 1, "--gamma", 0.9),
    *("--total_timesteps", 64, "--batch_size", 4, "--max_episode_steps", 16, "--lr", 3e-4, "--value_lr", 1e-3),
    *("--rollout_steps", 4, "--ppo_epochs", 2, "--prior_mix_ratio", 0.2, "--prior_mix_decay", 0.9, "--ppo_clip", 0.1),
    *("--entropy_coef", 0.002, "--exp_name", "stage2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for PushCube-v1 that knows nothing, and what both commands made of it."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(A=8, H=8, STATE=35).items():
            patch.setattr(test_awsc, name, value)
        test_awsc.Checkpoint(folder / "best_eval_success_once.pt")
    for script, flags in (("train_latent_offline.py", STAGE_1), ("train_latent_online.py", STAGE_2)):
        done = run_script(script, *COMMON, *flags, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / f"{script}.txt").write_text(done.stdout)
    return folder


def report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "report.json").read_text())


def contract(policy: LatentPolicy) -> Contract:
    return policy.action_space.contract  # type: ignore[union-attr]


def test_stage_1_is_offline(folder: Path) -> None:
    run, found = folder / "runs" / "stage1", report(folder, "stage1")
    assert (found["env_steps"], found["weighting"]) == (0, "candidates")
    assert [(point["iteration"], point["episodes"]) for point in found["curve"]] == [(2, 2), (4, 2), (6, 2)]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "best_eval_success_once.pt",
        "best_eval_success_at_end.pt",
    }
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    log = EventAccumulator(str(run / "tensorboard" / "stage1"))
    log.Reload()
    assert [event.step for event in log.Scalars("stage1/loss")] == [0, 2, 4, 5]
    assert contract(SteeredPolicy.from_pretrained(run / "policy").latent).steer_mode == "act_horizon"


def test_what_a_checkpoint_does_not_tell_is_said(folder: Path) -> None:
    first, second = ((folder / f"train_latent_{name}.py.txt").read_text() for name in ("offline", "online"))
    assert (
        "best_eval_success_once.pt does not tell all that is needed: obs_horizon 2, pred_horizon 16, num_inference_steps 8, "
        "gamma 0.99, reward_scale 1.0 are the original's defaults; others with --obs_horizon, --pred_horizon, "
        "--num_inference_steps, --gamma, --reward_scale\n"
    ) in first
    assert "num_inference_steps 8, reward_scale 1.0 are the original's defaults" in second
    assert "Stage 1 learned with gamma 0.99, stage 2 goes on with 0.9" in second


def test_stage_2_goes_on_from_stage_1(folder: Path) -> None:
    run = folder / "runs" / "stage2"
    model = PPO.load(run / "checkpoints" / "final.zip")
    assert (model.n_steps, model.batch_size, model.n_epochs, model.num_timesteps) == (4, 4, 2, 8)
    assert model.gamma == pytest.approx(0.9**8) and model.clip_range(1.0) == 0.1 and model.ent_coef == 0.002
    assert isinstance(model.policy, LatentPolicy)
    assert float(model.policy.prior_mix) == pytest.approx(0.2 * 0.9**2)  # two updates
    assert model.policy.value_lr == 1e-3 and model.lr_schedule(1.0) == pytest.approx(3e-4)
    start = LatentPolicy.load(folder / "runs" / "stage1" / "checkpoints" / "best_eval_success_at_end.pt")
    moved = (model.policy.action_net.weight - start.action_net.weight).abs().max()
    assert 0 < moved < 0.02 and start.action_net.weight.abs().max() > 0  # a few steps of Adam away from it
    assert report(folder, "stage2")["stage1_env_steps"] == 0
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert contract(SteeredPolicy.from_pretrained(run / "policy").latent).gamma == 0.9


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--obs_mode", "rgb"), "--obs_mode is rgb, but the flow in best_eval_success_once.pt has state"),
        (("--act_horizon", 16), r"act_horizon must lie in 1..15 \(pred_horizon - action_offset\), found 16"),
        ((), r"its chunks have shape \(H, A\) = \(8, 7\), but the flow's are \(8, 8\)"),
    ],
)
def test_flags_that_disagree_with_the_checkpoint(folder: Path, flags: tuple[object, ...], sentence: str) -> None:
    command = ("--awsc_checkpoint", "best_eval_success_once.pt", "--env_id", "PushCube-v1", "--num_eval_episodes", 0)
    demos = ("--demo_path", EXAMPLES / "demos" / "PushCube-v1.h5")
    done = run_script("train_latent_offline.py", *command, *demos, "--exp_name", "wrong", *flags, cwd=folder)
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(sentence, done.stderr), done.stderr[-3000:]
    assert "control_mode pd_ee_delta_pose" in done.stdout


def test_the_page(tmp_path: Path) -> None:
    """Its code, as it stands and in its order."""
    assert len(BLOCKS) >= 8
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "page.py").write_text("".join(BLOCKS))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "policy" / "config.json").is_file() and (tmp_path / "model.zip").is_file()


def test_the_page_names_every_flag_of_the_original() -> None:
    text = PAGE.read_text()
    for flag in (*COMMON, *STAGE_1, *STAGE_2):
        if str(flag).startswith("--") and flag not in ("--ppo_epochs", "--prior_mix_decay", "--ppo_clip", "--entropy_coef"):
            assert str(flag) in text, flag
