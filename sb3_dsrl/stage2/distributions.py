"""The distribution that LatentPolicy acts with: a diagonal Gaussian mixed with the prior N(0, I)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution, sum_independent_dims
from torch import nn
from torch.distributions import Normal

SelfPriorMixture = TypeVar("SelfPriorMixture", bound="PriorMixtureDistribution")


class PriorMixtureDistribution(DiagGaussianDistribution):
    """
    ``eps * N(0, I) + (1 - eps) * pi`` over flow noise, where pi is a Gaussian with state-dependent mean and std.

    ``sample`` and ``log_prob`` are those of the mixture, so that PPO's ratio is exact while it explores with the
    prior. ``mode`` and ``entropy`` are those of pi alone, and so is ``distribution`` (which TRPO's KL divergence reads).

    :param action_dim: entries of the flattened noise
    """

    def __init__(self, action_dim: int) -> None:
        super().__init__(action_dim)
        self.prior_mix = 0.0

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> tuple[nn.Module, nn.Parameter]:
        """
        :param latent_dim: outputs of the last policy layer
        :param log_std_init: initial log standard deviation
        :return: a layer that gives mean and state-dependent part of log_std, and the state-independent part of log_std
        """
        return nn.Linear(latent_dim, 2 * self.action_dim), nn.Parameter(th.full((self.action_dim,), float(log_std_init)))

    def proba_distribution(  # type: ignore[override]
        self: SelfPriorMixture, mean_actions: th.Tensor, log_std: th.Tensor, prior_mix: float = 0.0
    ) -> SelfPriorMixture:
        """
        :param mean_actions: mean of pi, (B, T*A)
        :param log_std: log standard deviation of pi, (B, T*A)
        :param prior_mix: eps, the weight of the prior
        :raises ValueError: if they are NaN
        """
        try:
            # torch.compile turns torch's own default off for the whole process
            self.distribution = Normal(mean_actions, log_std.exp(), validate_args=True)
        except ValueError as error:  # torch's own sentence shows the whole tensor
            raise ValueError("Mean or std of the latent policy is NaN: its training has diverged") from error
        self.prior_mix = prior_mix
        return self

    def sample(self) -> th.Tensor:
        """Draws each row from the prior with probability eps, else from pi. (B, T*A)"""
        w = self.distribution.rsample()
        if self.prior_mix > 0.0:
            from_prior = th.rand(len(w), 1, device=w.device) < self.prior_mix
            w = th.where(from_prior, th.randn_like(w), w)
        return w

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of the mixture.

        :param actions: w, (B, T*A)
        :return: (B,)
        """
        log_pi = self.policy_log_prob(actions)
        if self.prior_mix <= 0.0:
            return log_pi
        log_prior = -0.5 * (actions.pow(2) + math.log(2 * math.pi)).sum(dim=-1)
        if self.prior_mix >= 1.0:
            return log_prior
        return th.logaddexp(math.log(self.prior_mix) + log_prior, math.log1p(-self.prior_mix) + log_pi)

    def policy_log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of pi alone.

        :param actions: w, (B, T*A)
        :return: (B,)
        """
        return sum_independent_dims(self.distribution.log_prob(actions))

    def kl_to_prior(self) -> th.Tensor:
        """
        KL(pi || N(0, I)) in closed form.

        :return: (B,)
        """
        mean, std = self.distribution.mean, self.distribution.stddev
        return 0.5 * (mean.pow(2) + std.pow(2) - 1.0 - 2.0 * std.log()).sum(dim=-1)
