"""rl-zoo3: the page ``docs/rl_zoo.md``, its commands, and the settings that the package brings."""

import os
import pickle
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stable_baselines3 import PPO, SAC

from sb3_dsrl import FlowPolicy, LatentPolicy, make_latent_env, ppo_kwargs
from tests.envs import ScriptedEnv, tiny_flow

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "sb3_dsrl" / "zoo"
COMMANDS = [
    command.replace("\\\n", " ").strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "rl_zoo.md").read_text(), flags=re.DOTALL)
    for command in re.findall(r"^python -m (?:.*\\\n)*.*\n", block, flags=re.MULTILINE)
]
H = 8

pytestmark = pytest.mark.timeout(600)  # each command imports torch anew
needs_zoo = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="rl_zoo3 is not installed (make test-zoo)")


def pendulum_flow() -> FlowPolicy:
    return tiny_flow(3, 1, pred_horizon=H, act_horizon=H, env_id="Pendulum-v1")


def settings(algo: str) -> dict[str, Any]:
    return yaml.safe_load((ZOO / f"{algo}.yml").read_text())["sb3_dsrl/Latent-v0"]


def test_ppo_yml_is_the_methods_settings() -> None:
    found = settings("ppo")
    flow = tiny_flow(3, 8, pred_horizon=16, act_horizon=8)
    wanted = ppo_kwargs(make_latent_env(ScriptedEnv, flow, env_kwargs=dict(action_dim=8)))
    for name in ("gamma", "n_epochs", "clip_range", "ent_coef"):
        assert found[name] == pytest.approx(wanted[name]), name
    assert found["n_steps"] * found["n_envs"] == wanted["n_steps"]
    assert found["batch_size"] == wanted["batch_size"]
    schedule, start = found["learning_rate"].split("_")
    assert schedule == "lin"
    assert [wanted["learning_rate"](x) for x in (1, 0.5, 0)] == pytest.approx([float(start), float(start) / 2, 0])
    assert eval(found["policy_kwargs"]) == pytest.approx(wanted["policy_kwargs"])


# The commands, each for a few seconds


def run(folder: Path, command: str, *further: object, algo: str = "ppo") -> str:
    """What a command of the page prints in a folder with a flow."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    text = command.replace("$ZOO", str(ZOO)).replace("PushCube-v1", "Pendulum-v1").replace("ppo", algo)
    argv = [sys.executable, *shlex.split(text)[1:], *map(str, further)]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "discounts with gamma" not in done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pendulum_flow().save_pretrained(tmp_path / "runs" / "flow" / "flow")
    return tmp_path


@needs_zoo
@pytest.mark.slow
@pytest.mark.parametrize(("algo", "cls"), [("ppo", PPO), ("sac", SAC)])
def test_train_and_enjoy(folder: Path, algo: str, cls: type[Any]) -> None:
    train, enjoy, _ = COMMANDS
    short = ("--n-timesteps", 256, "--eval-freq", 256, "--eval-episodes", 1, "--seed", 0)
    given = settings(algo)
    fewer = ["n_envs:2", "learning_starts:100", "gradient_steps:1"] if algo == "sac" else ["n_envs:2", "n_steps:64"]
    printed = run(folder, train, *short, "--hyperparams", *fewer, algo=algo)
    assert "Saving to logs" in printed
    model = cls.load(next((folder / "logs" / algo).rglob("sb3_dsrl-Latent-v0.zip")))
    assert model.num_timesteps == 256 and model.gamma == pytest.approx(0.99**H)
    if algo == "ppo":
        assert isinstance(model.policy, LatentPolicy) and model.policy.value_lr == 1e-3
        assert (model.n_epochs, model.batch_size) == (given["n_epochs"], given["batch_size"])
    assert "Episode Reward" in run(folder, enjoy, "--n-timesteps", 30, algo=algo)


@needs_zoo
@pytest.mark.slow
def test_tune(folder: Path) -> None:
    tune = COMMANDS[2]
    short = ("--n-timesteps", 256, "--n-evaluations", 1, "--eval-episodes", 1, "--seed", 0, "--no-optim-plots")
    printed = run(folder, tune, *short, "--n-trials", 2, "--hyperparams", "n_envs:2")
    assert "Number of finished trials:  2" in printed and "Best trial:" in printed
    with next((folder / "logs" / "ppo").glob("report_*.pkl")).open("rb") as file:
        study = pickle.load(file)
    for trial in study.trials:
        assert trial.state.name == "COMPLETE" and np.isfinite(trial.value)
        assert {"std", "prior_mix", "value_lr", "n_steps_pow"} <= trial.params.keys()
        assert not any("gamma" in name for name in trial.params)


@needs_zoo
@pytest.mark.parametrize(("algo", "cls", "policy"), [("ppo", PPO, "LatentPolicy"), ("sac", SAC, "MlpPolicy")])
def test_what_is_sampled_fits(algo: str, cls: type[Any], policy: str) -> None:
    """All of it is keyword arguments of the algorithm, and a trial's numbers give the same again."""
    import optuna
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    import sb3_dsrl.zoo

    assert HYPERPARAMS_SAMPLER[algo].__module__ == sb3_dsrl.zoo.samplers.__name__
    env = make_latent_env("Pendulum-v1", pendulum_flow())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        kwargs = HYPERPARAMS_SAMPLER[algo](trial, 8, 1, {})
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == kwargs
        model = cls(policy, env, gamma=0.99**H, **({"buffer_size": 10} if algo == "sac" else {}), **kwargs)
        if algo == "ppo":
            assert 0.1 <= np.exp(model.policy.log_std.mean().item()) <= 1.0 + 1e-6
            assert model.policy.initial_prior_mix == trial.params["prior_mix"]
