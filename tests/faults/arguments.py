"""Arguments out of range."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO, SAC

from sb3_dsrl import (
    ActionChunkWrapper,
    LatentSAC,
    LatentSteeringWrapper,
    make_latent_env,
    ppo_kwargs,
    sac_kwargs,
    search_noise,
    train_flow,
)
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import WorkerSettings
from tests.demo_files import scripted_episode, write_demos
from tests.envs import RestorableEnv, numbered, scripted, tiny_flow, vec_steered
from tests.faults.case import Case
from tests.stage0 import random_demos

Play = Callable[[Path], Any]


def steered(**kwargs: Any) -> Play:
    return lambda folder: LatentSteeringWrapper(scripted(), tiny_flow(), **kwargs)


def policy(**policy_kwargs: Any) -> Play:
    def play(folder: Path) -> None:
        env = vec_steered(tiny_flow(), [scripted()])
        PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=policy_kwargs))

    return play


def trained(**kwargs: Any) -> Play:
    def play(folder: Path) -> None:
        demos = write_demos(folder / "demos.h5", [scripted_episode(6)])
        train_flow(demos, **(dict(pred_horizon=4, act_horizon=2, n_iterations=1, batch_size=4) | kwargs))

    return play


def pushcube(env_id: str = "PushCube-v1", **kwargs: Any) -> Play:
    sizes = dict(pred_horizon=4, act_horizon=4, env_id=None, control_mode="pd_joint_delta_pos")
    return lambda folder: make_latent_env(env_id, tiny_flow(35, 8, **sizes), **kwargs).close()


def searching(**kwargs: Any) -> Play:
    return lambda folder: search_noise(vec_steered(tiny_flow(), [RestorableEnv()]), tiny_flow(), 1, **kwargs)


class Unbounded(gym.Wrapper):
    """An env whose actions are not bounded."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(-np.inf, np.inf, env.action_space.shape)


def sac_on_unbounded_noise(folder: Path) -> None:
    SAC("MlpPolicy", LatentSteeringWrapper(scripted(), tiny_flow(), noise_bound=np.inf))


def latent_sac(**kwargs: Any) -> Play:
    def play(folder: Path) -> None:
        env = vec_steered(tiny_flow(), [scripted()])
        LatentSAC("LatentPolicy", env, **sac_kwargs(env, **(dict(buffer_size=10) | kwargs)))

    return play


CASES = [
    Case("act_horizon > pred_horizon", lambda folder: tiny_flow(act_horizon=5), r"act_horizon must lie in 1..4 \(pred_hor"),
    Case(
        "act_horizon > pred_horizon - action_offset",
        lambda folder: tiny_flow(act_horizon=4, action_offset=1),
        r"act_horizon must lie in 1..3 \(pred_horizon - action_offset\), found 4",
    ),
    Case("act_horizon 0", lambda folder: tiny_flow(act_horizon=0), r"act_horizon must lie in 1..4"),
    Case("act_horizon > pred_horizon in train_flow", trained(act_horizon=5), r"act_horizon must lie in 1..4 \(pred_horizon"),
    Case("flow with negative gamma", lambda folder: tiny_flow(gamma=-0.9), r"gamma .* must lie in \(0, 1\], found -0.9"),
    Case("negative gamma in train_flow", trained(gamma=-1.0), r"gamma .* must lie in \(0, 1\], found -1.0"),
    *(
        Case(f"env with gamma {gamma}", steered(gamma=gamma), rf"gamma .* must lie in \(0, 1\], found {gamma}")
        for gamma in (-0.9, 0.0, 1.01, float("nan"))
    ),
    *(
        Case(f"noise_bound {bound}", steered(noise_bound=bound), rf"noise_bound must be positive and finite, found {bound}")
        for bound in (0, -1.0, float("nan"))
    ),
    *(
        Case(f"residual_scale {scale}", steered(residual_scale=scale), rf"residual_scale must be 0 or .*, found {scale}")
        for scale in (-0.1, float("nan"), float("inf"))
    ),
    Case("unknown critic of LatentSAC", latent_sac(critic="q"), "critic must be one of 'noise', 'action', 'distilled'"),
    Case(
        "demos for a critic on noise",
        latent_sac(critic="noise", demos=random_demos()),
        "demos hold actions, not the noise that leads to them",
    ),
    Case("bound of a fixed alpha", latent_sac(max_ent_coef=0.1), "max_ent_coef bounds an ent_coef of 'auto', but it is fixed"),
    Case("SAC on unbounded noise", sac_on_unbounded_noise, "noise_bound must be positive and finite, found inf"),
    Case(
        "env with an unbounded action space",
        lambda folder: LatentSteeringWrapper(Unbounded(scripted()), tiny_flow()),
        r"A chunk env needs a bounded Box of shape \(A,\) as action space, found Box\(-inf, inf",
    ),
    Case(
        "env with discrete actions",
        lambda folder: ActionChunkWrapper(gym.make("CartPole-v1"), 2),
        r"A chunk env needs a bounded Box of shape \(A,\) as action space, found Discrete\(2\)",
    ),
    *(
        Case(f"prior_mix {value}", policy(prior_mix=value), rf"prior_mix must lie in \[0, 1\], found {value}")
        for value in (-0.1, 1.1, float("nan"))
    ),
    Case("prior_mix_decay 2", policy(prior_mix_decay=2.0), r"prior_mix_decay must lie in \[0, 1\], found 2.0"),
    Case("value_lr 0", policy(value_lr=0.0), "value_lr must be positive, found 0.0"),
    Case("std 0", policy(log_std_init=float("-inf")), "log_std_init must be finite, found -inf: a std is positive"),
    Case(
        "search in an env that cannot go back",
        lambda folder: search_noise(vec_steered(tiny_flow(), [scripted()]), tiny_flow(), 1),
        r"cannot go back to a state: it needs the methods get_sim_state\(\) and set_sim_state\(state\)",
    ),
    Case(
        "search in an env with a residual",
        lambda folder: search_noise(steered(residual_scale=0.1)(folder), tiny_flow(), 1),
        "tries noise alone, but the env has residual_scale=0.1: make one without",
    ),
    Case("search with one noise", searching(n_candidates=1), "n_candidates must be at least 2, found 1"),
    Case("search without a horizon", searching(horizon=0), "horizon must be at least 1 macro-step, found 0"),
    Case(
        "std of a residual that is not there",
        policy(residual_log_std_init=-1.0),
        "residual_log_std_init=-1.0 was given, but the env has no residual: make it with residual_scale=",
    ),
    Case("unknown steer_mode", steered(steer_mode="half"), "must be 'full', 'act_horizon' or 'shared', found 'half'"),
    Case("num_steps 0", steered(num_steps=0), "num_steps must be at least 1, found 0"),
    Case(
        "noise of another shape", lambda folder: step(np.zeros((5, 2))), r"Noise must have shape .*\(1, 4, 2\), found \(1, 5"
    ),
    Case("no iterations of stage 0", trained(n_iterations=0), "stage 0: flow: n_iterations must be at least 1, found 0"),
    Case("no env", lambda folder: WorkerVecEnv([]), "WorkerVecEnv needs at least one env"),
    Case("no workers", lambda folder: numbered(1, 0), "n_workers must be at least 1, found 0"),
    Case(
        "unknown on_failure", lambda folder: numbered(1, 1, on_failure="ignore"), "on_failure must be 'raise' or 'restart', f"
    ),
    Case("timeout 0", lambda folder: numbered(1, 1, timeout=0.0), "timeout is in seconds and must be positive, found 0.0"),
    Case("unknown env id", pushcube("PushCub-v1"), "'PushCub-v1' is not a ManiSkill environment; did you mean PushCube-v1"),
    Case("id of no module", pushcube("none:Pendulum-v1"), "'none:Pendulum-v1' cannot be made: No module named 'none'"),
    Case(
        "argument of ManiSkill for another env",
        pushcube("Pendulum-v1", sim_backend="gpu"),
        r"'Pendulum-v1' is not ManiSkill's, and does not know sim_backend; .*env_kwargs=dict\(...\)",
    ),
    Case(
        "argument of gymnasium's envs for ManiSkill",
        pushcube(env_kwargs={}, success_key="done"),
        "'PushCube-v1' is ManiSkill's, and does not know env_kwargs, success_key; .*arguments of gym.make directly",
    ),
    Case(
        "argument that the env does not know",
        pushcube("Pendulum-v1", env_kwargs=dict(gravity=3.0)),
        "Pendulum-v1 cannot be made as asked for: .*unexpected keyword argument 'gravity'",
    ),
    Case(
        "wrapper_kwargs without wrapper_class",
        pushcube("Pendulum-v1", wrapper_kwargs=dict(a=1)),
        r"wrapper_kwargs holds \['a'\], but there is no wrapper_class",
    ),
    Case(
        "two time limits",
        lambda folder: make_latent_env(lambda: gym.make("Pendulum-v1"), tiny_flow(3, 1), max_episode_steps=7),
        "max_episode_steps=7 was given, but the env that the callable returns has a TimeLimit already",
    ),
    Case(
        "flow of another kind",
        lambda folder: make_latent_env("Pendulum-v1", 42),
        "flow must be a FlowPolicy or .*found int",
        TypeError,
    ),
    Case(
        "folder without a flow",
        lambda folder: LatentSteeringWrapper(scripted(), folder),
        r"holds no config.json: expected a folder written by FlowPolicy.save_pretrained",
        FileNotFoundError,
    ),
    Case(
        "workers on a GPU",
        pushcube(n_envs=2, sim_backend="gpu", workers=WorkerSettings()),
        "workers are for sim_backend='physx_cpu'; on a GPU one simulator in this process runs all envs",
    ),
    Case("n_envs 0", pushcube(n_envs=0), "n_envs must be at least 1, found 0"),
    Case(
        "unknown sim_backend",
        pushcube(sim_backend="auto"),
        r"sim_backend must be 'physx_cpu' \(or 'cpu'\) or .*, found 'auto'",
    ),
    Case("unknown control mode", pushcube(control_mode="pd_none"), "PushCube-v1 cannot be made as asked for: pd_none not in"),
    Case(
        "unknown reward mode", pushcube(reward_mode="none at all"), "PushCube-v1 cannot be made as asked for: Unsupported rew"
    ),
    Case("unknown obs mode", pushcube(obs_mode="nothing"), "PushCube-v1 cannot be made as asked for: Invalid texture type"),
    Case("time limit 0", pushcube(max_episode_steps=0), "`max_episode_steps` to be positive, actually: 0"),
]


def step(w: np.ndarray) -> None:
    env = LatentSteeringWrapper(scripted(), tiny_flow())
    env.reset(seed=0)
    env.step(w)
