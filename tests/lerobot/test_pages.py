"""The blocks of ``docs/lerobot.md``, and LeRobot's in ``docs/bring_your_own.md``, as they stand."""

import re
from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401
import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec

from sb3_dsrl import LatentPolicy
from tests.lerobot.test_diffusion import ENV_STATE, HORIZON, STATE, H, made
from tests.lerobot.test_vla import Robot
from tests.lerobot.vla_models import smolvla

DOCS = Path(__file__).parent.parent.parent / "docs"


def block(page: str, start: str) -> str:
    """The one block of a page that has a line in it."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    (found,) = [code for code in blocks if start in code]
    return found


def run(code: str) -> dict[str, Any]:
    """What a block leaves behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "a block", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the policies that the pages name, and the envs."""
    monkeypatch.chdir(tmp_path)
    policy, processors = made(STATE, ENV_STATE)
    for part in (policy, *processors):
        part.save_pretrained(Path("me/my_policy"))
    mode = dict(obs_type="environment_state_agent_pos")
    mine = EnvSpec("Mine-v0", "gym_pusht.envs:PushTEnv", max_episode_steps=40, kwargs=mode)
    monkeypatch.setitem(gym.registry, "Mine-v0", mine)
    monkeypatch.setitem(gym.registry, "Robot-v0", EnvSpec("Robot-v0", Robot, max_episode_steps=8))


def test_bring_your_own() -> None:
    names = run(block("bring_your_own.md", "LeRobotPolicy.from_pretrained"))
    assert names["model"].num_timesteps == 128 and isinstance(names["model"].policy, LatentPolicy)
    assert names["flow"].noise_shape == (HORIZON, 2) and names["flow"].act_horizon == H


def test_a_policy_that_lerobot_has_saved() -> None:
    names = run(block("lerobot.md", "num_inference_steps=10"))
    assert names["flow"].num_steps == 10 and names["before"].episodes == 2
    assert names["model"].num_timesteps == 64


def test_a_policy_in_memory() -> None:
    flow = run(block("lerobot.md", "DiffusionConfig("))["flow"]
    assert flow.obs_shapes == {"agent_pos": (2,), "pixels": (96, 96, 3)} and flow.num_steps == 100


def test_smolvla(tmp_path: Path) -> None:
    policy, processors = smolvla(tmp_path / "backbone")
    for part in (policy, *processors):
        part.save_pretrained(Path("me/my_smolvla"))
    names = run(block("lerobot.md", "my_smolvla"))
    assert names["model"].num_timesteps == 16 and names["model"].action_space.shape == (1, 2)


def test_every_block_is_run() -> None:
    assert len(re.findall(r"```python", (DOCS / "lerobot.md").read_text())) == 3
