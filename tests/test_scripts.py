"""The scripts of the three stages, one after the other, as a user runs them; and what they say to wrong flags."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_dsrl import FlowPolicy, LatentPolicy, SearchResult, SteeredPolicy
from tests.scripts import EXAMPLES, run_script

pytestmark = pytest.mark.timeout(900)  # the fixture runs seven scripts
DEMOS = EXAMPLES / "demos" / "PushCube-v1.h5"
EVALUATION = ("--num_eval_envs", 1, "--num_eval_episodes", 2)


def report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "report.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all scripts ran."""
    folder = tmp_path_factory.mktemp("scripts")
    small = ("--network", "mlp", "--pred_horizon", 4, "--act_horizon", 4, "--num_inference_steps", 2, "--critic_iters", 5)
    flow = ("--awsc_checkpoint", folder / "runs" / "a" / "flow")
    one = ("--num_envs", 1)
    stage1 = ("--stage1_checkpoint", folder / "runs" / "b" / "stage1.pt")
    for script, flags in (
        (
            "train_flow.py",
            (
                "--demo_path",
                DEMOS,
                "--num_demos",
                5,
                *small,
                "--total_iters",
                10,
                "--eval_freq",
                5,
                "--width",
                64,
                "--exp_name",
                "a",
            ),
        ),
        (
            "train_latent_offline.py",
            (*flow, *one, "--rollout_episodes", 2, "--total_iters", 3, "--exp_name", "b", "--eval_freq", 2, "--save_freq", 2),
        ),
        (
            "train_latent_online.py",
            (
                *(*flow, *one, *stage1, "--total_timesteps", 64, "--rollout_steps", 8, "--ppo_epochs", 1, "--exp_name", "c"),
                *("--eval_freq", 32, "--eval_freq_episodes", 1, "--prior_mix_ratio", 0.2, "--lr", 1e-3, "--capture_video"),
                *("--save_freq", 30, "--device", "cpu"),
            ),
        ),
        (
            "evaluate.py",
            (*flow, *stage1, "--model", folder / "runs" / "c" / "checkpoints" / "final.zip", "--exp_name", "d"),
        ),
        (
            "evaluate.py",
            ("--policy", folder / "runs" / "c" / "policy", "--exp_name", "d_policy"),
        ),
        (
            "steerability.py",
            (*flow, *one, "--demo_path", DEMOS, "--num_demos", 5, "--episodes", 32, "--num_tickets", 2, "--exp_name", "e"),
        ),
        (
            "search.py",
            (*flow, *one, "--search_episodes", 3, "--num_candidates", 3, "--horizon", 2, "--bootstrap", "--exp_name", "f"),
        ),
    ):
        evaluation = () if script == "steerability.py" else EVALUATION
        done = run_script(script, *flags, *evaluation, "--max_episode_steps", 12, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "success_at_end" in done.stdout
    return folder


def test_stage_0(runs: Path) -> None:
    flow = FlowPolicy.from_pretrained(runs / "runs" / "a" / "flow")
    assert (flow.pred_horizon, flow.act_horizon, flow.num_steps, flow.env_id) == (4, 4, 2, "PushCube-v1")
    assert flow.critic is not None and flow.critic.updates == 5
    assert [row["name"] for row in report(runs, "a")["rows"]] == ["prior", "zero"]
    assert report(runs, "a")["demos"] == 5


def test_stage_1(runs: Path) -> None:
    policy = LatentPolicy.load(str(runs / "runs" / "b" / "stage1.pt"))
    assert policy.contract.flow_hash == FlowPolicy.from_pretrained(runs / "runs" / "a" / "flow").fingerprint()
    assert report(runs, "b")["env_steps"] == 2 * 12
    assert report(runs, "b")["weighting"] == "executed"
    assert [row["name"] for row in report(runs, "b")["rows"]] == ["prior", "stage1", "stage1_stochastic"]
    steered = SteeredPolicy.from_pretrained(runs / "runs" / "b" / "policy")
    for key, x in policy.state_dict().items():
        assert th.equal(steered.latent.state_dict()[key], x), key


def test_curve_of_stage_1(runs: Path) -> None:
    """Every evaluation is a point, and the best policies so far are kept."""
    folder = runs / "runs" / "b"
    curve = report(runs, "b")["curve"]
    assert [(point["iteration"], point["episodes"]) for point in curve] == [(2, 2), (3, 2)]
    log = EventAccumulator(str(folder / "tensorboard"))
    log.Reload()
    for key in ("success_once", "success_at_end"):
        assert LatentPolicy.load(folder / "checkpoints" / f"best_eval_{key}.pt").contract
        assert [(e.step, e.value) for e in log.Scalars(f"eval/{key}")] == [(p["iteration"], p[key]) for p in curve]


def test_stage_2(runs: Path) -> None:
    found = report(runs, "c")
    assert [point["env_steps"] for point in found["curve"]] == [24, 56, 88, 88]
    assert found["env_steps"] == 88 and found["stage1_env_steps"] == 24 and found["peak_memory_mb"] > 100
    folder = runs / "runs" / "c"
    names = {"latest.zip", "best_success_at_end.zip", "best_success_once.zip", "final.zip"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == names
    model = PPO.load(folder / "checkpoints" / "final.zip")
    assert (model.n_steps, model.n_epochs, model.num_timesteps) == (8, 1, 16)
    assert {path.name for path in (folder / "videos").iterdir()} == {"prior.mp4", "stage2.mp4", "stage2_stochastic.mp4"}
    assert all(path.stat().st_size > 1000 for path in (folder / "videos").iterdir())
    log = EventAccumulator(str(next((folder / "tensorboard").glob("stage2*"))))
    log.Reload()
    assert {"eval/success_at_end", "time/env_steps", "train/loss"} <= set(log.Tags()["scalars"])


def test_evaluate(runs: Path) -> None:
    names = ["prior", "zero", "stage1", "stage1_stochastic", "stage2", "stage2_stochastic"]
    assert [row["name"] for row in report(runs, "d")["rows"]] == names
    rows = {row["name"]: row for row in report(runs, "d")["rows"]}
    assert rows["prior"] == report(runs, "c")["rows"][0]  # the same episodes
    alone = report(runs, "d_policy")["rows"]
    assert [row["name"] for row in alone] == ["prior", "zero", "policy", "policy_stochastic"]
    for row, name in zip(alone, ("prior", "zero", "stage2", "stage2_stochastic"), strict=True):
        assert row | dict(name=name) == rows[name]


def test_steerability(runs: Path) -> None:
    found = report(runs, "e")
    assert [(row["name"], row["episodes"]) for row in found["rows"]] == [
        ("prior", 8),
        ("zero", 4),
        ("ticket", 4),
        ("best_of_16", 4),
    ]
    assert found["env_steps"] == (8 + 4 + 4 + 4 + 12) * 12
    assert found["verdict"] and found["action_std"]["source"] == "demos"
    assert (runs / "runs" / "e" / "steerability.png").stat().st_size > 10_000


def test_search(runs: Path) -> None:
    found = report(runs, "f")
    assert [(row["name"], row["episodes"]) for row in found["rows"]] == [
        ("zero", 2),
        ("search, round 1", 3),
        ("distilled, round 1", 2),
        ("search, round 2", 3),
        ("distilled, round 2", 2),
    ]
    assert found["env_steps"] == 2 * 3 * (12 + 3 * 4 * (2 + 2 + 1))
    assert LatentPolicy.load(runs / "runs" / "f" / "policy.pt").contract
    assert len(SearchResult.load(runs / "runs" / "f" / "search.npz")) == 2 * 3 * 3


def test_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    from sb3_dsrl.cli.common import Run, TrainingArgs

    def start(**flags: Any) -> None:
        Run("train", TrainingArgs(exp_name="a", **flags), "PushCube-v1").writer.close()

    with pytest.raises(ValueError, match="--resume: there is no run in runs/a"):
        start(resume=True)
    start()
    with pytest.raises(
        ValueError, match="--resume: runs/a was started with --seed 0, now it is 1; resume with the same flags"
    ):
        start(resume=True, seed=1)
    start(resume=True, num_eval_envs=3, save_freq=7)
    (tmp_path / "runs" / "a" / "resume").mkdir()
    with pytest.raises(ValueError, match="runs/a holds a run that is not complete: go on with --resume"):
        start()
    (tmp_path / "runs" / "a" / "report.json").write_text("{}")
    start()
    assert not (tmp_path / "runs" / "a" / "resume").exists()


@pytest.mark.parametrize("complete", [True, False])
def test_resume_of_stage_1(runs: Path, complete: bool) -> None:
    """When it is complete, or from the checkpoint before the last: the same policies and the same curve."""
    path = runs / "runs" / "b" / "stage1.pt"
    if not complete:
        (path.parent / "resume" / "stage_1_1.checkpoint").unlink()
        best = path.parent / "checkpoints" / "best_eval_success_once.pt"
        kept = best.read_bytes()
    expected, before = LatentPolicy.load(str(path)), report(runs, "b")
    path.unlink()
    done = resumed(runs, "train_latent_offline.py", "b", episodes=0 if complete else 2)
    assert done.returncode == 0 and "rollouts:" not in done.stderr, done.stderr[-3000:]
    for key, x in LatentPolicy.load(str(path)).state_dict().items():
        assert th.equal(expected.state_dict()[key], x), key
    after = report(runs, "b")
    assert (after["env_steps"], after["curve"]) == (before["env_steps"], before["curve"])
    assert complete or best.read_bytes() == kept


def test_resume_of_stage_2(runs: Path) -> None:
    """From the checkpoint in its middle: the same model and the same curve."""
    path, before = runs / "runs" / "c" / "checkpoints" / "final.zip", report(runs, "c")
    expected = PPO.load(path)
    path.unlink()
    done = resumed(runs, "train_latent_online.py", "c")
    assert done.returncode == 0, done.stderr[-3000:]
    model = PPO.load(path)
    assert model.num_timesteps == expected.num_timesteps
    for key, x in expected.policy.state_dict().items():
        assert th.equal(model.policy.state_dict()[key], x), key
    after = report(runs, "c")
    assert (after["curve"], after["env_steps"]) == (before["curve"], before["env_steps"])


def resumed(runs: Path, script: str, name: str, episodes: int = 0) -> subprocess.CompletedProcess[str]:
    """The same flags once more, and ``--resume``."""
    args = json.loads((runs / "runs" / name / "args.json").read_text()) | dict(num_eval_episodes=episodes, track=None)
    flags: list[object] = [
        "--resume",
        *(f"--{key}" for key, value in args.items() if value is True and key != "capture_video"),
    ]
    for key, value in args.items():
        if value is not None and not isinstance(value, bool):
            flags += [f"--{key}", value]
    return run_script(script, *flags, cwd=runs)


def test_wrong_flags_are_one_sentence(tmp_path: Path) -> None:
    """In a process of its own; many more cases are in tests/faults/scripts.py."""
    command = [sys.executable, str(EXAMPLES / "train_flow.py"), "--demo_path", "none.h5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("train_flow: none.h5 does not exist") and "Traceback" not in done.stderr
