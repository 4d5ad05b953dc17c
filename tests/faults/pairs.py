"""Flow, demos, env and model that do not fit each other, pair by pair."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import FlowPolicy, LatentSteeringWrapper, collect_rollouts, evaluate, load_demos, ppo_kwargs, pretrain_latent
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import demo_transitions
from sb3_dsrl.stage0.flow_matching import train_flow
from tests.demo_files import scripted_episode, write_demos
from tests.envs import scripted, tiny_flow, vec_steered
from tests.faults.case import Case

Play = Callable[[Path], Any]
ABOUT = dict(env_id="PushCube-v1", control_mode="pd_joint_delta_pos")
OTHER_FLOW = r"Action spaces do not match: NoiseSpace\(.*flow_hash='(\w+)'.*!= NoiseSpace\(.*flow_hash='(?!\1)"


def demos(folder: Path, obs_dim: int = 3, action_dim: int = 2, **about: Any) -> Demos:
    path = folder / "demos.h5"
    return load_demos(write_demos(path, [scripted_episode(6, obs_dim, action_dim)], **about))


def flow_and_demos(flow: dict[str, Any] | None = None, **about: Any) -> Play:
    return lambda folder: demo_transitions(tiny_flow(**(ABOUT | (flow or {}))), demos(folder, **about))


def flow_and_env(flow: dict[str, Any], **env: Any) -> Play:
    return lambda folder: LatentSteeringWrapper(Named(scripted(**env)), tiny_flow(**(ABOUT | flow)))


class Named(gym.Wrapper):
    """An env with an id and a control mode, as ManiSkill's have."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        env.unwrapped.spec = gym.envs.registration.EnvSpec("PushCube-v1")
        env.unwrapped.control_mode = "pd_joint_delta_pos"  # type: ignore[attr-defined]


class Pixels(gym.ObservationWrapper):
    """The same env with images."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict(state=env.observation_space, rgb=spaces.Box(0, 255, (2, 2, 3), np.uint8))

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"state": observation, "rgb": np.zeros((2, 2, 3), np.uint8)}


def env(seed: int = 0, **kwargs: Any) -> VecEnv:
    return vec_steered(tiny_flow(seed=seed), [scripted()], **kwargs)


def model(on: VecEnv, **kwargs: Any) -> PPO:
    return PPO("LatentPolicy", on, **ppo_kwargs(on, n_steps=4, batch_size=4, policy_kwargs=dict(net_arch=[8])) | kwargs)


def saved_model(load: Callable[[Path], Any]) -> Play:
    def play(folder: Path) -> None:
        model(env()).save(folder / "model.zip")
        load(folder / "model.zip")

    return play


def pretrained(flow: dict[str, Any], rollouts: bool, **about: Any) -> Play:
    """Stage 1 of a model with demos of something else, with and without rollouts."""

    def play(folder: Path) -> None:
        venv = vec_steered(tiny_flow(**(ABOUT | flow)), [scripted(**({"time_limit": 9}))])
        found = collect_rollouts("prior", venv, 1) if rollouts else None
        pretrain_latent(model(venv), demos(folder, **about), found, weighting="candidates", n_iterations=1)

    return play


def rollouts_of(seed: int, **kwargs: Any) -> Play:
    def play(folder: Path) -> None:
        rollouts = collect_rollouts("prior", vec_steered(tiny_flow(seed=seed), [scripted(time_limit=9)], **kwargs), 1)
        pretrain_latent(tiny_flow(), rollouts=rollouts, weighting="candidates", n_iterations=1)

    return play


def warm_start(folder: Path) -> None:
    flow: FlowPolicy = tiny_flow(**ABOUT)
    pretrain_latent(model(vec_steered(flow, [scripted()], gamma=0.9)), demos(folder), warm_start_value=True)


def with_env(other: Callable[[], VecEnv]) -> Play:
    return lambda folder: model(env()).set_env(other())


def demos_in_env(folder: Path, flow_kwargs: dict[str, Any], **about: Any) -> None:
    """A flow that is trained on demos takes what they are with it to the env."""
    flow = train_flow(demos(folder, **about), pred_horizon=4, act_horizon=2, n_iterations=1, batch_size=4)
    LatentSteeringWrapper(Named(scripted(**flow_kwargs)), flow)


CASES = [
    Case(
        "flow and demos: obs_mode",
        flow_and_demos(dict(obs_mode="rgb")),
        r"demos.h5 does not fit the flow: obs_mode is 'state' in the demos, 'rgb' in the flow",
    ),
    Case(
        "flow and demos: D",
        flow_and_demos(obs_dim=4),
        r"demos.h5 does not fit the flow: the shape of an observation is \(4,\) in the demos, \(3,\) in the flow",
    ),
    Case(
        "flow and demos: A",
        flow_and_demos(action_dim=3),
        r"demos.h5 does not fit the flow: action dimensions is 3 in the demos, 2 in the flow",
    ),
    Case(
        "flow and demos: control mode",
        flow_and_demos(dict(control_mode="pd_ee_delta_pose")),
        r"control_mode is 'pd_joint_delta_pos' in the demos, 'pd_ee_delta_pose' in the flow",
    ),
    Case(
        "flow and demos: env id",
        flow_and_demos(env_id="PickCube-v1"),
        r"env_id is 'PickCube-v1' in the demos, 'PushCube-v1' in the flow",
    ),
    Case("flow and env: obs_mode", lambda folder: LatentSteeringWrapper(Pixels(scripted()), tiny_flow()), r"its observations"),
    Case(
        "flow and env: D",
        flow_and_env({}, obs_dim=4),
        r"its observations have shape \(obs_horizon, ...\) = \(2, 4\), but the flow's are \(2, 3\)",
    ),
    Case(
        "flow and env: A",
        flow_and_env({}, action_dim=3),
        r"its chunks have shape \(H, A\) = \(3, 3\), but the flow's are \(3, 2\)",
    ),
    Case(
        "flow and env: control mode",
        flow_and_env(dict(control_mode="pd_ee_delta_pose")),
        r"The env has control_mode='pd_joint_delta_pos', but the flow's actions are for 'pd_ee_delta_pose'",
    ),
    Case(
        "flow and env: env id",
        flow_and_env(dict(env_id="PickCube-v1")),
        r"The flow was trained on PickCube-v1, but the env is PushCube-v1; if that is meant, pass allow_other_task=True",
    ),
    Case(
        "flow and chunk env: gamma",
        lambda folder: LatentSteeringWrapper(
            LatentSteeringWrapper(scripted(), tiny_flow(), gamma=0.9).env, tiny_flow(), gamma=0.99
        ),
        r"gamma=0.99 was asked for, but the ActionChunkWrapper below has 0.9",
    ),
    Case("flow's critic and env: gamma", warm_start, r"The env has gamma=0.9, but the critic that warm_start_value uses has"),
    Case(
        "flow and rollouts: gamma", rollouts_of(0, gamma=0.9), r"The rollouts have gamma=0.9, but the flow's critic has 0.99"
    ),
    Case("flow and rollouts: another flow", rollouts_of(1), r"The rollouts have flow='\w+', but the flow has '\w+'"),
    Case("flow and PPO.load: another flow", saved_model(lambda path: PPO.load(path, env=env(1))), OTHER_FLOW),
    Case("flow and set_env: another flow", with_env(lambda: env(1)), OTHER_FLOW),
    Case(
        "flow and evaluated model: another flow",
        saved_model(lambda path: evaluate(PPO.load(path), env(1), 1)),
        r"The model has flow='\w+', but the env has '\w+'",
    ),
    Case(
        "flow and evaluated flow: another flow",
        lambda folder: evaluate(tiny_flow(seed=1), env(), 1),
        r"The env steers flow \w+, but the flow to play is \w+",
    ),
    Case(
        "flow and stage 1: another flow",
        lambda folder: model(env()).policy.copy_into(model(env(1))),
        r"The policy has flow='\w+', but the model's env has '\w+'",
    ),
    Case(
        "flow and stage 1: other entries of the noise",
        lambda folder: model(env(steer_mode="act_horizon")).policy.copy_into(model(env())),
        "The policy has steer_mode='act_horizon', but the model's env has 'full'",
    ),
    Case(
        "demos and env, by the flow: control mode",
        lambda folder: demos_in_env(folder, {}, control_mode="pd_ee_delta_pose"),
        r"The env has control_mode='pd_joint_delta_pos', but the flow's actions are for 'pd_ee_delta_pose'",
    ),
    Case(
        "demos and env, by the flow: env id",
        lambda folder: demos_in_env(folder, {}, env_id="PickCube-v1"),
        r"The flow was trained on PickCube-v1, but the env is PushCube-v1",
    ),
    Case("demos and env, by the flow: A", lambda folder: demos_in_env(folder, dict(action_dim=3)), r"its chunks have shape"),
    Case(
        "demos and env, by the flow: D", lambda folder: demos_in_env(folder, dict(obs_dim=5)), r"its observations have shape"
    ),
    *(
        Case(f"demos and model: {name}{', rollouts given' if rollouts else ''}", pretrained({}, rollouts, **about), sentence)
        for rollouts in (False, True)
        for name, about, sentence in (
            ("env id", dict(env_id="PickCube-v1"), r"env_id is 'PickCube-v1' in the demos, 'PushCube-v1' in the flow"),
            ("control mode", dict(control_mode="pd_ee_pose"), r"control_mode is 'pd_ee_pose' in the demos"),
            ("A", dict(action_dim=3), r"action dimensions is 3 in the demos, 2 in the flow"),
            ("D", dict(obs_dim=4), r"the shape of an observation is \(4,\) in the demos"),
        )
    ),
    Case(
        "env and PPO.load: gamma",
        saved_model(lambda path: PPO.load(path, env=env(gamma=0.9))),
        r"Action spaces do not match: NoiseSpace\(.*gamma=0.99.*!= NoiseSpace\(.*gamma=0.9",
    ),
    Case("env and PPO.load: noise_bound", saved_model(lambda path: PPO.load(path, env=env(noise_bound=2))), "do not match"),
    Case(
        "env and stage 1: gamma",
        lambda folder: model(env()).policy.copy_into(model(env(gamma=0.9))),
        r"The policy has gamma=0.99, but the model's env has 0.9",
    ),
    Case(
        "env and PPO: gamma",
        lambda folder: model(env(), gamma=0.99).learn(1),
        r"PPO discounts with gamma=0.99 per macro-step, but the env's macro-step discount is 0.970299: pass gamma=env.macro",
        UserWarning,
    ),
    Case(
        "env and model: not steered",
        lambda folder: pretrain_latent(PPO("LatentPolicy", gym.make("Pendulum-v1")), rollouts=object()),  # type: ignore[arg-type]
        r"is not steered: wrap it in LatentSteeringWrapper or VecLatentSteering, or use make_latent_env",
    ),
    Case(
        "model with another policy",
        lambda folder: pretrain_latent(PPO("MlpPolicy", env()), rollouts=object()),  # type: ignore[arg-type]
        r"Stage 1 expects a model with 'LatentPolicy', found ActorCriticPolicy",
    ),
]
