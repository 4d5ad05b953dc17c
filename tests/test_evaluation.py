"""Evaluation with a fixed quota per env, its controls and intervals, and rollouts for stage 1."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_dsrl import EvalResult, FlowPolicy, LatentSteeringWrapper, collect_rollouts, evaluate, results_table
from sb3_dsrl.evaluation.play import play
from sb3_dsrl.evaluation.results import wilson_interval
from tests.envs import FORMS, ScriptedEnv, gym_steered, scripted, vec_steered

GAMMA = 0.9


@pytest.fixture
def env(flow: FlowPolicy) -> VecEnv:
    return random_starts(flow)


def random_starts(flow: FlowPolicy, n_envs: int = 2, **kwargs: Any) -> VecEnv:
    lengths = ((4, 9), (100,), (7,))
    envs = [scripted(10, episode_lengths=lengths[i], random_start=True) for i in range(n_envs)]
    return vec_steered(flow, envs, gamma=GAMMA, **kwargs)


def raw_envs(env: VecEnv) -> list[ScriptedEnv]:
    return [each.unwrapped for each in env.unwrapped.envs]


# ----------------------------------------------------------------------------------------------------------------- quota


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("episodes", "quota"), [(8, (4, 4)), (7, (4, 3)), (1, (1, 0))])
def test_quota_is_the_same_for_short_and_long_episodes(form: str, episodes: int, quota: tuple[int, int], flow):
    """The first env's episodes last one chunk and succeed, the second's last four and fail."""
    env = FORMS[form](flow, [scripted(12, episode_lengths=(2,)), scripted(12, episode_lengths=(100,))])
    result = evaluate("prior", env, episodes)
    assert result.episodes == episodes
    assert result.success_at_end == result.success_once == pytest.approx(quota[0] / episodes)
    assert result.mean_length == pytest.approx((quota[0] * 2 + quota[1] * 12) / episodes)


def test_one_gym_env(flow):
    result = evaluate("zero", LatentSteeringWrapper(scripted(12, episode_lengths=(5, 100)), flow), 4)
    assert (result.episodes, result.success_at_end, result.mean_length) == (4, 0.5, 8.5)


def test_result_counts_env_steps_up_to_the_time_limit(flow):
    """Success in steps 4 to 5 of a limit of 7, which lies inside the third chunk."""
    raw = [ScriptedEnv(episode_lengths=(100,), success_steps=(4, 5)) for _ in range(2)]
    env = gym_steered(flow, [TimeLimit(each, 7) for each in raw], reward_scale=10.0)
    result = evaluate("prior", env, 2)
    assert (result.success_once, result.success_at_end, result.mean_length) == (1.0, 0.0, 7.0)
    assert result.mean_return == pytest.approx(np.mean([sum(each.rewards[:7]) for each in raw]), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("form", FORMS)
def test_same_seed_same_starts_for_every_actor(form: str, flow):
    def starts(actor: Any, seed: int) -> np.ndarray:
        raw = [ScriptedEnv(episode_lengths=(4, 9), random_start=True) for _ in range(2)]
        evaluate(actor, FORMS[form](flow, raw), 6, seed=seed)
        return np.array([each.starts[:3] for each in raw])

    reference = starts("prior", 5)
    assert len(np.unique(reference)) == 6
    for actor in ("zero", flow, np.ones(flow.noise_shape)):
        np.testing.assert_array_equal(starts(actor, 5), reference)
    assert not np.isin(starts("prior", 8), reference).any()


@pytest.mark.parametrize("sampled", [False, True])
def test_the_same_starts_under_other_noise(sampled: bool, flow, env):
    """``noise_seed`` changes the noise of controls and of sampled models, and nothing else."""
    model = PPO("LatentPolicy", env, gamma=GAMMA**3, n_steps=8, batch_size=16, seed=0)

    def played(noise_seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        actor, mode = (model, dict(deterministic=False)) if sampled else ("prior", {})
        first = next(iter(play(actor, random_starts(flow), 4, seed=3, noise_seed=noise_seed, **mode)))
        return first.obs, first.w

    (obs, w), (same_obs, same_w), (other_obs, other_w) = played(None), played(3), played(4)
    np.testing.assert_array_equal(obs, other_obs)
    np.testing.assert_array_equal(w, same_w)
    np.testing.assert_array_equal(obs, same_obs)
    assert (w != other_w).all()
    result = evaluate("prior", random_starts(flow), 4, seed=3)
    assert result == evaluate("prior", random_starts(flow), 4, seed=3, noise_seed=3)
    assert result.mean_return != evaluate("prior", random_starts(flow), 4, seed=3, noise_seed=4).mean_return


@pytest.mark.parametrize("deterministic", [True, False])
def test_same_seed_same_result(deterministic: bool, flow, env):
    model = PPO("LatentPolicy", env, gamma=GAMMA**3, n_steps=8, batch_size=16, seed=0)
    results = []
    for state, seed in ((0, 3), (1, 3), (2, 4)):
        th.manual_seed(state)  # where the global generator stands must not matter
        results.append(evaluate(model, random_starts(flow), 4, seed=seed, deterministic=deterministic))
    assert results[0] == results[1]
    assert results[0].mean_return != results[2].mean_return


def test_evaluation_leaves_the_global_generators_alone(env):
    model = PPO("LatentPolicy", env, gamma=GAMMA**3, n_steps=8, batch_size=16, seed=0)
    states = [th.random.get_rng_state(), np.random.get_state()[1].copy()]
    evaluate(model, env, 3, deterministic=False)
    collect_rollouts("prior", env, 2)
    assert th.equal(th.random.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


# --------------------------------------------------------------------------------------------------------------- actors


def test_zero_and_fixed_noise(flow):
    fixed = np.random.default_rng(0).standard_normal(flow.noise_shape)
    for actor, w in (("zero", np.zeros(flow.noise_shape)), (fixed, fixed)):
        for step in play(actor, random_starts(flow), 3):
            np.testing.assert_allclose(step.w, np.broadcast_to(w, (2, 4, 2)), atol=1e-6)
            assert step.w.dtype == np.float32


def test_prior_is_the_unsteered_flow(flow):
    w = np.concatenate([step.w for step in play("prior", random_starts(flow), 200, seed=1)])
    assert len(w) > 500 and abs(w.mean()) < 0.02 and w.std() == pytest.approx(1.0, abs=0.02)
    again = np.concatenate([step.w for step in play(flow, random_starts(flow), 200, seed=1)])
    np.testing.assert_array_equal(w, again)


def test_models_and_policies_play(flow, env):
    model = PPO("LatentPolicy", env, gamma=GAMMA**3, n_steps=8, batch_size=16, policy_kwargs=dict(centre=np.full((4, 2), 0.5)))
    for actor in (model, model.policy):
        for step in play(actor, random_starts(flow), 2, deterministic=True):
            np.testing.assert_allclose(step.w, 0.5, atol=1e-6)
        assert np.std(next(iter(play(actor, random_starts(flow), 2, deterministic=False))).w) > 0.3
    # a fresh policy plays as the prior does, but for its mean
    assert evaluate(model, random_starts(flow), 2).mean_return == pytest.approx(
        evaluate(np.full((4, 2), 0.5), random_starts(flow), 2).mean_return, abs=1e-5
    )
    sac = SAC("MlpPolicy", gym_steered(flow, [scripted()]), policy_kwargs=dict(net_arch=[8]), buffer_size=10)
    assert evaluate(sac, random_starts(flow), 2).episodes == 2


@pytest.mark.parametrize(
    ("actor", "name", "expected"),
    [
        ("prior", None, "prior"),
        ("zero", None, "zero"),
        ("flow", None, "prior"),
        ("noise", None, "model"),
        ("zero", "w0", "w0"),
    ],
)
def test_names(actor: str, name: str | None, expected: str, flow, env):
    actors = dict(flow=flow, noise=np.zeros(flow.noise_shape))
    assert evaluate(actors.get(actor, actor), env, 2, name=name).name == expected


# -------------------------------------------------------------------------------------------------------------- interval


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I: Wilson score without continuity correction
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval(successes: int, episodes: int, low: float, high: float):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=1e-4)


def test_result_carries_the_interval_of_success_at_end(flow):
    env = gym_steered(flow, [scripted(12, episode_lengths=(2, 100), success_steps=None)])
    result = evaluate("zero", env, 10)
    assert (result.ci_low, result.ci_high) == wilson_interval(5, 10)
    row = result.as_row()
    assert set(row) == {"name", "episodes", "success_once", "success_at_end", "ci_low", "ci_high", "return", "length"}
    assert (row["return"], row["length"]) == (result.mean_return, 7.0)


def test_results_table():
    rows = [EvalResult(name, 100, 0.9, 0.8, 0.711, 0.867, 1.5, 20.0) for name in ("prior", "stage2")]
    header, *lines = results_table(rows).splitlines()
    assert header.split() == ["name", "episodes", "success_once", "success_at_end", "95%", "interval", "return"]
    assert [line.split() for line in lines] == [
        [name, "100", "0.90", "0.80", "0.71", "-", "0.87", "1.50"] for name in ("prior", "stage2")
    ]


# -------------------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_and_evaluation_agree(flow: FlowPolicy) -> None:
    first, second = random_starts(flow), random_starts(flow)
    result = collect_rollouts("prior", first, 5, seed=3).result
    assert result is not None and 0 < result.success_at_end < 1
    assert result == evaluate("prior", second, 5, seed=3, name="rollouts")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quota", [(3, 3), (3, 2)])
def test_rollouts_equal_a_hand_loop(form: str, quota: tuple[int, int], flow):
    """
    Every row against the raw env. The limit of 7 lies inside the third chunk: a termination at step 8 ends the episode, but
    comes too late to count as success.
    """
    scripts = [dict(episode_lengths=(5, 100, 3)), dict(episode_lengths=(100, 8, 100))]
    env = FORMS[form](flow, [scripted(7, random_start=True, **script) for script in scripts], gamma=GAMMA)
    rollouts = collect_rollouts("prior", env, sum(quota), seed=2)
    np.testing.assert_array_equal(np.unique(rollouts.episode), np.arange(sum(quota)))
    assert (np.diff(rollouts.episode) >= 0).all()  # grouped
    n_rows = 0
    for i, j in [(0, j) for j in range(quota[0])] + [(1, j) for j in range(quota[1])]:
        twin = ScriptedEnv(**scripts[i])
        twin.begin(j, raw_envs(env)[i].starts[j])
        frames = [twin._obs.copy()] * 2

        def features() -> th.Tensor:
            return flow.encode(np.stack(frames[-2:])[None])[0]  # noqa: B023

        (first,) = np.flatnonzero([th.allclose(cond, features(), atol=1e-5) for cond in rollouts.cond])
        rows = np.flatnonzero(rollouts.episode == rollouts.episode[first])
        assert rows[0] == first
        terminated = False
        for row in rows:
            assert not terminated and twin.t < 7
            th.testing.assert_close(rollouts.cond[row], features(), atol=1e-5, rtol=0)
            chunk = flow.decode(features()[None], rollouts.w[row][None])[0, :3]
            th.testing.assert_close(rollouts.chunk[row], chunk, atol=1e-5, rtol=0)
            reward, k = 0.0, 0
            while k < 3 and not terminated:
                obs, r, terminated, _, _ = twin.step(chunk[k].numpy())
                frames.append(obs.copy())
                reward, k = reward + GAMMA**k * r, k + 1
            assert rollouts.reward[row].item() == pytest.approx(reward, abs=1e-4)
            assert rollouts.discount[row].item() == pytest.approx(0.0 if terminated else GAMMA**3)
            th.testing.assert_close(rollouts.next_cond[row], features(), atol=1e-5, rtol=0)
        assert terminated or twin.t >= 7
        assert rollouts.success_at_end[rollouts.episode[first]] == (terminated and twin.t <= 7)
        n_rows += len(rows)
    assert len(rollouts) == n_rows
    assert rollouts.env_steps == sum(len(raw.actions) for raw in raw_envs(env))
    transitions = rollouts.transitions()
    for name in ("cond", "chunk", "reward", "discount", "next_cond"):
        assert th.equal(getattr(transitions, name), getattr(rollouts, name))


def test_rollouts_of_a_model_sample_by_default(flow, env):
    model = PPO("LatentPolicy", env, gamma=GAMMA**3, n_steps=8, batch_size=16, seed=0)
    assert collect_rollouts(model, env, 4).w.std() > 0.5
    assert collect_rollouts(model, env, 4, deterministic=True).w.abs().max() == 0.0


# ---------------------------------------------------------------------------------------------------------------- errors


def test_errors(flow, env):
    with pytest.raises(ValueError, match="episodes must be at least 1, found 0"):
        evaluate("prior", env, 0)
    with pytest.raises(ValueError, match=r"Unknown control 'piror'; expected 'prior' \(w ~ N\(0, I\)\) or 'zero'"):
        evaluate("piror", env, 2)
    with pytest.raises(ValueError, match="is not steered"):
        collect_rollouts("prior", VecMonitor(DummyVecEnv([scripted])), 2)
    with pytest.raises(ValueError, match="evaluate needs a steered env, but the env's info holds no 'chunk_length'"):
        evaluate("zero", DummyVecEnv([scripted]), 2)


def blind() -> ScriptedEnv:
    env = ScriptedEnv(episode_lengths=(10,))
    env.step = lambda action, step=env.step: (*step(action)[:4], {})
    return env


@pytest.mark.parametrize("form", FORMS)
def test_an_env_without_success_is_refused_at_the_first_macro_step(form: str, flow):
    raw = blind()
    sentence = (
        "evaluate needs to know success, but the env's info holds no 'is_success': expected an env that reports 'success'"
    )
    with pytest.raises(ValueError, match=sentence):
        evaluate("zero", FORMS[form](flow, [raw]), 20)
    assert len(raw.actions) == flow.act_horizon


def test_rollouts_need_no_success(flow):
    assert collect_rollouts("prior", gym_steered(flow, [blind()]), 2).result is None


# ---------------------------------------------------------------------------------------------------------- training envs


def assert_same_statistics(env: VecNormalize, before: VecNormalize, returns: np.ndarray) -> None:
    assert env.training
    for name in ("obs_rms", "ret_rms"):
        found, expected = getattr(env, name), getattr(before, name)
        np.testing.assert_array_equal(found.mean, expected.mean)
        np.testing.assert_array_equal(found.var, expected.var)
        assert found.count == expected.count
    np.testing.assert_array_equal(env.returns, returns)


def test_playing_leaves_a_vec_normalize_in_training_as_it_is(flow):
    env = VecMonitor(VecNormalize(random_starts(flow), gamma=GAMMA**3))
    normalize = env.venv
    env.reset()
    for _ in range(5):
        env.step(np.ones((2, 4, 2), np.float32))
    before, returns = deepcopy(normalize), normalize.returns.copy()
    assert returns.any()
    evaluate("prior", env, 4)
    assert_same_statistics(normalize, before, returns)
    for step in play("zero", env, 4):
        assert not normalize.training and step is not None
        break  # nor if it is left early
    assert_same_statistics(normalize, before, returns)
    raw_envs(env)[1].step = lambda action: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate("prior", env, 4)
    assert_same_statistics(normalize, before, returns)
    normalize.training = False
    with pytest.raises(ZeroDivisionError):
        evaluate("prior", env, 4)
    assert not normalize.training


@pytest.mark.parametrize("form", ["gym", "vec", "below VecNormalize"])
def test_a_model_that_played_in_its_training_env_learns_on_from_a_reset(form: str, flow):
    if form == "gym":
        env = LatentSteeringWrapper(scripted(10, random_start=True), flow, gamma=GAMMA)
        model = PPO("LatentPolicy", env, gamma=GAMMA**3, n_steps=8, batch_size=8, seed=0)
        raw = [env.unwrapped]
    else:
        env = random_starts(flow)
        own = VecNormalize(env, gamma=GAMMA**3) if form == "below VecNormalize" else env
        model = PPO("LatentPolicy", own, gamma=GAMMA**3, n_steps=8, batch_size=8, seed=0)
        raw = raw_envs(env)
    model.learn(16)
    evaluate(model, env, 3)
    played = [len(each.starts) for each in raw]
    firsts: list[np.ndarray] = []

    class Noted(BaseCallback):
        def _on_rollout_start(self) -> None:
            normalized = self.model.get_vec_normalize_env()
            firsts.append(self.model._last_obs if normalized is None else normalized.get_original_obs())

        def _on_step(self) -> bool:
            return True

    model.learn(16, reset_num_timesteps=False, callback=Noted())
    assert model.num_timesteps == 32
    frames = [
        np.repeat((np.sin(np.arange(3) + each.starts[n] + 7 * n))[None], 2, 0) for each, n in zip(raw, played, strict=True)
    ]
    obs = flow.encode(np.stack(frames).astype(np.float32)).numpy()
    np.testing.assert_allclose(firsts[0], obs, atol=1e-5)


def test_a_model_that_played_elsewhere_learns_on_from_where_it_was(flow):
    model = PPO("LatentPolicy", random_starts(flow), gamma=GAMMA**3, n_steps=8, batch_size=8, seed=0)
    model.learn(16)
    last = model._last_obs
    evaluate(model, random_starts(flow), 3)
    assert model._last_obs is last
