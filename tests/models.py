"""On-policy models that learn in milliseconds on steered scripted envs, and what tests look at in them."""

import copy
from typing import Any

import numpy as np
import torch as th
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import FlowPolicy, LatentPolicy
from tests.envs import FORMS, scripted

N_STEPS = 8
ON_POLICY = {"ppo": PPO, "a2c": A2C, "trpo": TRPO}


def steered(flow: FlowPolicy, n_envs: int = 2, form: str = "vec form", **kwargs: Any) -> VecEnv:
    lengths = ((5, 9), (100,), (7,))
    return FORMS[form](flow, [scripted(10, episode_lengths=lengths[i], random_start=True) for i in range(n_envs)], **kwargs)


def small(env: VecEnv, cls: type[BaseAlgorithm] = PPO, **kwargs: Any) -> Any:
    """An on-policy model that learns in milliseconds."""
    policy_kwargs = dict(net_arch=[16]) | kwargs.pop("policy_kwargs", {})
    batch = {} if cls is A2C else dict(batch_size=N_STEPS * env.num_envs)
    defaults = dict(n_steps=N_STEPS, gamma=0.99**3, seed=0, policy_kwargs=policy_kwargs, **batch)
    return cls("LatentPolicy", env, **(defaults | kwargs))


def weights(module: th.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def shaken(model: Any, seed: int = 0) -> Any:
    """The model with a policy that is no longer the prior."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in model.policy.action_net.parameters():
            parameter.add_(0.2 * th.randn(parameter.shape, generator=generator))
    return model


def features(n: int, seed: int = 0) -> th.Tensor:
    return th.randn(n, 6, generator=th.Generator().manual_seed(seed))


def learning_rates(model: Any) -> list[float]:
    """What Adam truly does: its first step moves every weight by its learning rate. First the policy's, then the value's."""
    model.predict(features(1).numpy())  # SB3 policies keep their last distribution: only without a graph can they be copied
    probe = copy.deepcopy(model.policy)
    moved = []
    for module in (probe.action_net, probe.value_net):
        module.bias.grad = th.ones_like(module.bias)
        before = module.bias.detach().clone()
        probe.optimizer.state.clear()
        probe.optimizer.step()
        module.bias.grad = None
        moved.append((before - module.bias.detach()).mean().item())
    return moved


class Record(BaseCallback):
    """Keeps what each rollout was collected with."""

    def __init__(self) -> None:
        super().__init__()
        self.obs: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.prior_mix: list[set[float]] = []

    def _on_rollout_start(self) -> None:
        self.prior_mix.append(set())

    def _on_step(self) -> bool:
        self.obs.append(self.locals["new_obs"].copy())
        self.actions.append(self.locals["actions"].copy())
        if isinstance(self.model.policy, LatentPolicy):
            self.prior_mix[-1].add(float(self.model.policy.prior_mix))
        return True
