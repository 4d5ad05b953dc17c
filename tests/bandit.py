"""A bandit with a known optimum: the reward is -||w - BEST||^2 / 16, whatever the observation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_dsrl import ActionChunkWrapper, FlowPolicy, LatentPolicy, Rollouts, VecLatentSteering, collect_rollouts
from sb3_dsrl.stage0.demos import Demos, Episode
from sb3_dsrl.steering.contract import Contract
from tests.toys import BanditEnv, KnownCritic, linear_flow

#: The bandit's best noise. The flow divides noise by 4, so that no noise within the bounds is clipped.
BEST = np.array([0.7, -0.5], np.float32)
SMALL = dict(net_arch=dict(pi=[32], vf=[32]))
#: Stage 1 in about a second, from the prior's std: then the optimum of AW-MLE is a weighted mean of noises
FAST: dict[str, Any] = dict(
    policy_kwargs=SMALL | dict(log_std_init=0.0), learning_rate=1e-2, n_iterations=200, batch_size=64, seed=0
)
QUICK: dict[str, Any] = dict(FAST, n_iterations=20)


class TargetCritic(KnownCritic):
    """Knows the bandit's reward, up to an offset and a slope in the first feature. Its two heads disagree."""

    def __init__(self, offset: float = 0.0, slope: float = 0.0) -> None:
        def q(cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
            reward = -(chunk[..., 0, :] - th.from_numpy(BEST / 4)).pow(2).sum(dim=-1)
            return offset + slope * cond[..., 0] + reward

        super().__init__(lambda *args: q(*args) - 0.1, lambda *args: q(*args) + 0.1)


def bandit_flow(critic: nn.Module | None = None) -> FlowPolicy:
    th.manual_seed(0)
    flow = linear_flow(a=-0.75, num_steps=1)
    if critic is not None:
        flow.critic = critic  # type: ignore[assignment]
    return flow


def bandit_env(flow: FlowPolicy, n_envs: int = 8, **kwargs: Any) -> VecEnv:
    env = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(BEST / 4), 1, **kwargs)] * n_envs), flow)
    env.seed(0)
    return env


def bandit_demos(n: int = 100) -> Demos:
    """Actions that say nothing, with their rewards."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(n):
        obs, action = rng.standard_normal((2, 2)).astype(np.float32), rng.uniform(-1, 1, (1, 2)).astype(np.float32)
        reward = -np.square(action - BEST / 4).sum(axis=1)
        episodes.append(Episode(obs, action, reward, np.ones(1, bool), None))
    return Demos(Path("bandit.h5"), episodes, "Bandit", "state", "none", None)


def bandit_rollouts() -> Rollouts:
    """2,000 episodes of the prior."""
    flow = bandit_flow()
    return collect_rollouts(flow, bandit_env(flow), 2_000, seed=0)


def data_for(weighting: str, rollouts: Rollouts) -> dict[str, Any]:
    """What a weighting learns from."""
    return dict(rollouts=rollouts) if weighting == "executed" else dict(demos=bandit_demos())


def bandit_model(flow: FlowPolicy, **kwargs: Any) -> PPO:
    env = bandit_env(flow, n_envs=4)
    defaults = dict(gamma=env.macro_gamma, n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=SMALL, seed=1, device="cpu")
    return PPO("LatentPolicy", env, **(defaults | kwargs))


def mean_noise(policy: LatentPolicy) -> np.ndarray:
    """Mean over states of pi's mean, (A,)."""
    obs = th.randn(500, 2, generator=th.Generator().manual_seed(0))
    with th.no_grad():
        return policy.sample(obs, deterministic=True).mean(dim=(0, 1)).numpy()


def made_rollouts(lengths: tuple[int, ...] = (3, 1, 4, 2), terminated: tuple[int, ...] = (0, 3), **kwargs: Any) -> Rollouts:
    """Random whole episodes; the first feature is the number of the episode."""
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    n, last = len(episode), np.cumsum(lengths) - 1
    discount = 0.9 ** rng.integers(1, 4, n)  # chunks of different lengths
    discount[last[list(terminated)]] = 0.0
    cond = rng.standard_normal((n, 2)).astype(np.float32)
    cond[:, 0] = episode
    columns = [cond, rng.standard_normal((n, 1, 2)), rng.uniform(-1, 1, (n, 1, 2)), rng.standard_normal(n), discount, cond]
    tensors = [th.from_numpy(np.asarray(column, np.float32)) for column in columns]
    rest = dict(episode=episode, success_at_end=np.zeros(len(lengths), bool), env_steps=n, contract=Contract("none", 1, 0.9))
    return Rollouts(*tensors, **(rest | kwargs))
