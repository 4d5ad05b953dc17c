"""``sb3-dsrl``: its commands, and one whole run with a wheel that was built and installed."""

import importlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from sb3_dsrl.cli.commands import COMMANDS, main
from tests.scripts import EXAMPLES

SCRIPTS = dict(
    demos="make_demos",
    flow="train_flow",
    steerability="steerability",
    stage1="train_latent_offline",
    stage2="train_latent_online",
    improve="improve",
    evaluate="evaluate",
)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[object, str, str]:
    """Exit code, and what the command line prints in this process."""
    monkeypatch.setattr("sys.argv", ["sb3-dsrl", *argv])
    with pytest.raises(SystemExit) as exit_:
        main()
    return (exit_.value.code, *capsys.readouterr())


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "--help")
    assert code == 0 and all(f"sb3-dsrl {name} --help" in " ".join(out.split()) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_script_and_command_are_the_same(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    module, script = importlib.import_module(f"sb3_dsrl.cli.{command}"), importlib.import_module(SCRIPTS[command])
    assert (script.main, script.Args) == (module.main, module.Args)
    code, out, _ = run(capsys, monkeypatch, command, "--help")
    assert code == 0 and f"usage: sb3-dsrl {command}" in out


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "flow", "--demo_path", "none.h5")
    assert code == 2 and err.startswith("sb3-dsrl flow: none.h5 does not exist")
    code, _, err = run(capsys, monkeypatch, "flown")
    assert code == 2 and "invalid choice: 'flown'" in err


def test_demos_need_maniskill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "sb3_dsrl.cli.demos" or name.startswith("sb3_dsrl.experts")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sapien", None)
    code, _, err = run(capsys, monkeypatch, "demos", "--output", "demos.h5")
    assert (code, err) == (2, "sb3-dsrl demos: ManiSkill is not installed: pip install 'sb3-dsrl[demos]'\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel(tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's packages but not this package's source."""
    python, env_folder = sys.executable, tmp_path / "env"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def call(*command: object) -> str:
        done = subprocess.run([str(x) for x in command], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    call(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, EXAMPLES.parent)
    call(python, "-m", "venv", "--without-pip", env_folder)
    (wheel,) = tmp_path.glob("sb3_dsrl-*.whl")
    call(python, "-m", "pip", "--python", env_folder, "install", "--quiet", "--no-deps", wheel)
    assert {"sb3_dsrl/zoo/ppo.yml", "sb3_dsrl/zoo/sac.yml"} <= set(ZipFile(wheel).namelist())
    packages = sysconfig.get_path("purelib", vars=dict(base=str(env_folder)))
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib"))
    assert call(env_folder / "bin" / "python", "-c", "import sb3_dsrl; print(sb3_dsrl.__file__)").startswith(packages)

    flow = ("--awsc_checkpoint", "runs/flow/flow")
    small = ("--num_eval_envs", 1, "--num_eval_episodes", 2, "--max_episode_steps", 12)
    one = ("--num_envs", 1)
    for command, flags in dict(
        flow=(
            *("--demo_path", EXAMPLES / "demos" / "PushCube-v1.h5", "--num_demos", 5, "--network", "mlp", "--width", 32),
            *("--pred_horizon", 4, "--act_horizon", 4, "--total_iters", 3, "--critic_iters", 2, *small),
        ),
        stage1=(*flow, *one, "--rollout_episodes", 2, "--total_iters", 3, *small),
        stage2=(
            *(*flow, *one, "--stage1_checkpoint", "runs/stage1/stage1.pt", "--total_timesteps", 64, "--rollout_steps", 8),
            *("--eval_freq", 64, "--eval_freq_episodes", 1, *small),
        ),
        evaluate=("--policy", "runs/stage2/policy", *small),
    ).items():
        printed = call(env_folder / "bin" / "sb3-dsrl", command, "--exp_name", command, *flags)
        assert "success_at_end" in printed
    rows = {
        name: json.loads((tmp_path / "runs" / name / "report.json").read_text())["rows"] for name in ("stage2", "evaluate")
    }
    assert [row["name"] for row in rows["evaluate"]] == ["prior", "zero", "policy", "policy_stochastic"]
    assert rows["evaluate"][2] | dict(name="stage2") == rows["stage2"][1]
