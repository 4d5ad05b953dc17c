"""The steerability report on flows, envs and critics whose truth is known."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dsrl import (
    ActionChunkWrapper,
    EnsembleChunkCritic,
    FlowPolicy,
    Gate,
    LatentSteeringWrapper,
    StateEncoder,
    SteerabilityReport,
    SteerablePolicy,
    VecLatentSteering,
    collect_rollouts,
    load_demos,
    steerability,
)
from sb3_dsrl.evaluation import steerability as steerability_module
from sb3_dsrl.steering.steering import Steering
from tests.demo_files import write_demos
from tests.envs import FORMS, ScriptedEnv, tiny_flow
from tests.test_images import image_flow, write_image_demos
from tests.toys import BanditEnv, KnownCritic, LinearVelocity, linear_flow, mean_flow

TARGET = np.array([0.5, -0.3])


class ToyEnv(BanditEnv):
    """One step from a start of which the observation tells: its first entry is the sign of the action that succeeds."""

    def __init__(self, succeeds: Any) -> None:
        super().__init__(TARGET)
        self.succeeds = succeeds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        self.start = np.array([self.np_random.choice([-1.0, 1.0]), self.np_random.uniform()], np.float32)
        return self.start, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        success = bool(self.succeeds(self.start, action))
        return self.start, float(success), True, False, {"success": success}


def near_target(start: np.ndarray, action: np.ndarray) -> bool:
    return np.square(action - TARGET).sum() < 0.3  # true of 13% of the prior


def right_sign(start: np.ndarray, action: np.ndarray) -> bool:
    return action[0] * start[0] > 0


def toy(succeeds: Any, flow: SteerablePolicy | None = None, n_envs: int = 5) -> tuple[SteerablePolicy, VecEnv]:
    flow = flow or linear_flow()  # which decodes noise to itself
    return flow, VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(ToyEnv(succeeds), 1)] * n_envs), flow)


def deaf(b: float = 0.0) -> SteerablePolicy:
    """Decodes every noise to b."""
    return linear_flow(a=-1.0, b=b, num_steps=1)


@pytest.fixture(scope="module")
def solved_by_a_noise() -> SteerabilityReport:
    critic = KnownCritic(lambda cond, chunk: -(chunk[..., 0, :] - th.tensor(TARGET, dtype=th.float32)).square().sum(dim=-1))
    return steerability(*toy(near_target), critic)


# --------------------------------------------------------------------------------------------------------------- verdicts


def test_a_fixed_noise_solves_it(solved_by_a_noise: SteerabilityReport) -> None:
    report = solved_by_a_noise
    assert report.verdict.startswith("A fixed noise already reaches 1.00 (the flow alone 0.")
    assert near_target(np.zeros(2), report.search.w[0].clip(-1, 1))
    assert report.base.success_at_end == pytest.approx(0.13, abs=0.1)
    assert (report.zero.success_at_end, report.ticket.success_at_end) == (0.0, 1.0)
    assert report.ticket_std == pytest.approx(
        report.search.tried.std(ddof=1), rel=0.15
    )  # all of it: a noise solves all or none
    assert report.reach == 1.0 and 0.75 < report.potential < 0.95


def test_critic_that_is_right(solved_by_a_noise: SteerabilityReport) -> None:
    assert "worse than chance" not in solved_by_a_noise.findings
    assert solved_by_a_noise.auc_first_chunk == solved_by_a_noise.auc_episode == 1.0
    assert solved_by_a_noise.best_of is not None and solved_by_a_noise.best_of.name == "best_of_16"
    assert solved_by_a_noise.best_of.success_at_end > 0.75  # 1 - 0.87^16 = 0.89


def test_critic_that_is_wrong() -> None:
    critic = KnownCritic(lambda cond, chunk: (chunk[..., 0, :] - th.tensor(TARGET, dtype=th.float32)).square().sum(dim=-1))
    report = steerability(*toy(near_target), critic)
    assert report.auc_first_chunk == 0.0
    assert report.best_of is not None and report.best_of.success_at_end < 0.1
    assert "What it chooses is worse than chance." in report.findings


def test_flow_that_ignores_its_noise() -> None:
    report = steerability(*toy(lambda start, action: start[1] < 0.4, deaf(0.3)))
    assert report.verdict.startswith("Noise barely changes the actions (ratio 0.00)")
    assert report.spread.noise.max() < 1e-6
    assert 0.25 < report.base.success_at_end < 0.55
    assert report.reachable_gain == 0.0 and report.potential < 0.05  # the same starts succeed whatever the noise
    # the noises played the same starts: with other ones each, their std would be 0.19 by luck
    assert report.search.tried.std() == report.luck_std == report.ticket_std == 0.0


def test_flow_that_is_perfect() -> None:
    report = steerability(*toy(lambda start, action: True))
    assert report.verdict == "The flow already succeeds in 1.00 of its episodes: little to gain."
    assert report.potential == 0.0 and report.auc_first_chunk is None


def test_nothing_succeeds() -> None:
    report = steerability(*toy(lambda start, action: False))
    assert report.verdict.startswith("Nothing ever succeeded") and report.potential == 0.0


def test_w_zero_solves_it() -> None:
    report = steerability(*toy(lambda start, action: np.abs(action).max() < 0.05))
    assert report.verdict.startswith("w = 0 already reaches 1.00") and report.potential > 0.9


def test_only_the_state_tells_the_right_noise() -> None:
    """No fixed noise is better than another, but from every start half of the noises succeed."""
    report = steerability(*toy(right_sign))
    assert "stage 2, which chooses by state, has room" in report.verdict
    assert report.best_of is None and report.tries.shape == (50, 4)
    assert report.reach == pytest.approx(1 - 0.5**3, abs=0.15)  # w = 0 always fails
    assert report.ticket.success_at_end == pytest.approx(0.5, abs=0.15) and report.potential > 0.1
    critic = KnownCritic(lambda cond, chunk: cond[..., 0] * chunk[..., 0, 0])
    chosen = steerability(*toy(right_sign), critic)
    assert chosen.verdict.startswith("The best noise by the critic already reaches 1.00")
    assert chosen.potential > report.potential


def test_noise_that_does_not_matter() -> None:
    report = steerability(*toy(lambda start, action: start[1] < 0.4))  # wide actions, without effect
    assert report.verdict.startswith("No noise tried helps") and report.reachable_gain == 0.0


def test_potential_ranks_the_flows() -> None:
    """The nearer the decoded actions stay to one, the less there is to gain."""
    reports = [steerability(*toy(right_sign, linear_flow(a=a, b=0.3, num_steps=1))) for a in (-1.0, -0.6, 0.0)]
    assert np.all(np.diff([report.potential for report in reports]) > 0.03)
    assert np.all(np.diff([report.spread.noise.mean() for report in reports]) > 0)


# ----------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("n_envs", [8, 32])
def test_short_episodes_count_no_more_than_long_ones(n_envs: int) -> None:
    """Half of the starts succeed at once, the others fail after 20 steps: envs without a start of their own idle along."""

    class HalfShort(ToyEnv):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            good = bool(self.start[0] > 0)
            return self.start, 0.0, good, False, {"success": good}

    flow = linear_flow()
    env = FORMS["vec form"](flow, [TimeLimit(HalfShort(right_sign), 20) for _ in range(n_envs)])
    report = steerability(flow, env)
    assert report.tries.shape == (50, 4) and report.reachable_gain == 0.0
    assert report.reach == report.zero.success_at_end == pytest.approx(0.5, abs=0.15)


def test_no_episode_of_a_gate_is_one_of_the_report() -> None:
    flow, env = toy(right_sign)
    seen = {tuple(obs) for obs in steerability(flow, env).rollouts.cond.tolist()}
    gate = Gate(env, episodes=64)
    fresh = collect_rollouts(flow, env, gate.episodes, seed=gate.seed).cond.tolist()
    assert len(seen) == 100 and not seen & {tuple(obs) for obs in fresh}


@pytest.mark.parametrize("form", FORMS)
def test_every_env_step_is_counted_within_the_budget(form: str) -> None:
    flow = tiny_flow()
    raw = [ScriptedEnv(episode_lengths=(5, 100), random_start=True) for _ in range(3)]
    report = steerability(flow, FORMS[form](flow, [TimeLimit(env, 7) for env in raw]), episodes=64, n_tickets=4)
    assert report.env_steps == sum(len(env.rewards) for env in raw)
    searched = 4 * report.search_episodes + (report.search.episodes - report.search_episodes)
    used = sum(row.episodes for row in report.rows) + 8 + searched  # 8 more plays of the prior in the place of the critic's
    assert 56 <= used <= 64
    assert report.base.success_at_end == report.rollouts.success_at_end.mean() and report.base.episodes == 16


def test_both_forms_find_the_same() -> None:
    flow = tiny_flow()

    def found(form: str) -> dict[str, Any]:
        envs = [TimeLimit(ScriptedEnv(episode_lengths=(5, 100), random_start=True), 7) for _ in range(2)]
        return steerability(flow, FORMS[form](flow, envs), episodes=64, n_tickets=4).as_dict()

    first, second = (found(form) for form in FORMS)
    for left, right in zip(*((d["rows"], d["tickets"]["success_at_end"]) for d in (first, second)), strict=True):
        assert left == pytest.approx(right) if not isinstance(left[0], dict) else [*map(pytest.approx, left)] == right
    assert (first["env_steps"], first["reach"], first["verdict"]) == (second["env_steps"], second["reach"], second["verdict"])


def test_gym_env_with_images(tmp_path: Path) -> None:
    class Images(gym.Env):
        observation_space = spaces.Dict(
            {"state": spaces.Box(-10, 10, (6,), np.float32), "rgb": spaces.Box(0, 255, (8, 8, 6), np.uint8)}
        )
        action_space = spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self._obs(), {}

        def step(self, action: np.ndarray) -> Any:
            return self._obs(), 0.0, False, False, {"success": bool(action[0] > 0)}

        def _obs(self) -> dict[str, np.ndarray]:
            state = self.np_random.standard_normal(6).astype(np.float32)
            return {"state": state, "rgb": self.np_random.integers(0, 256, (8, 8, 6), np.uint8)}

    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos)
    env = LatentSteeringWrapper(TimeLimit(Images(), 3), flow)
    report = steerability(flow, env, demos=demos, episodes=32, n_tickets=2)
    assert report.spread.source == "demos" and report.spread.similar is not None
    assert report.spread.noise.shape == report.spread.similar.shape == (3, 2)


# ---------------------------------------------------------------------------------------------------------- action spread


def demo_file(path: Path, spread: float) -> Path:
    """40 episodes at one of two places; the action is the place, plus or minus the spread."""
    episodes = []
    for i in range(40):
        place = float(np.sign(i % 2 - 0.5))
        actions = np.full((6, 2), 0.5 * place + spread * np.sign(i // 2 % 2 - 0.5), np.float32)
        obs = np.tile(np.float32([10 * place, 0.001 * i]), (7, 1))
        episodes.append(dict(obs=obs, actions=actions, rewards=np.zeros(6, np.float32)))
    return write_demos(path, episodes)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_spread_of_noise_and_demos(tmp_path: Path, spread: float) -> None:
    flow, env = toy(right_sign)
    found = steerability(flow, env, demos=demo_file(tmp_path / "demos.h5", spread), episodes=32, n_tickets=2).spread
    clipped = np.sqrt(0.5160)  # E min(x^2, 1) of a standard normal: the toy flow decodes noise to itself, clipped
    np.testing.assert_allclose(found.noise, clipped, rtol=0.1)
    np.testing.assert_allclose(found.overall, np.hypot(0.5, spread), rtol=1e-3)
    assert found.similar is not None
    np.testing.assert_allclose(found.similar, spread, atol=1e-6 + 0.12 * spread)
    assert found.ratio == pytest.approx(clipped / np.hypot(0.5, spread), rel=0.1)
    assert found.noise.shape == found.overall.shape == found.similar.shape == (1, 2)


@pytest.mark.parametrize(("noise_bound", "reached"), [(4.0, 1.0), (0.6, 0.5)])
def test_share_of_the_demos_chunks_that_noise_reaches(tmp_path: Path, noise_bound: float, reached: float) -> None:
    """The flow decodes noise to itself. The demos' actions are 0.8, 0.5, -0.5 and -0.2, those of places apart by 1."""
    flow = linear_flow()
    env = FORMS["vec form"](flow, [ToyEnv(right_sign)], noise_bound=noise_bound)
    report = steerability(flow, env, demos=demo_file(tmp_path / "demos.h5", 0.3), episodes=32, n_tickets=2)
    found = report.demo_chunks
    assert found is not None and found.chunks == 240
    assert found.demos == reached and found.own > 0.95
    assert found.norm == pytest.approx(0.5, abs=0.01) and 0.4 < found.own_norm < 0.9
    assert f"Demos: {reached:.2f} of 240 of their chunks" in report.findings
    assert ("a residual or more demos could" in report.findings) == (reached < 1)
    assert report.as_dict()["demo_chunks"]["demos"] == found.demos


def test_a_flow_that_cannot_do_what_the_demos_do(tmp_path: Path) -> None:
    flow, env = toy(right_sign, deaf(0.3))
    found = steerability(flow, env, demos=demo_file(tmp_path / "demos.h5", 0.0), episodes=32, n_tickets=2).demo_chunks
    assert found is not None and (found.demos, found.own) == (0.0, 1.0)
    assert found.error == pytest.approx(0.4, abs=0.01) or found.error == pytest.approx(1.6, abs=0.01)  # half of the demos each


def test_noise_that_is_steered_in_part_is_not_sought(tmp_path: Path) -> None:
    flow = mean_flow()
    env = FORMS["vec form"](flow, [ToyEnv(right_sign)], steer_mode="shared")
    report = steerability(flow, env, demos=demo_file(tmp_path / "demos.h5", 0.3), episodes=32, n_tickets=2)
    assert report.demo_chunks is None and "Demos: " not in report.findings
    assert report.as_dict()["demo_chunks"] is None


@pytest.mark.parametrize(("mode", "std"), [("full", 0.5), ("act_horizon", 0.25), ("shared", 0.72)])
def test_noise_that_is_not_steered_is_held(mode: str, std: float) -> None:
    """Every action is the mean of 4 rows of the noise, clipped to [-1, 1]; steer_mode="act_horizon" steers one of them."""
    flow = mean_flow()
    env = FORMS["vec form"](flow, [ToyEnv(right_sign)], steer_mode=mode)
    found = steerability(flow, env, episodes=32, n_tickets=2).spread.noise
    np.testing.assert_allclose(found, std, rtol=0.2)


def test_spread_within_the_bounds() -> None:
    flow = linear_flow()
    env = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(ToyEnv(right_sign), 1)]), flow, noise_bound=0.1)
    found = steerability(flow, env, episodes=32, n_tickets=2).spread
    assert found.noise.min() > 0.05 and found.noise.max() < 0.1


# ----------------------------------------------------------------------------------------------------------------- output


def test_auc_of_the_critic_against_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores with ties; a tie counts half. No more than a block of macro-steps is scored at once."""
    monkeypatch.setattr(steerability_module, "BLOCK", 30)
    batches: list[int] = []

    def score(cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
        batches.append(len(cond))
        return (2 * chunk[..., 0, 0]).round() + 2 * cond[..., 0]

    flow, env = toy(right_sign)
    report = steerability(flow, env, KnownCritic(score))
    assert batches[-4:] == [30, 30, 30, 10] and report.rollouts.success_at_end.sum() not in (0, 100)
    scores = score(report.rollouts.cond, report.rollouts.chunk).numpy()
    success = report.rollouts.success_at_end
    difference = scores[success][:, None] - scores[~success]
    assert report.auc_first_chunk == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())
    assert (difference == 0).any() and report.auc_episode == report.auc_first_chunk  # episodes of one macro-step


def test_a_critic_of_a_foreign_policy_judges_the_part_of_the_chunk_that_it_knows() -> None:
    """T = 3, of which the entries 1 and 2 are executed; this critic scores the entries 0 and 1 (faults: off by one action)."""
    flow = FlowPolicy(StateEncoder(2, 1), LinearVelocity(2, 3, 2), act_horizon=2, action_offset=1, num_steps=1).freeze()
    critic = EnsembleChunkCritic(2, 2, 2, n_heads=2, width=8, first_action=0)
    cond, w = th.randn(5, 2), th.randn(5, 3, 2).clamp(-1, 1)  # this flow decodes noise to itself
    found = steerability_module._scores(Steering(flow), critic, cond, w[:, 1:], w, kappa=1.0)
    th.testing.assert_close(found, critic.get_ucb_q(cond, w[:, :2], 1.0))
    critic.first_action = None
    found = steerability_module._scores(Steering(flow), critic, cond, w[:, 1:], w, kappa=1.0)
    th.testing.assert_close(found, critic.get_ucb_q(cond, w[:, 1:], 1.0))


def test_text_json_and_figure(solved_by_a_noise: SteerabilityReport, tmp_path: Path) -> None:
    report = solved_by_a_noise
    text = str(report)
    for part in ("prior", "zero", "ticket", "best_of_16", "AUC", f"{report.env_steps:,}", "Potential", report.verdict):
        assert part in text
    report.save_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == report.as_dict()
    assert found["verdict"] == report.verdict and len(found["tickets"]["success_at_end"]) == 16
    assert np.shape(found["tickets"]["best"]["w"]) == (1, 2) and found["critic"]["auc_first_chunk"] == 1.0
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_refusals(tmp_path: Path) -> None:
    flow, env = toy(right_sign)
    with pytest.raises(ValueError, match=r"The env steers the flow \w+, but flow is \w+: expected the same"):
        steerability(deaf(), env)
    with pytest.raises(ValueError, match="episodes must be at least 115 for 16 tickets, found 114"):
        steerability(flow, env, episodes=114)
    with pytest.raises(ValueError, match="n_tickets must be at least 2, found 1"):
        steerability(flow, env, n_tickets=1)
    with pytest.raises(
        ValueError, match=r"demos\.h5 does not fit the flow: action dimensions is 3 in the demos, 2 in the flow"
    ):
        episode = dict(obs=np.zeros((5, 2)), actions=np.zeros((4, 3)))
        steerability(flow, env, demos=write_demos(tmp_path / "demos.h5", [episode] * 2))
    with pytest.raises(ValueError, match=r"one\.h5 holds one episode, expected at least 2"):
        episode = dict(obs=np.zeros((5, 2)), actions=np.zeros((4, 2)))
        steerability(flow, env, demos=write_demos(tmp_path / "one.h5", [episode]))
    with pytest.raises(ValueError, match="pass the env below VecNormalize"):
        steerability(flow, VecNormalize(env))
    silent = BanditEnv(TARGET)
    steps: list[None] = []
    silent.step = lambda action: steps.append(None) or (np.zeros(2, np.float32), 0.0, True, False, {})  # type: ignore
    with pytest.raises(ValueError, match="steerability needs to know success, but the env's info holds no 'is_success'"):
        steerability(flow, LatentSteeringWrapper(silent, flow))
    assert len(steps) == 1  # not after all episodes


def test_fewest_episodes_are_enough() -> None:
    assert steerability(*toy(right_sign), episodes=115).search_episodes == 2
