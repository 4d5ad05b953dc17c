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
    ``eps * N(0, I) + (1 - eps) * pi`` over flow noise, where pi is a Gaussian with state-dependent mean and std. A residual
    r is always pi's: with one the density is ``(eps * N(w; 0, I) + (1 - eps) * pi(w)) * pi(r)``.

    ``sample`` and ``log_prob`` are those of the mixture, so that PPO's ratio is exact while it explores with the
    prior. ``mode`` and ``entropy`` are those of pi alone, and so is ``distribution`` (which TRPO's KL divergence reads).

    In shapes, ``D`` are the entries of an action, ``T*A`` those of its noise, say, which come first.

    :param action_dim: D
    :param noise_dim: entries of the noise; None is all of them
    """

    def __init__(self, action_dim: int, noise_dim: int | None = None) -> None:
        super().__init__(action_dim)
        self.noise_dim = action_dim if noise_dim is None else noise_dim
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
        :param mean_actions: mean of pi, (B, D)
        :param log_std: log standard deviation of pi, (B, D)
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
        """Draws the noise of each row from the prior with probability eps, else from pi; residuals from pi. (B, D)"""
        actions = self.distribution.rsample()
        if self.prior_mix > 0.0:
            w, residual = actions[:, : self.noise_dim], actions[:, self.noise_dim :]
            from_prior = th.rand(len(w), 1, device=w.device) < self.prior_mix
            actions = th.cat([th.where(from_prior, th.randn_like(w), w), residual], dim=1)
        return actions

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of the mixture.

        :param actions: (B, D)
        :return: (B,)
        """
        if self.prior_mix <= 0.0:
            return self.policy_log_prob(actions)
        each = self.distribution.log_prob(actions)
        log_noise = self._mixed(actions[:, : self.noise_dim], sum_independent_dims(each[:, : self.noise_dim]))
        if self.noise_dim == self.action_dim:
            return log_noise
        return log_noise + sum_independent_dims(each[:, self.noise_dim :])

    def _mixed(self, w: th.Tensor, log_pi: th.Tensor) -> th.Tensor:
        log_prior = -0.5 * (w.pow(2) + math.log(2 * math.pi)).sum(dim=-1)
        if self.prior_mix >= 1.0:
            return log_prior
        return th.logaddexp(math.log(self.prior_mix) + log_prior, math.log1p(-self.prior_mix) + log_pi)

    def policy_log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of pi alone, of noise and residual together.

        :param actions: (B, D)
        :return: (B,)
        """
        return sum_independent_dims(self.distribution.log_prob(actions))

    def kl_to_prior(self) -> th.Tensor:
        """
        KL(pi || N(0, I)) of the noise in closed form.

        :return: (B,)
        """
        mean, std = (x[:, : self.noise_dim] for x in (self.distribution.mean, self.distribution.stddev))
        return 0.5 * (mean.pow(2) + std.pow(2) - 1.0 - 2.0 * std.log()).sum(dim=-1)
