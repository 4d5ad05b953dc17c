"""
Every form of the steered env against one slow reference: plain loops over env steps, one env after the other.

The scripts end episodes at awkward times: in mid-chunk, at its end, in its first step, by time limits inside a chunk and
at its end, by a termination after a time limit in the same chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers the envs
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import ActionChunkWrapper, FlowPolicy, LatentSteeringWrapper, VecLatentSteering, ppo_kwargs
from sb3_dsrl.envs.ray_workers import RayWorker
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import ProcessWorker, WorkerSettings
from sb3_dsrl.policies.diffusion import DiffusionPolicy
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.lockstep import LockstepVecEnv
from tests.envs import BatchedScriptedEnv, ScriptedEnv, gym_steered, scripted, tiny_flow, vec_steered
from tests.vector_sims import ScriptedEnvPool, TorchVectorEnv

GAMMA = 0.9
Script = tuple[int | None, tuple[int, ...]]
#: Time limit and the steps at which the episodes terminate, for each of five envs.
SCRIPTS: list[Script] = [
    (None, (5, 24, 2)),
    (10, (1000,)),
    (10, (11, 7, 1000, 12)),
    (9, (1000, 1, 9)),
    (None, (3, 4, 6, 16)),
]


def envs_of(scripts: list[Script]) -> list[gym.Env]:
    return [scripted(limit, episode_lengths=lengths, success_steps=(2, 7, 9, 10, 24)) for limit, lengths in scripts]


def env_fns(scripts: list[Script], flow: FlowPolicy, **chunk_kwargs: Any) -> list[Callable[[], gym.Env]]:
    def make(script: Script) -> gym.Env:
        return ActionChunkWrapper(envs_of([script])[0], flow.act_horizon, flow.obs_horizon, **chunk_kwargs)

    return [lambda script=script: make(script) for script in scripts]


def with_workers(worker: type) -> Callable[..., VecEnv]:
    def make(flow: FlowPolicy, scripts: list[Script], residual_scale: float = 0.0, **chunk_kwargs: Any) -> VecEnv:
        workers = WorkerVecEnv(env_fns(scripts, flow, **chunk_kwargs), WorkerSettings(2, worker=worker))
        return VecLatentSteering(workers, flow, residual_scale=residual_scale)

    return make


def on(make_simulator: Callable[[list[Script]], Any]) -> Callable[..., VecEnv]:
    def make(flow: FlowPolicy, scripts: list[Script], residual_scale: float = 0.0, **chunk_kwargs: Any) -> VecEnv:
        simulator = BatchedChunkEnv(make_simulator(scripts), flow.act_horizon, flow.obs_horizon, **chunk_kwargs)
        return VecLatentSteering(simulator, flow, residual_scale=residual_scale)

    return make


def vectorised(vector_class: type, scripts: list[Script]) -> gym.vector.VectorEnv:
    return vector_class([lambda script=script: envs_of([script])[0] for script in scripts], autoreset_mode="Disabled")


class Together(gym.Wrapper):
    """An env that takes its steps together with others."""

    works = True

    def together(self, envs: list[gym.Env]) -> "Together":
        self.envs = envs
        return self

    def begin(self) -> None:
        """Nothing to prepare."""

    def end(self) -> None:
        """Nothing to let go of."""

    def step(self, actions: Any, observing: bool = True) -> Any:
        if isinstance(actions, dict):
            return {i: self.envs[i].env.step(action) for i, action in actions.items()}  # type: ignore[attr-defined]
        raise AssertionError("this env is not stepped alone")


def side_by_side(flow: FlowPolicy, scripts: list[Script], residual_scale: float = 0.0, **chunk_kwargs: Any) -> VecEnv:
    def make(script: Script) -> gym.Env:
        return ActionChunkWrapper(Together(envs_of([script])[0]), flow.act_horizon, flow.obs_horizon, **chunk_kwargs)

    together = LockstepVecEnv([lambda script=script: make(script) for script in scripts])
    return VecLatentSteering(together, flow, residual_scale=residual_scale)


#: ``make(flow, scripts, **chunk_kwargs)``
FORMS: dict[str, Callable[..., VecEnv]] = {
    "gym form": lambda flow, scripts, **kwargs: gym_steered(flow, envs_of(scripts), **kwargs),
    "vec form": lambda flow, scripts, **kwargs: vec_steered(flow, envs_of(scripts), **kwargs),
    "side by side": side_by_side,
    "worker processes": with_workers(ProcessWorker),
    "Ray actors": with_workers(RayWorker),
    "batched": on(lambda scripts: BatchedScriptedEnv(envs_of(scripts))),
    "SyncVectorEnv": on(lambda scripts: vectorised(gym.vector.SyncVectorEnv, scripts)),
    "AsyncVectorEnv": on(lambda scripts: vectorised(gym.vector.AsyncVectorEnv, scripts)),
    "torch vector env": on(lambda scripts: TorchVectorEnv(vectorised(gym.vector.SyncVectorEnv, scripts))),
    "EnvPool's interface": on(lambda scripts: ScriptedEnvPool(envs_of(scripts))),
}
#: These cut chunks at time limits.
CUTTING = {"EnvPool's interface"}


@dataclass
class Expected:
    """What a macro-step of one env must be."""

    obs: np.ndarray
    reward: float
    done: bool
    info: dict[str, Any]
    terminal: np.ndarray | None


class Reference:
    """One env, stepped in the plainest way: no wrapper of ours, no wrapper of gymnasium's; time limits are counted here."""

    def __init__(self, script: Script, flow: FlowPolicy, gamma: float, cut: bool = False, **settings: Any) -> None:
        settings = dict(ignore_terminations=False, reward_scale=1.0, residual_scale=0.0) | settings
        self.ignore, self.scale, self.residual_scale = settings.values()
        self.cut = cut
        self.limit, lengths = script
        self.env = ScriptedEnv(episode_lengths=lengths, success_steps=(2, 7, 9, 10, 24))
        self.flow, self.gamma = flow, gamma

    def features(self) -> np.ndarray:
        return self.flow.encode(np.stack(self.frames[-self.flow.obs_horizon :])[None])[0].numpy()

    def reset(self) -> np.ndarray:
        self.frames = [self.env.reset()[0].copy()] * self.flow.obs_horizon
        self.rewards: list[float] = []
        self.macro_rewards: list[float] = []
        self.successes: list[bool] = []
        return self.features()

    def step(self, w: np.ndarray) -> Expected:
        w, residual = np.split(w, [self.flow.pred_horizon])
        chunk = self.flow.decode(th.tensor(self.features()[None]), th.tensor(w[None]))[0, : self.flow.act_horizon].numpy()
        chunk = np.clip(chunk + self.residual_scale * residual, -1, 1) if self.residual_scale else chunk
        k, reward, terminated, truncated = 0, 0.0, False, False
        for action in chunk:
            obs, r, ended, _, info = self.env.step(action)
            self.frames.append(obs.copy())
            self.rewards.append(r)
            self.successes.append(info["success"])
            reward += self.scale * self.gamma**k * r
            k += 1
            if ended and not self.ignore:
                terminated = True
                break
            if self.limit is not None and len(self.rewards) >= self.limit:
                truncated = True
                if self.cut:
                    break
        self.macro_rewards.append(reward)
        counted = slice(0, self.limit)  # metrics stop at the time limit
        info = {
            "chunk_length": k,
            "TimeLimit.truncated": truncated and not terminated,
            "is_success": self.successes[counted][-1],
            "action_chunk": chunk,
            # the simulator's own: of the last step that was executed, also beyond a time limit
            "success": self.successes[-1],
            "elapsed_steps": len(self.rewards),
            "gripper": dict(at=self.frames[-1][:2]),
            "scene": "flat",
        }
        terminal = None
        if terminated or truncated:
            info["success_at_end"] = self.successes[counted][-1]
            info["success_once"] = any(self.successes[counted])
            info["episode_return"] = sum(self.rewards[counted])
            info["episode_length"] = len(self.rewards[counted])
            info["episode"] = {"r": sum(self.macro_rewards), "l": len(self.macro_rewards)}
            terminal = self.features()
            self.reset()
        return Expected(self.features(), reward, terminated or truncated, info, terminal)


def check_info(found: dict[str, Any], expected: dict[str, Any], atol: float, where: str = "") -> None:
    """What is expected is there, in nested dicts as well; beside ``t``, its time, ``episode`` is exact."""
    for key, value in expected.items():
        if isinstance(value, dict):
            check_info(found[key], value, max(atol, 1e-3) if key == "episode" else atol, f"{where}: {key}")
        elif isinstance(value, str):
            assert found[key] == value, where
        else:
            assert not isinstance(value, np.ndarray) or type(found[key]) is np.ndarray, where
            np.testing.assert_allclose(found[key], value, atol=atol, err_msg=f"{where}: {key}")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def noises(n: int, env: VecEnv) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, env.num_envs, *env.action_space.shape)).astype(np.float32).clip(-4, 4)


@pytest.mark.parametrize(
    ("policy_class", "act_horizon", "chunk_kwargs"),
    [
        (FlowPolicy, 1, {}),
        (FlowPolicy, 3, {}),
        (FlowPolicy, 8, {}),
        (FlowPolicy, 3, dict(ignore_terminations=True, reward_scale=0.5)),
        (FlowPolicy, 3, dict(residual_scale=0.5)),
        (DiffusionPolicy, 3, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_transitions(form: str, policy_class: type[FlowPolicy], act_horizon: int, chunk_kwargs: dict[str, Any]) -> None:
    # the first step of DDIM divides by the square root of a small alpha, and rounding depends on the batch
    atol = 1e-4 if policy_class is FlowPolicy else 2e-3
    flow = tiny_flow(pred_horizon=8, act_horizon=act_horizon, obs_horizon=3, policy_class=policy_class)
    cut = form in CUTTING
    if cut and "ignore_terminations" in chunk_kwargs:
        with pytest.raises(ValueError, match="ignore_terminations=True needs a simulator that can be stepped past"):
            FORMS[form](flow, SCRIPTS, gamma=GAMMA, **chunk_kwargs)
        return
    env = FORMS[form](flow, SCRIPTS, gamma=GAMMA, **chunk_kwargs)
    references = [Reference(script, flow, GAMMA, cut=cut, **chunk_kwargs) for script in SCRIPTS]
    try:
        obs = env.reset()
        kept, copies, ended = [obs], [obs.copy()], 0
        np.testing.assert_allclose(obs, [reference.reset() for reference in references], atol=1e-5)
        for t, w in enumerate(noises(40, env)):
            obs, rewards, dones, infos = env.step(w)
            assert isinstance(obs, np.ndarray) and isinstance(rewards, np.ndarray) and dones.dtype == bool
            for i, reference in enumerate(references):
                where = f"env {i}, macro-step {t}"
                expected = reference.step(w[i])
                np.testing.assert_allclose(obs[i], expected.obs, atol=atol, err_msg=where)
                assert rewards[i] == pytest.approx(expected.reward, abs=atol), where
                assert dones[i] == expected.done, where
                check_info(infos[i], expected.info, atol, where)
                ours = {"TimeLimit.truncated", "terminal_observation"} if expected.done else set()
                assert infos[i].keys() == expected.info.keys() | ours, where
                assert ("terminal_observation" in infos[i]) == expected.done, where
                if expected.done:
                    ended += 1
                    np.testing.assert_allclose(infos[i]["terminal_observation"], expected.terminal, atol=atol, err_msg=where)
                else:
                    assert not {"episode", "success_at_end"} & infos[i].keys(), where
            kept.append(obs)
            copies.append(obs.copy())
        assert ended >= 5
        np.testing.assert_array_equal(kept, copies)  # nothing that was handed out changes afterwards
    finally:
        env.close()


def test_ppo_learns(form: str) -> None:
    flow = tiny_flow()
    env = FORMS[form](flow, SCRIPTS, gamma=GAMMA)
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=10, n_epochs=1))
    model.learn(40)
    assert model.num_timesteps == 40
    assert env.get_attr("env_id") == [None] * 5 and env.get_attr("gamma", [1, 3]) == [GAMMA] * 2
    env.close()


# ----------------------------------------------------------------------------------------- batched ManiSkill on the CPU


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[VecEnv, LatentSteeringWrapper]]:
    """A ManiSkill env as a batched simulator with num_envs = 1, and the same env in the gym form."""
    flow = tiny_flow(35, 8, pred_horizon=4, act_horizon=4, env_id="PushCube-v1", control_mode="pd_joint_delta_pos")

    def make() -> gym.Env:
        return gym.make(
            "PushCube-v1",
            num_envs=1,
            obs_mode="state",
            control_mode="pd_joint_delta_pos",
            reward_mode="normalized_dense",
            sim_backend="physx_cpu",
            render_backend="none",
            max_episode_steps=10,
        )

    ours = VecLatentSteering(BatchedChunkEnv(make(), 4, 2, GAMMA, ignore_terminations=True), flow)
    single = LatentSteeringWrapper(make(), flow, GAMMA, ignore_terminations=True)
    yield ours, single
    ours.close()
    single.close()


def test_batched_maniskill_equals_the_gym_form(pair: tuple[VecEnv, LatentSteeringWrapper]) -> None:
    env, single = pair
    for seed in (3, 4):
        env.seed(seed)
        obs, (other, info) = env.reset(), single.reset(seed=seed)
        np.testing.assert_allclose(obs[0], other, atol=1e-5)
        assert env.venv.reset_infos[0].keys() == info.keys()  # type: ignore[attr-defined]
        for t, w in enumerate(noises(3, env)):
            obs, rewards, dones, infos = env.step(w)
            other, reward, terminated, truncated, info = single.step(w[0])
            assert dones[0] == (terminated or truncated) == (t == 2)
            after = infos[0]["terminal_observation"] if dones[0] else obs[0]
            np.testing.assert_allclose(after, other, atol=1e-5)
            assert rewards[0] == pytest.approx(reward, abs=1e-5)
            added = {"TimeLimit.truncated", "terminal_observation"} if dones[0] else {"TimeLimit.truncated"}
            assert infos[0].keys() == info.keys() | added and {"elapsed_steps", "success"} <= info.keys()
            for key in info.keys() - {"episode"}:
                np.testing.assert_allclose(infos[0][key], info[key], atol=1e-5, err_msg=key)
        assert infos[0]["episode_length"] == 10 and infos[0]["success_at_end"] is False


def test_batched_maniskill_seeds_every_episode(pair: tuple[VecEnv, LatentSteeringWrapper]) -> None:
    """Same seed, same episodes, also after the resets at the end of episodes, whatever torch's global generator does."""
    env, _ = pair
    runs = []
    for seed, draws in ((5, 0), (5, 3), (6, 0)):
        env.seed(seed)
        rows = [env.reset()]
        for w in np.zeros((7, 1, 4, 8), np.float32):
            th.randn(draws)
            rows.append(env.step(w)[0])
        runs.append(np.stack(rows))
    np.testing.assert_array_equal(runs[0], runs[1])
    starts = runs[0][[0, 3, 6]]
    assert not np.allclose(runs[0], runs[2])
    assert not np.allclose(starts[0], starts[1]) and not np.allclose(starts[1], starts[2])


def test_batched_refusals() -> None:
    with pytest.raises(ValueError, match="found ScriptedEnv without single_action_space; for one env use ActionChunkWrapper"):
        BatchedChunkEnv(ScriptedEnv(), 3)
    env = BatchedChunkEnv(BatchedScriptedEnv([ScriptedEnv(), ScriptedEnv()]), 3)
    env.reset()
    with pytest.raises(ValueError, match=r"Chunks must have shape \(N, H, A\) = \(2, 3, 2\), found \(2, 4, 2\)"):
        env.step(np.zeros((2, 4, 2), np.float32))
    with pytest.raises(ValueError, match=r"env_method\('reset'\) was asked for envs \[0\], but the envs .* are one object"):
        env.env_method("reset", indices=[0])
    with pytest.raises(ValueError, match="act_horizon and obs_horizon must be at least 1, found 0 and 1"):
        BatchedChunkEnv(BatchedScriptedEnv([ScriptedEnv()]), 0)
    with pytest.raises(AttributeError):
        env.get_attr("no_such_thing")


@pytest.mark.parametrize("kind", ["workers", "batched", "SyncVectorEnv", "EnvPool's interface"])
def test_dict_observations(kind: str) -> None:
    """Frames of every key are stacked, integers stay integers."""

    class Images(gym.ObservationWrapper):
        def __init__(self, env: gym.Env) -> None:
            super().__init__(env)
            pixels = gym.spaces.Box(0, 255, (2, 2, 3), np.uint8)
            self.observation_space = gym.spaces.Dict(state=env.observation_space, rgb=pixels)

        def observation(self, obs: np.ndarray) -> dict[str, np.ndarray]:
            return {"state": obs, "rgb": np.full((2, 2, 3), int(100 + 50 * obs[0]), np.uint8)}

    def make() -> gym.Env:
        return Images(ScriptedEnv(episode_lengths=(4, 100)))

    chunk = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3, 2)).astype(np.float32)
    single = ActionChunkWrapper(make(), 3, 2)
    if kind == "workers":
        env: VecEnv = WorkerVecEnv([lambda: ActionChunkWrapper(make(), 3, 2)] * 2, WorkerSettings(1))
    elif kind == "SyncVectorEnv":
        env = BatchedChunkEnv(gym.vector.SyncVectorEnv([make, make], autoreset_mode="Disabled"), 3, 2)
    else:
        simulator = BatchedScriptedEnv if kind == "batched" else ScriptedEnvPool
        env = BatchedChunkEnv(simulator([make(), make()]), 3, 2)
    assert env.observation_space == single.observation_space
    assert single.observation_space["rgb"].shape == (2, 2, 2, 3) and single.observation_space["rgb"].dtype == np.uint8
    rows = [(env.reset(), single.reset()[0])]
    for actions in chunk:
        obs, _, dones, _ = env.step(actions)
        after, _, terminated, _, _ = single.step(actions[1])
        rows.append((obs, single.reset()[0] if terminated else after))
        assert dones[1] == terminated
    for ours, theirs in rows:
        for key in ("state", "rgb"):
            np.testing.assert_allclose(np.asarray(ours[key][1]), theirs[key], atol=1e-5)
    env.close()
