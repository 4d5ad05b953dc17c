"""Vector envs of gymnasium, and EnvPool: what the conformance suite does not see."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dsrl import ActionChunkWrapper, ExactBootstrap, VecLatentSteering, ppo_kwargs
from sb3_dsrl.steering.batched import BatchedChunkEnv
from tests.envs import ScriptedEnv, scripted, tiny_flow
from tests.vector_sims import ScriptedEnvPool, TorchVectorEnv

try:
    import envpool
except ImportError:
    envpool = None

H = 4


class Copying(gym.ObservationWrapper):
    """gymnasium hands out ``final_obs`` after the reset: an env that overwrites its array has lost it by then."""

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return obs.copy()


def fns(*lengths: tuple[int, ...], limit: int | None = 10, **kwargs: Any) -> list[Callable[[], gym.Env]]:
    return [lambda own=own: Copying(scripted(limit, episode_lengths=own, **kwargs)) for own in lengths]


def chunks(n: int, n_envs: int, action_dim: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, n_envs, H, action_dim)).astype(np.float32)


def same_transitions(ours: BatchedChunkEnv, env_fns: list[Callable[[], gym.Env]], n: int = 30, seed: int | None = None) -> int:
    """Ours against an ActionChunkWrapper for each env; how many episodes ended."""
    cut = ours.cut_at_time_limit
    singles = DummyVecEnv([lambda fn=fn: ActionChunkWrapper(fn(), H, 2, cut_at_time_limit=cut) for fn in env_fns])
    for env in (ours, singles):
        if seed is not None:
            env.seed(seed)
    np.testing.assert_allclose(ours.reset(), singles.reset(), atol=1e-6)
    ended = 0
    for chunk in chunks(n, len(env_fns), ours.action_space.shape[1]):  # type: ignore[index]
        obs, rewards, dones, infos = ours.step(chunk)
        expected = singles.step(chunk)
        for found, wanted in zip((obs, rewards, dones), expected[:3], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        for info, other in zip(infos, expected[3], strict=True):
            names = (
                "chunk_length",
                "TimeLimit.truncated",
                "is_success",
                "success",
                "elapsed_steps",
                "scene",
                "episode_length",
            )
            assert {name: info.get(name) for name in names} == {name: other.get(name) for name in names}
            if "terminal_observation" in other:
                np.testing.assert_allclose(info["terminal_observation"], other["terminal_observation"], atol=1e-5)
        ended += int(dones.sum())
    return ended


# ------------------------------------------------------------------------------ vector envs that reset themselves


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("limit", [10, 8, 1])
@pytest.mark.parametrize("torch", [False, True])
def test_episodes_that_end_together(mode: str, limit: int, torch: bool) -> None:
    """The time limit cuts the chunk of all; no frame, reward or info is of the next episode, and none of its steps is lost."""
    env_fns = fns((1000,), (1000,), (1000,), limit=limit)
    venv: Any = SyncVectorEnv(env_fns, autoreset_mode=mode)
    ours = BatchedChunkEnv(TorchVectorEnv(venv) if torch else venv, H, 2)
    assert same_transitions(ours, env_fns) >= 3 * 7


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_terminations_that_come_together(mode: str) -> None:
    env_fns = fns((3, 30, 8), (3, 30, 8))
    assert same_transitions(BatchedChunkEnv(SyncVectorEnv(env_fns, autoreset_mode=mode), H, 2), env_fns) >= 8


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_an_episode_that_ends_alone_is_an_error(mode: str) -> None:
    env = BatchedChunkEnv(SyncVectorEnv(fns((1000,), (6,), (1000,)), autoreset_mode=mode), H)
    env.reset()
    env.step(chunks(1, 3)[0])
    with pytest.raises(RuntimeError, match=r"after step 6 of their episodes envs \[1\] ended and others did not; .*DISABLED"):
        env.step(chunks(1, 3)[0])


def test_ended_envs_are_not_stepped_where_no_question_is_asked() -> None:
    """On a GPU a chunk goes on after the end of all its envs."""
    for venv in (SyncVectorEnv(fns((1000,), limit=2)), ScriptedEnvPool([fns((1000,), limit=2)[0]()])):
        simulator = BatchedChunkEnv(venv, H).env
        first, _ = simulator.reset(seed=[0], options={})
        for _ in range(2):
            obs, _, _, truncated, info = simulator.step(th.ones(1, 2))
        assert truncated.all()
        obs, info = obs.clone(), dict(info)
        held = simulator.step(th.zeros(1, 2))
        assert th.equal(held[0], obs) and not held[1].any() and not held[2].any() and not held[3].any()
        assert held[4].keys() == info.keys()
        assert not th.equal(first, obs)


# ------------------------------------------------------------------------------ no reset by itself


def test_bounds_that_do_not_hold_zero() -> None:
    """An env that ended gets an action that is allowed."""
    env_fns = fns((2, 7), (1000,), limit=None, action_low=0.5, action_high=2.0)
    assert same_transitions(BatchedChunkEnv(SyncVectorEnv(env_fns, autoreset_mode="Disabled"), H, 2), env_fns) > 5


def test_seeds() -> None:
    """Env i gets the seed plus i, and its later episodes go on from there, as in the gym form."""
    env_fns = fns((3, 9), (1000,), (5,), random_start=True)
    for seed in (3, 8):
        ours = BatchedChunkEnv(SyncVectorEnv(env_fns, autoreset_mode="Disabled"), H, 2)
        assert same_transitions(ours, env_fns, seed=seed) > 5


class Forgetful(gym.Wrapper):
    """Reports success at some steps only, as NumPy's bool, and a count in the first half of an episode."""

    def step(self, action: np.ndarray) -> Any:
        obs, reward, ended, limit, info = self.env.step(action)
        t = info["elapsed_steps"]
        own = {"early": t} if t < 6 else {}
        return obs, reward, ended, limit, own | ({"success": np.bool_(t % 3 == 0)} if t % 2 else {})


def test_what_only_some_envs_report() -> None:
    env_fns = [lambda fn=fn: Forgetful(fn()) for fn in fns((3, 9), (1000,), (1, 5, 6))]
    ours = BatchedChunkEnv(SyncVectorEnv(env_fns, autoreset_mode="Disabled"), H, 2)
    singles = DummyVecEnv([lambda fn=fn: ActionChunkWrapper(fn(), H, 2) for fn in env_fns])
    ours.reset(), singles.reset()
    for chunk in chunks(30, 3):
        found, wanted = ours.step(chunk), singles.step(chunk)
        for info, other in zip(found[3], wanted[3], strict=True):
            assert info.keys() == other.keys() | {"TimeLimit.truncated"} or "is_success" not in other
            for key in other.keys() - {"terminal_observation", "episode", "episode_return"}:
                assert info[key] == other[key], key


def test_attributes_are_the_simulators() -> None:
    venv = SyncVectorEnv(fns((3,), (5,)), autoreset_mode="Disabled")
    env = BatchedChunkEnv(gym.wrappers.vector.RecordEpisodeStatistics(venv), H)
    env.set_attr("brightness", 3)
    assert venv.brightness == 3 and env.get_attr("brightness") == [3, 3]  # type: ignore[attr-defined]
    assert env.env_method("call", "length")[0] == (3, 5)
    assert env.get_attr("num_envs") == [2, 2]
    with pytest.raises(AttributeError, match="SyncVectorEnv has no attribute 'no_such_thing'"):
        env.get_attr("no_such_thing")


# ------------------------------------------------------------------------------ EnvPool


def test_a_pool_never_resets_by_itself() -> None:
    env_fns = fns((5, 24, 2), (1000,), (11, 7, 1000, 12), (3, 1, 6))
    pool = ScriptedEnvPool([fn() for fn in env_fns])
    assert same_transitions(BatchedChunkEnv(pool, H, 2), env_fns) > 10
    assert pool.resets_by_itself == 0
    assert all(env.unwrapped.steps_after_termination == 0 for env in pool.envs)  # type: ignore[attr-defined]


def test_a_pool_takes_no_seed_later() -> None:
    env = BatchedChunkEnv(ScriptedEnvPool([ScriptedEnv()]), H)
    env.reset()
    env.seed(3)
    with pytest.warns(UserWarning, match=r"EnvPool takes its seed when it is made, envpool.make\(..., seed=...\)"):
        env.reset()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be made with batch_size = num_envs, found 1 and 2"):
        BatchedChunkEnv(ScriptedEnvPool([ScriptedEnv(), ScriptedEnv()], batch_size=1), H)
    with pytest.raises(ValueError, match='EnvPool must be made with env_type="gymnasium", found DMEnvPool'):
        BatchedChunkEnv(type("DMEnvPool", (), {"all_env_ids": [0]})(), H)
    venv = SyncVectorEnv(fns((3,)))
    with pytest.raises(ValueError, match=r"found SyncVectorEnv: put it into BatchedChunkEnv"):
        VecLatentSteering(venv, tiny_flow())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ignore_terminations=True needs a simulator that can be stepped past a termination"):
        BatchedChunkEnv(venv, H, ignore_terminations=True)
    venv.metadata = {}
    with pytest.raises(ValueError, match=r'metadata\["autoreset_mode"\] must be an AutoresetMode of gymnasium, found None'):
        BatchedChunkEnv(venv, H)

    class Hidden(gym.vector.VectorWrapper):
        unwrapped = ScriptedEnv()  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"Hidden resets the envs of a batched simulator by itself: pass what gym\.make"):
        BatchedChunkEnv(Hidden(venv), H)


@pytest.mark.skipif(envpool is None, reason="EnvPool is not installed")
class TestEnvPool:
    @staticmethod
    def make(seed: int | list[int], n: int) -> Any:
        # falls within a few steps; actions lie in [-3, 3]
        kwargs = dict(num_envs=n, max_episode_steps=11, num_threads=1)
        return envpool.make("InvertedPendulum-v4", env_type="gymnasium", seed=seed, **kwargs)

    def test_transitions(self) -> None:
        """Against plain loops over pools of one env each."""
        ours = BatchedChunkEnv(self.make([3, 4, 5], 3), H, gamma=0.9)
        singles = [self.make(seed, 1) for seed in (3, 4, 5)]
        np.testing.assert_allclose(ours.reset()[:, 0], np.concatenate([pool.reset()[0] for pool in singles]), atol=1e-6)
        lengths = set()
        for chunk in chunks(60, 3, 1):
            obs, rewards, dones, infos = ours.step(chunk)
            for i, pool in enumerate(singles):
                reward = 0.0
                for k, action in enumerate(chunk[i]):
                    last, r, terminated, truncated, _ = pool.step(3 * action[None])
                    reward += 0.9**k * float(r[0])
                    if terminated[0] or truncated[0]:
                        break
                assert dones[i] == (terminated[0] or truncated[0]) and infos[i]["chunk_length"] == k + 1
                assert infos[i]["TimeLimit.truncated"] == bool(truncated[0] and not terminated[0])
                assert rewards[i] == pytest.approx(reward, abs=1e-5)
                np.testing.assert_allclose(infos[i]["terminal_observation"][0] if dones[i] else obs[i, 0], last[0], atol=1e-5)
                if dones[i]:
                    lengths.add(k + 1)
                    np.testing.assert_allclose(obs[i, 0], pool.reset()[0][0], atol=1e-6)
        assert len(lengths) == H
        ours.close()

    def test_ppo_learns(self) -> None:
        flow = tiny_flow(4, 1, pred_horizon=H, act_horizon=H)
        env = VecLatentSteering(BatchedChunkEnv(self.make(0, 4), H, flow.obs_horizon), flow)
        model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=16, n_epochs=1))
        model.learn(64, callback=ExactBootstrap())
        assert model.num_timesteps == 64
        env.close()
