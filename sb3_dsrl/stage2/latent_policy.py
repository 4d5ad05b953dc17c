"""The latent policy pi(w | obs) over flow noise, and perhaps a residual, as an SB3 actor-critic policy."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from torch import nn
from torch.distributions import Normal

from sb3_dsrl.stage2.correlation import Previous, WithPrevious, carried
from sb3_dsrl.stage2.distributions import PriorMixtureDistribution
from sb3_dsrl.stage2.optimizers import SCALED, AdamLrScale, LrScale
from sb3_dsrl.stage2.policy_file import from_config, read_policy_file, to_config, write_policy_file
from sb3_dsrl.steering.contract import PLAYING, Contract, check_agreement
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.utils.integrity import one_line
from sb3_dsrl.utils.observations import map_frames

LOG_STD_RANGE = (-5.0, 2.0)
#: Std of the residual of a new policy, where 1 is the whole ``residual_scale``.
RESIDUAL_STD = 0.1


class LatentPolicy(ActorCriticPolicy):
    """
    Gaussian over flow noise with state-dependent mean and std, for PPO, A2C and TRPO. ``import sb3_dsrl`` registers it as
    ``"LatentPolicy"``.

    Built bare, a new policy is exactly the prior N(0, I), hence the unsteered flow; :func:`~sb3_dsrl.ppo_kwargs` passes the
    recommended, narrower start. While rollouts are collected, w comes from the mixture ``eps * N(0, I) + (1 - eps) * pi``;
    :meth:`forward` and :meth:`evaluate_actions` both use the mixture's density. ``predict`` uses pi alone. eps decays by
    ``prior_mix_decay`` between an update and the rollout after it.

    Where the action space holds a residual r as well (``residual_scale`` of the env), it is part of the Gaussian, with mean 0
    at first: played by its mean, a new policy is exactly the steered one. The prior is mixed into the noise only, and the
    density is the joint one, ``(eps * N(w; 0, I) + (1 - eps) * pi(w)) * pi(r)``. (Noise and residual together are Residual
    Flow Steering's, https://arxiv.org/abs/2602.01789.)

    :param observation_space: the flow's features, (C,), or what ``obs`` of the steered env makes of them
    :param action_space: flow noise, (T, A), (H, A) or (1, A), see ``steer_mode``; the H rows of a residual may follow
    :param lr_schedule: learning rate of the policy; the value network's follows it in proportion
    :param net_arch: hidden layers, as in SB3; None is two of 256 for the policy and two for the value
    :param activation_fn: as in SB3
    :param prior_mix: initial eps
    :param prior_mix_decay: factor on eps per rollout
    :param value_lr: learning rate of the value network where the schedule is at its highest; None is the policy's
    :param centre: noise that a new policy's mean starts from, such as a golden ticket; of the noise's shape. None is 0
    :param log_std_init: log standard deviation of a new policy's noise; 0 is the prior's
    :param residual_log_std_init: likewise of its residual, where 0 is the whole ``residual_scale``; None is log 0.1
    :param noise_correlation: rho of AR(1) noise while rollouts are collected, in [0, 1), see
        :mod:`sb3_dsrl.stage2.correlation`; it needs ``prior_mix=0`` and the buffer that ``ppo_kwargs`` then chooses. If a
        callback stopped ``learn`` inside a rollout and it is called again, the density of the next macro-step is not exact.
    :param kwargs: further arguments of :class:`~stable_baselines3.common.policies.ActorCriticPolicy`
    :raises ValueError: if an argument is out of range or the action space is no Box
    """

    prior_mix: th.Tensor
    centre: th.Tensor
    _decay_due: th.Tensor
    action_dist: PriorMixtureDistribution
    action_net: nn.Linear

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        *,
        prior_mix: float = 0.3,
        prior_mix_decay: float = 0.995,
        value_lr: float | None = 1e-3,
        centre: np.ndarray | list[Any] | None = None,
        log_std_init: float = 0.0,
        residual_log_std_init: float | None = None,
        noise_correlation: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(action_space, spaces.Box):
            raise ValueError(f"LatentPolicy needs flow noise, a Box of shape (T, A), as action space, found {action_space}")
        if not isinstance(action_space, NoiseSpace):
            warnings.warn(
                f"LatentPolicy acts in {action_space}, which is not the noise of a flow, so nothing is steered: wrap the "
                f"env in LatentSteeringWrapper or make it with make_latent_env"
            )
        for name, value in (("prior_mix", prior_mix), ("prior_mix_decay", prior_mix_decay)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], found {value}")
        if residual_log_std_init is not None and not (isinstance(action_space, NoiseSpace) and action_space.residual_rows):
            raise ValueError(
                f"residual_log_std_init={residual_log_std_init} was given, but the env has no residual: make it with "
                f"residual_scale="
            )
        for name, log_std in (("log_std_init", log_std_init), ("residual_log_std_init", residual_log_std_init)):
            if log_std is not None and not np.isfinite(log_std):
                raise ValueError(f"{name} must be finite, found {log_std}: a std is positive")
        if not 0.0 <= noise_correlation < 1.0:
            raise ValueError(f"noise_correlation must lie in [0, 1), found {noise_correlation}")
        if noise_correlation and prior_mix:
            raise ValueError(f"noise_correlation needs prior_mix=0, found {prior_mix}: the prior's noises follow no others")
        if noise_correlation and not isinstance(observation_space, spaces.Box):
            raise ValueError(f"noise_correlation needs observations that are no dict, found {observation_space}")
        if net_arch is None:
            net_arch = dict(pi=[256, 256], vf=[256, 256])
        if value_lr is not None and value_lr <= 0:
            raise ValueError(f"value_lr must be positive, found {value_lr}")
        if kwargs.get("use_sde"):
            raise ValueError("LatentPolicy has its own state-dependent std: use_sde must be False, found True")
        self.initial_prior_mix, self.prior_mix_decay, self.value_lr = prior_mix, prior_mix_decay, value_lr
        self._residual_log_std_init, self.noise_correlation = residual_log_std_init, noise_correlation
        self._previous: Previous | None = None  # the macro-step before, while a rollout is collected
        noise_shape = action_space.noise_shape if isinstance(action_space, NoiseSpace) else action_space.shape
        self._noise_dim = math.prod(noise_shape)
        self._centre_init = np.zeros(noise_shape) if centre is None else np.asarray(centre, dtype=np.float64)
        if self._centre_init.shape != noise_shape:
            raise ValueError(f"centre must have the noise's shape {noise_shape}, found {self._centre_init.shape}")
        optimizer_class = kwargs.pop("optimizer_class", AdamLrScale)
        optimizer_class = SCALED.get(optimizer_class, optimizer_class)
        if value_lr is not None and not issubclass(optimizer_class, LrScale):
            raise ValueError(
                f"{optimizer_class.__name__} knows no lr_scale: set value_lr=None or use one of sb3_dsrl.stage2.optimizers"
            )
        kwargs["optimizer_class"] = optimizer_class
        if isinstance(observation_space, spaces.Dict):
            kwargs.setdefault("features_extractor_class", CombinedExtractor)
        kwargs["optimizer_kwargs"] = {"eps": 1e-5, **(kwargs.get("optimizer_kwargs") or {})}
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, log_std_init=log_std_init, **kwargs
        )

    def _build(self, lr_schedule: Schedule) -> None:
        space: Any = self.action_space
        self.action_dist = PriorMixtureDistribution(math.prod(space.shape), self._noise_dim)
        super()._build(lr_schedule)
        own = self._residual_log_std_init
        nn.init.constant_(self.log_std[self._noise_dim :], math.log(RESIDUAL_STD) if own is None else own)
        # Step 0 is the base policy: the output layer gives 0, whatever the observation.
        nn.init.zeros_(self.action_net.weight)
        nn.init.zeros_(self.action_net.bias)
        centre = space.join(self._centre_init) if isinstance(space, NoiseSpace) else self._centre_init
        self.register_buffer("centre", th.as_tensor(centre.reshape(-1), dtype=th.float32))
        # Buffers, so that they are saved with the model. float64: 0.3 * 0.995**n should not drift.
        self.register_buffer("prior_mix", th.tensor(self.initial_prior_mix, dtype=th.float64))
        self.register_buffer("_decay_due", th.tensor(0.0))  # 1 between an update and the next rollout
        self._build_optimizer(lr_schedule)

    def _build_optimizer(self, lr_schedule: Schedule) -> None:
        value_params = [*self.mlp_extractor.value_net.parameters(), *self.value_net.parameters()]
        if not self.share_features_extractor:
            value_params += self.vf_features_extractor.parameters()
        value_ids = {id(p) for p in value_params}
        policy_params = [p for p in self.parameters() if id(p) not in value_ids]
        peak = max(float(lr_schedule(1 - i / 100)) for i in range(101))  # a schedule may start at 0 and warm up
        # SB3 builds a policy that is about to be loaded with lr = 0; it is not trained before an algorithm gives it a
        # new optimiser.
        scale = 1.0 if self.value_lr is None or peak == 0 else self.value_lr / peak
        groups = [dict(params=policy_params, lr_scale=1.0), dict(params=value_params, lr_scale=scale)]
        self.optimizer = self.optimizer_class(groups, lr=float(lr_schedule(1)), **self.optimizer_kwargs)  # type: ignore[call-arg, arg-type]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            prior_mix=self.initial_prior_mix,
            prior_mix_decay=self.prior_mix_decay,
            value_lr=self.value_lr,
            centre=self._centre_init,
            residual_log_std_init=self._residual_log_std_init,
            noise_correlation=self.noise_correlation,
        )
        return data

    def config(self) -> dict[str, Any]:
        """
        Constructor arguments as plain values, for JSON.

        :raises ValueError: if one of them cannot be written, an ``optimizer_class`` of your own, say
        """
        arguments = self._get_constructor_parameters()
        for name in ("lr_schedule", "use_sde", "squash_output", "full_std", "use_expln"):  # always the same
            del arguments[name]
        return to_config(arguments)

    def save(self, path: str | Path) -> None:  # type: ignore[override]
        """
        Saves weights and constructor arguments: safetensors with JSON in the header.

        :param path: the file, of any name
        :raises ValueError: if an argument cannot be written, see :meth:`config`
        :raises OSError: if the file cannot be written, because the disk is full, say
        """
        write_policy_file(path, self.config(), self.state_dict())

    @classmethod
    def load(cls, path: str | Path, device: th.device | str = "auto") -> LatentPolicy:  # type: ignore[override]
        """
        Loads what ``save`` wrote. Unlike SB3's own ``load`` it runs no code in the file.

        :param path: the file
        :param device: for the policy
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if it does not hold a LatentPolicy or is damaged
        """
        config, tensors = read_policy_file(path)
        try:
            policy = cls(lr_schedule=cls._dummy_schedule, **from_config(config))
            policy.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold a LatentPolicy ({one_line(error)})") from error
        return policy.to(get_device(device))

    def copy(self, **changes: Any) -> LatentPolicy:
        """
        A policy of its own with the same weights, without the state of the optimiser.

        :param changes: constructor arguments that differ
        """
        with th.random.fork_rng(devices=[]):  # building networks draws numbers
            policy = type(self)(**(self._get_constructor_parameters() | changes))
        policy.load_state_dict(self.state_dict())
        return policy.to(self.device)

    @property
    def contract(self) -> Contract | None:
        """What this policy was made for: its flow, and how that is steered; None if it was not built on a steered env."""
        return self.action_space.contract if isinstance(self.action_space, NoiseSpace) else None

    def set_training_mode(self, mode: bool) -> None:
        """
        SB3 calls this with True once per update and with False before each rollout and prediction. eps changes at the
        first False after a True: never inside a rollout, never inside an update.

        :param mode: True for training mode, False for evaluation mode
        """
        super().set_training_mode(mode)
        if mode:
            self._decay_due.fill_(1.0)
        elif self._decay_due > 0:
            self._decay_due.fill_(0.0)
            self._previous = None
            self.prior_mix.mul_(self.prior_mix_decay)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> PriorMixtureDistribution:
        mean, log_std = self.action_net(latent_pi).chunk(2, dim=-1)
        log_std = (self.log_std + log_std).clamp(*LOG_STD_RANGE)
        return self.action_dist.proba_distribution(self.centre + mean, log_std, float(self.prior_mix))

    def pi(self, obs: PyTorchObs) -> PriorMixtureDistribution:
        """
        The policy alone, without the prior mixed in.

        :param obs: features, (B, C)
        """
        distribution = self.get_distribution(obs)
        assert isinstance(distribution, PriorMixtureDistribution)
        distribution.prior_mix = 0.0
        return distribution

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        Actions while rollouts are collected.

        :param obs: features, (B, C)
        :param deterministic: return the mean
        :return: actions (B, T, A), values (B, 1) and log-densities (B,)
        """
        if not self.noise_correlation:
            return super().forward(obs, deterministic)
        if self._previous is not None and len(self._previous.obs) != len(obs):
            self._previous = None
        distribution = self._carried(obs, self._previous)
        flat = distribution.get_actions(deterministic)
        exists = th.ones(len(obs), 1, dtype=th.bool, device=obs.device)
        self._previous = Previous(obs.clone(), flat.detach().clone(), exists)
        actions = flat.reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        return actions, self.predict_values(obs), distribution.log_prob(flat)

    def evaluate_actions(  # type: ignore[override]
        self, obs: PyTorchObs | WithPrevious, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param obs: features, (B, C); with ``noise_correlation`` the macro-steps before as well
        :param actions: (B, D)
        :return: values (B, 1), log-densities (B,) and entropies (B,)
        :raises ValueError: if the macro-steps before are missing
        """
        if not self.noise_correlation:
            return super().evaluate_actions(obs, actions)  # type: ignore[arg-type]
        if not isinstance(obs, WithPrevious):
            raise ValueError("noise_correlation needs rollout_buffer_class=CorrelatedRolloutBuffer, as ppo_kwargs chooses it")
        distribution = self._carried(obs.obs, obs.previous)
        return self.predict_values(obs.obs), distribution.log_prob(actions), distribution.entropy()

    def _carried(self, obs: th.Tensor, previous: Previous | None) -> PriorMixtureDistribution:
        """pi, given the macro-step before."""
        before = None if previous is None else self.pi(previous.obs).distribution
        now = self.pi(obs)
        if before is None or previous is None:
            return now
        return now.proba_distribution(*carried(now.distribution, before, previous, self.noise_correlation))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.sample(observation, deterministic)

    def sample(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Actions from pi alone.

        :param obs: features, (B, C)
        :param deterministic: return pi's mean
        :return: w, (B, T, A), and the H rows of the residual, if there is one
        """
        return self.pi(obs).get_actions(deterministic).reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def log_prob(self, obs: PyTorchObs, w: th.Tensor) -> th.Tensor:
        """
        Log-density of pi alone: of noise, or of noise and residual.

        :param obs: features, (B, C)
        :param w: noise, (B, T, A), or M noises for each observation, (B, M, T, A); or whole actions, with the rows of the
            residual
        :return: (B,) or (B, M)
        :raises ValueError: if it is neither
        """
        many = w.dim() == 4
        w = w.flatten(2 if many else 1)
        if w.shape[-1] not in (self._noise_dim, self.action_dist.action_dim):
            raise ValueError(
                f"w must hold the {self._noise_dim} entries of a noise or the {self.action_dist.action_dim} of an action, "
                f"found {w.shape[-1]}"
            )
        normal = self.pi(obs).distribution
        mean, std = (x[:, : w.shape[-1]] for x in (normal.mean, normal.stddev))  # the noise comes first
        if many:  # the networks see each observation once
            mean, std = mean[:, None], std[:, None]
        return Normal(mean, std).log_prob(w).sum(dim=-1)

    def kl_to_prior(self, obs: PyTorchObs) -> th.Tensor:
        """
        KL(pi || N(0, I)) of the noise; a residual has no prior.

        :param obs: features, (B, C)
        :return: (B,)
        """
        return self.pi(obs).kl_to_prior()

    def copy_into(self, model: BaseAlgorithm) -> None:
        """
        Copies the weights into a model's policy. The model keeps its optimiser, its learning rates and its prior mix.

        :param model: PPO, A2C or TRPO with "LatentPolicy"
        :raises ValueError: if the model's policy steers another flow or other entries of the noise, has other networks, or
            another discount
        """
        target = model.policy
        if not isinstance(target, LatentPolicy):
            raise ValueError(
                f"copy_into expects a model with 'LatentPolicy', found {type(target).__name__}: use PPO, A2C or TRPO"
            )
        if self.contract is not None and target.contract is not None:
            check_agreement("policy", self.contract, "model's env", target.contract, (*PLAYING, "gamma"))
        for name, expected, found in (
            ("noise shape", target.action_space.shape, self.action_space.shape),
            ("shape of an observation", _shapes(target.observation_space), _shapes(self.observation_space)),
            ("net_arch", target.net_arch, self.net_arch),
            ("activation_fn", target.activation_fn, self.activation_fn),
        ):
            if expected != found:
                raise ValueError(f"The model's {name} is {expected}, but this policy's is {found}: build both with the same")
        weights = self.state_dict()
        for name in ("prior_mix", "_decay_due"):
            weights[name] = target.state_dict()[name]
        target.load_state_dict(weights)


def _shapes(space: spaces.Space) -> Any:
    return map_frames(lambda part: part.shape, space.spaces if isinstance(space, spaces.Dict) else space)
