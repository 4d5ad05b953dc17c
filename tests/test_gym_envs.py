"""Steered envs from an id of gymnasium or a callable; flows by the name of their folder."""

import gc
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import RescaleAction, TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    LatentSteeringWrapper,
    VecLatentSteering,
    WorkerSettings,
    demo_transitions,
    make_chunk_env,
    make_latent_env,
    pretrain_latent,
    train_critic,
    train_flow,
)
from sb3_dsrl.envs.gym_envs import SuccessKey
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.policies.loading import resolve_flow
from sb3_dsrl.stage2.steered_policy import SteeredPolicy
from sb3_dsrl.steering.steering import Steering
from tests.envs import ScriptedEnv, scripted, tiny_flow
from tests.stage0 import SMALL, random_demos


class Hidden(ScriptedEnv):
    """Says of its success under another name, and not at every step."""

    def __init__(self, reports: bool = True, **kwargs: Any) -> None:
        super().__init__(episode_lengths=(5,), **kwargs)
        self.reports = reports

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        obs, reward, ended, limit, info = super().step(action)
        info["is_goal"] = np.array([info.pop("success")])
        if self.t % 2 == 0 or not self.reports:
            del info["is_goal"]
        return obs, reward, ended, limit, info


@pytest.fixture
def flow() -> FlowPolicy:
    return tiny_flow(3, 1, env_id="Pendulum-v1")


@pytest.fixture
def folder(flow: FlowPolicy, tmp_path: Path) -> Path:
    flow.save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


def played(env: VecLatentSteering, n: int) -> list[Any]:
    rng, trace = np.random.default_rng(0), [env.reset()]
    for _ in range(n):
        obs, rewards, dones, infos = env.step(rng.standard_normal((env.num_envs, *env.action_space.shape)))
        trace += [obs, rewards, dones, [info["chunk_length"] for info in infos]]
    env.close()
    return trace


@pytest.mark.parametrize("workers", [None, WorkerSettings(2)])
def test_an_id_is_the_envs_that_one_would_make_by_hand(flow: FlowPolicy, workers: WorkerSettings | None) -> None:
    """Whatever carries them: bit for bit the gym form around ``gym.make``, with all arguments where they belong."""
    kwargs: dict[str, Any] = dict(env_kwargs=dict(g=4.0), max_episode_steps=7)
    wrapping = dict(wrapper_class=RescaleAction, wrapper_kwargs=dict(min_action=-1.0, max_action=0.5))
    trace = played(make_latent_env("Pendulum-v1", flow, 3, workers=workers, seed=5, gamma=0.9, **kwargs, **wrapping), 4)
    envs = [
        LatentSteeringWrapper(RescaleAction(gym.make("Pendulum-v1", 7, g=4.0), -1.0, 0.5), flow, gamma=0.9) for _ in range(3)
    ]
    np.testing.assert_allclose(trace[0], [env.reset(seed=5 + i)[0] for i, env in enumerate(envs)], rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(0)
    for step in range(2):  # up to the end of the episodes
        w = rng.standard_normal((3, *flow.noise_shape))
        rewards = [env.step(x)[1] for env, x in zip(envs, w, strict=True)]
        np.testing.assert_allclose(trace[2 + 4 * step], rewards, rtol=1e-4)
    assert [list(done) for done in trace[3::4]] == [[False] * 3, [False] * 3, [True] * 3, [False] * 3]


def test_one_env_stays_in_this_process_and_many_do_not(flow: FlowPolicy) -> None:
    one, many = make_chunk_env("Pendulum-v1"), make_chunk_env("Pendulum-v1", 2)
    assert isinstance(one.envs[0], ActionChunkWrapper)  # type: ignore[attr-defined]
    assert isinstance(many, WorkerVecEnv)
    many.close()


def test_a_callable_gets_its_arguments_and_a_time_limit(flow: FlowPolicy) -> None:
    kwargs: dict[str, Any] = dict(env_kwargs=dict(action_dim=2, episode_lengths=(100,)), max_episode_steps=4)
    env = make_latent_env(ScriptedEnv, tiny_flow(3, 2), **kwargs)
    (chunk_env,) = env.venv.envs  # type: ignore[attr-defined]
    assert isinstance(chunk_env.env, TimeLimit) and chunk_env.unwrapped.episode_lengths == (100,)
    trace = played(env, 2)
    assert [list(done) for done in trace[3::4]] == [[False], [True]]


def test_success_under_another_name() -> None:
    env = make_latent_env(Hidden, tiny_flow(3, 2), success_key="is_goal")
    env.reset()
    for _ in range(2):
        _, _, dones, infos = env.step(np.zeros((1, 4, 2)))
    assert dones[0] and infos[0]["success_once"] is True and infos[0]["success_at_end"] is True


def test_a_success_key_that_is_never_there() -> None:
    env = SuccessKey(Hidden(reports=False), "is_goal")
    for _ in range(2):
        env.reset()
        for _ in range(4):
            env.step(np.zeros(2, np.float32))
        with pytest.raises(
            ValueError, match=r"success_key='is_goal' is in no info of this episode of Hidden, which holds \['e"
        ):
            env.step(np.zeros(2, np.float32))


def test_workers_need_not_have_registered_the_id(flow: FlowPolicy) -> None:
    gym.register("OnlyHere-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=3)
    try:
        env = make_latent_env("OnlyHere-v0", flow, 2, allow_other_task=True)
    finally:
        del gym.registry["OnlyHere-v0"]
    assert env.venv.get_attr("env_id") == ["OnlyHere-v0"] * 2
    env.close()


def test_an_id_may_name_the_module_that_registers_it(flow: FlowPolicy) -> None:
    env = make_latent_env("gymnasium.envs.classic_control:Pendulum-v1", flow)
    assert env.venv.get_attr("env_id") == ["Pendulum-v1"]


def test_a_folder_is_as_good_as_its_flow(folder: Path, flow: FlowPolicy) -> None:
    raw, w = gym.make("Pendulum-v1"), np.full(flow.noise_shape, 0.5)
    expected = LatentSteeringWrapper(raw, flow)
    first, (second, reward, *_) = expected.reset(seed=0)[0], expected.step(w)
    for named in (folder, str(folder)):
        for env in (LatentSteeringWrapper(raw, named), gym.make("sb3_dsrl/Latent-v0", env_id="Pendulum-v1", flow=named)):
            np.testing.assert_array_equal(env.reset(seed=0)[0], first)
            obs, found, *_ = env.step(w)
            np.testing.assert_array_equal(obs, second)
            assert found == reward
        assert LatentSteeringWrapper(raw, named, act_horizon=2).steering.flow.act_horizon == 2
        venv = VecLatentSteering(make_chunk_env("Pendulum-v1", act_horizon=3, obs_horizon=2), named)
        for vec in (venv, make_latent_env("Pendulum-v1", named)):
            vec.seed(0)
            np.testing.assert_array_equal(vec.reset()[0], first)
            np.testing.assert_array_equal(vec.step(w[None])[0][0], second)
        assert Steering(named).flow.fingerprint() == flow.fingerprint()


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_make_vec_env_with_the_name_of_a_folder(folder: Path, vec_env_cls: type[Any]) -> None:
    """Processes that have not imported this package, too."""
    named = dict(env_id="Pendulum-v1", flow=str(folder))
    registered = make_vec_env("sb3_dsrl:sb3_dsrl/Latent-v0", 2, seed=0, env_kwargs=named, vec_env_cls=vec_env_cls)
    wrapping: dict[str, Any] = dict(wrapper_class=LatentSteeringWrapper, wrapper_kwargs=dict(flow=str(folder)))
    wrapped = make_vec_env("Pendulum-v1", 2, seed=0, **wrapping, vec_env_cls=vec_env_cls)
    np.testing.assert_array_equal(registered.reset(), wrapped.reset())
    w = np.full((2, 4, 1), 0.5, np.float32)
    for ours, theirs in zip(registered.step(w)[:3], wrapped.step(w)[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    registered.close()
    wrapped.close()


def test_one_copy_of_the_weights_for_all_who_name_the_folder(folder: Path) -> None:
    first = resolve_flow(folder)
    assert resolve_flow(str(folder) + "/") is first and resolve_flow(first) is first
    assert resolve_flow(folder, shared=False) is not first
    tiny_flow(3, 1, seed=1).save_pretrained(folder)  # other files: another policy
    assert resolve_flow(folder).fingerprint() != first.fingerprint()
    before = first.fingerprint()
    del first
    gc.collect()
    tiny_flow(3, 1, env_id="Pendulum-v1").save_pretrained(folder)
    assert resolve_flow(folder).fingerprint() == before


def test_stage_0_and_1_take_folders_and_leave_them_alone(tmp_path: Path) -> None:
    demos = random_demos()
    sizes: dict[str, Any] = dict(**SMALL, pred_horizon=4, act_horizon=2, n_iterations=2, device="cpu")
    folder = tmp_path / "flow"
    train_flow(demos, seed=0, **sizes).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shared = resolve_flow(folder)
    transitions = demo_transitions(folder, demos, ignore_terminations=True)
    critic = train_critic(folder, transitions, n_iterations=2, batch_size=4)
    assert critic.updates == 2 and shared.critic is not None and shared.critic.updates == 0
    more = train_flow(demos, folder, n_iterations=2, batch_size=4, device="cpu")
    assert more.fingerprint() != shared.fingerprint() == resolve_flow(folder).fingerprint()
    more.critic = critic
    more.save_pretrained(tmp_path / "with critic")
    latent = pretrain_latent(tmp_path / "with critic", demos, n_iterations=2, pool_size=None)
    assert SteeredPolicy(tmp_path / "with critic", latent).flow.fingerprint() == more.fingerprint()
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_no_flow() -> None:
    with pytest.raises(TypeError, match=r"flow must be a FlowPolicy or .*, or the folder of one, found int"):
        LatentSteeringWrapper(scripted(), 42)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"/nowhere/at/all is neither a folder written by FlowPolicy.save_pretrained"):
        make_latent_env("Pendulum-v1", "/nowhere/at/all")
