"""Actor and critics of LatentSAC, as an SB3 policy.

Letters in shapes: ``B`` batch, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``w`` noise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, create_mlp
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from sb3_dsrl.stage2.latent_policy import RESIDUAL_STD
from sb3_dsrl.steering.noise_space import NoiseSpace


class LayerNormCritic(ContinuousCritic):
    """
    SB3's ``ContinuousCritic`` with a layer norm before each activation, which keeps a critic in bounds that is trained often
    on few data (https://arxiv.org/abs/2302.02948).

    :param net_arch: hidden layers
    :param features_dim: number of features
    :param activation_fn: as in SB3
    :param kwargs: further arguments of ``ContinuousCritic``
    """

    def __init__(
        self, *, net_arch: list[int], features_dim: int, activation_fn: type[nn.Module] = nn.ReLU, **kwargs: Any
    ) -> None:
        super().__init__(net_arch=[], features_dim=features_dim, activation_fn=activation_fn, **kwargs)
        inputs = features_dim + math.prod(self.action_space.shape or ())
        for i in range(self.n_critics):
            layers = create_mlp(inputs, 1, net_arch, activation_fn, post_linear_modules=[nn.LayerNorm])
            self.q_networks[i] = nn.Sequential(*layers)
            self.add_module(f"qf{i}", self.q_networks[i])


class LatentSACPolicy(SACPolicy):
    """
    A squashed Gaussian over flow noise (and residual) with state-dependent mean and std, and critics on noise or on chunks.
    :class:`~sb3_dsrl.LatentSAC` knows it as ``"LatentPolicy"``.

    ``w = noise_bound * tanh(u)``: within the bounds, and near 0 a Gaussian with the std asked for. A new policy is the same in
    every state, with mean 0 or ``centre``.

    :param observation_space: the flow's features, (C,), or what ``obs`` of the steered env makes of them
    :param action_space: of the steered env
    :param lr_schedule: of all networks
    :param net_arch: hidden layers, as in SB3: ``dict(pi=[...], qf=[...])``
    :param activation_fn: as in SB3
    :param critic_space: what the critics take beside the observation; None is the action space
    :param distils: with a second critic, on noise: ``noise_critic``
    :param log_std_init: log standard deviation of a new policy's noise; 0 is the prior's
    :param residual_log_std_init: likewise of its residual, where 0 is the whole ``residual_scale``; None is log 0.1
    :param centre: noise that a new policy's mean starts from, such as a golden ticket, of the noise's shape; None is 0
    :param kwargs: further arguments of SB3's ``SACPolicy``
    :raises ValueError: if an argument is out of range or the action space is not that of a steered env
    """

    action_space: NoiseSpace
    noise_critic: LayerNormCritic | None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: Any,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        *,
        critic_space: spaces.Box | None = None,
        distils: bool = False,
        log_std_init: float = 0.0,
        residual_log_std_init: float | None = None,
        centre: np.ndarray | list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(action_space, NoiseSpace):
            raise ValueError(f"LatentSACPolicy needs the action space of a steered env, found {action_space}")
        if kwargs.get("use_sde"):
            raise ValueError("LatentSACPolicy has its own state-dependent std: use_sde must be False, found True")
        if residual_log_std_init is not None and not action_space.residual_rows:
            raise ValueError(
                f"residual_log_std_init={residual_log_std_init} was given, but the env has no residual: make it with "
                f"residual_scale="
            )
        for name, log_std in (("log_std_init", log_std_init), ("residual_log_std_init", residual_log_std_init)):
            if log_std is not None and not np.isfinite(log_std):
                raise ValueError(f"{name} must be finite, found {log_std}: a std is positive")
        start = np.zeros(action_space.noise_shape) if centre is None else np.asarray(centre, np.float64)
        if start.shape != action_space.noise_shape:
            raise ValueError(f"centre must have the noise's shape {action_space.noise_shape}, found {start.shape}")
        bound = action_space.contract.noise_bound
        if not (np.abs(start) < bound).all():
            raise ValueError(f"centre must lie within noise_bound={bound}, found an entry of {np.abs(start).max():.3g}")
        self._start = dict(log_std_init=log_std_init, residual_log_std_init=residual_log_std_init, centre=centre)
        self._critic_space, self._distils = critic_space, distils
        self._mean = np.arctanh(action_space.join(start / bound)).reshape(-1)
        own = math.log(RESIDUAL_STD) if residual_log_std_init is None else residual_log_std_init
        n_noise = math.prod(action_space.noise_shape)
        self._log_std = np.where(np.arange(len(self._mean)) < n_noise, log_std_init - math.log(bound), own)
        if isinstance(observation_space, spaces.Dict):
            kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(observation_space, action_space, lr_schedule, net_arch, activation_fn, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        for layer, start in ((self.actor.mu, self._mean), (self.actor.log_std, self._log_std)):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            with th.no_grad():
                layer.bias.copy_(th.as_tensor(start, dtype=th.float32))
        self.noise_critic = None
        if self._distils:
            self.noise_critic = self._critic(self.action_space, None)
            self.noise_critic.optimizer = self.optimizer_class(
                self.noise_critic.parameters(),
                lr=lr_schedule(1),  # type: ignore[call-arg]
                **self.optimizer_kwargs,
            )

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """As in SB3."""
        return self._critic(self.action_space if self._critic_space is None else self._critic_space, features_extractor)

    def _critic(self, space: spaces.Box, features_extractor: BaseFeaturesExtractor | None) -> LayerNormCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs | dict(action_space=space), features_extractor)
        return LayerNormCritic(**kwargs).to(self.device)

    def prior(self, n: int) -> th.Tensor:
        """
        Noises of the prior with residual 0, as :meth:`NoiseSpace.sample <sb3_dsrl.NoiseSpace>` draws them, from torch's
        global generator.

        :param n: B
        :return: in the box scaled to [-1, 1], flattened, (B, ...)
        """
        space = self.action_space
        action = space.clip(space.join(th.randn(n, *space.noise_shape, device=self.device)))
        return (action / th.as_tensor(space.high, device=self.device)).flatten(1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(critic_space=self._critic_space, distils=self._distils, **self._start)
        return data
