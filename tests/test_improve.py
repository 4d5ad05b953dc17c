"""Everything in one call, on problems whose answer is known, and within its budget."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

import sb3_dsrl
from sb3_dsrl import SteeredPolicy, evaluate, improve, make_latent_env
from tests.envs import ScriptedEnv, tiny_flow, vec_steered
from tests.scripts import run_script
from tests.toys import GuideEnv, guide_flow

#: PPO for toys.
PPO_KWARGS: dict[str, Any] = dict(learning_rate=3e-3, policy_kwargs=dict(net_arch=[64]))


class Guide(GuideEnv):
    """The best noise is ``0.8 x (1, -1)`` at every step; success if the last one is near. All envs that are made are kept."""

    envs: list["Guide"] = []

    def __init__(self) -> None:
        super().__init__()
        self.envs.append(self)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, ended, truncated, info = super().step(action)
        return obs, reward, ended, truncated, dict(info, success=reward > -0.15)


class Hopeless(Guide):
    """Success is drawn by chance, whatever is played."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, _, ended, truncated, info = super().step(action)
        return obs, 0.0, ended, truncated, dict(info, success=self.np_random.random() < 0.5)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Envs in workers cannot be asked how many steps they made, and toys are quicker without."""
    Guide.envs.clear()

    def make(env_id: Any, flow: Any, n_envs: int = 1, seed: int | None = None, **kwargs: Any) -> Any:
        if not callable(env_id) or "nonsense" in kwargs:
            return make_latent_env(env_id, flow, n_envs, seed=seed, **kwargs)
        env = vec_steered(flow, [env_id() for _ in range(n_envs)], **kwargs)
        env.seed(seed)
        return env

    monkeypatch.setattr("sb3_dsrl.auto.improve.make_latent_env", make)


def test_it_finds_what_depends_on_the_state(tmp_path: Path) -> None:
    flow = guide_flow()
    policy = improve(flow, Guide, budget=14_000, ppo=PPO_KWARGS)
    report = policy.report
    assert report.name in ("stage1", "stage2") and policy.deterministic
    assert report.env_steps == sum(env.made for env in Guide.envs) <= 14_000  # every step of every part
    assert set(report.spent) == {"first episodes", "steerability", "rollouts", "gate", "stage 2", "choice"}
    assert min(report.spent.values()) > 0 and report.spent["steerability"] == report.steerability.env_steps
    assert report.spent["choice"] == report.choice.env_steps and report.choice.gains[report.name][1] > 0
    env = vec_steered(flow, [Guide() for _ in range(8)])
    result = {name: evaluate(actor, env, 100).success_at_end for name, actor in dict(zero="zero", found=policy).items()}
    assert result["zero"] < 0.35 and result["found"] > 0.8
    policy.save_pretrained(tmp_path / "policy")
    loaded = SteeredPolicy.from_pretrained(tmp_path / "policy")
    assert loaded.deterministic and evaluate(loaded, env, 100).success_at_end == result["found"]
    report.save_json(tmp_path / "report.json")
    assert "Kept: " + report.name in str(report) and '"curve"' in (tmp_path / "report.json").read_text()
    assert [steps for steps, _ in report.curve] == sorted(steps for steps, _ in report.curve) and len(report.curve) >= 3


def test_where_nothing_helps_the_flow_comes_back(tmp_path: Path) -> None:
    """Played by its mean it would be w = 0, which nobody has shown to be as good: so it says that it is to be sampled."""
    flow = guide_flow()
    policy = improve(flow, Hopeless, budget=2_400, ppo=PPO_KWARGS)
    assert policy.report.name == "base" and not policy.deterministic
    assert policy.report.env_steps <= 2_400
    chunks = np.array([policy.predict(np.zeros(2, np.float32)) for _ in range(400)])
    assert 4 * chunks.std() == pytest.approx(1.0, abs=0.1) and 4 * chunks.mean() == pytest.approx(0.0, abs=0.1)
    assert np.ptp([policy.predict(np.zeros(2, np.float32), deterministic=True) for _ in range(4)]) < 0.3
    policy.save_pretrained(tmp_path / "policy")
    assert not SteeredPolicy.from_pretrained(tmp_path / "policy").deterministic
    env = vec_steered(flow, [Hopeless(), Hopeless()])
    assert evaluate(policy, env, 4, seed=1) == evaluate(policy, env, 4, seed=1, deterministic=False)


def test_the_same_seed_finds_the_same() -> None:
    found = [improve(guide_flow(), Guide, budget=1_600, seed=3, ppo=PPO_KWARGS).report.as_dict() for _ in range(2)]
    for one in found:
        del one["seconds"]
    assert found[0] == found[1]


@pytest.mark.parametrize("n_envs", [1, 3])
def test_chunks_time_limits_and_few_envs(n_envs: int) -> None:
    made: list[ScriptedEnv] = []

    def make() -> gym.Env:
        made.append(ScriptedEnv(episode_lengths=(5, 100), random_start=True))
        return TimeLimit(made[-1], 8)

    policy = improve(tiny_flow(), make, budget=1_500, n_envs=n_envs, residual_scale=0.1)
    assert policy.report.env_steps == sum(len(env.rewards) for env in made)
    assert policy.contract.residual_scale == 0.1


def test_bad_input() -> None:
    flow = guide_flow()
    for kwargs, message in (
        (dict(budget=0), "budget must be a positive number of env steps, found 0"),
        (dict(budget=300), r"budget must be at least 800 env steps for 8 envs and episodes of 4 steps, found 300"),
        (dict(alpha=1.5), "alpha is a probability"),
        (dict(obs="env"), "improve needs the flow's own features"),
        (dict(nonsense=3), "does not know nonsense"),
    ):
        with pytest.raises(ValueError, match=message):
            improve(flow, Guide, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs to know success"):
        improve(tiny_flow(3, 1, obs_horizon=1), "Pendulum-v1", budget=100_000)


def test_the_function_is_not_hidden_by_a_module() -> None:
    assert callable(sb3_dsrl.improve)


def test_script_with_maniskill(tmp_path: Path) -> None:
    """A flow that knows nothing: there is nothing to gain, and all parts must run."""
    env_id, folder = "PushCube-v1", tmp_path / "flow"
    tiny_flow(35, 8, env_id=env_id, obs_mode="state", control_mode="pd_joint_delta_pos").save_pretrained(folder)
    flags = ("--awsc_checkpoint", folder, "--exp_name", "x", "--max_episode_steps", 6, "--num_envs", 2)
    done = run_script("improve.py", *flags, "--budget", 300, cwd=tmp_path)
    assert done.returncode == 2 and "budget must be at least 600 env steps" in done.stderr
    done = run_script("improve.py", *flags, "--budget", 900, "--num_eval_episodes", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Kept: base" in done.stdout
    assert SteeredPolicy.from_pretrained(tmp_path / "runs" / "x" / "policy").flow.env_id == env_id
