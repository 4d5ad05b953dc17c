"""SAC on the noise of a frozen flow, in SB3's own classes.

Letters in shapes: ``B`` batch, ``H`` = act_horizon, ``A`` action dim, ``w`` noise.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F

from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.stage2.chunk_replay import ChunkReplayBuffer, ChunkSamples, DictChunkReplayBuffer, demo_buffer
from sb3_dsrl.stage2.latent_critics import CriticKind, CriticName, Decoder, critic_kind
from sb3_dsrl.stage2.sac_policy import LatentSACPolicy
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.vec_env import find_steering


class LatentSAC(SAC):
    """
    SB3's ``SAC`` on the noise of a frozen flow: macro-steps with their exact discounts, a warm-up with the prior, critics with
    layer norm on noise or on executed chunks, and demos in half of each batch::

        model = LatentSAC("LatentPolicy", env, **sac_kwargs(env, critic="action"), demos=load_demos("demos.h5"))
        model.learn(20_000)  # macro-steps

    It saves, loads and goes on as ``SAC`` does. Neither flow nor demos are in its zip: to go on learning ``load`` needs
    ``env=``, refuses an env with another flow, and takes ``demos=`` again.

    :param policy: "LatentPolicy", or a subclass of :class:`~sb3_dsrl.stage2.sac_policy.LatentSACPolicy`
    :param env: steered env, gym or vectorised
    :param learning_rate: of all networks, as in SB3
    :param critic: "noise" is Q(s, w); "action" is Q(s, chunk), with the actor's gradient through the decode; "distilled" is
        Q(s, chunk) and a critic on noise that imitates it. Or an object with settings of its own, such as
        :class:`ActionCritic(num_steps=1) <sb3_dsrl.ActionCritic>`
    :param demos: fill half of each batch, with a critic on chunks: :class:`~sb3_dsrl.Demos`, or the ``transitions()`` of
        rollouts of any policy
    :param gamma: discount per macro-step; None is the env's ``macro_gamma``
    :param backup_entropy: the policy's entropy is part of the value, as in SB3. The noise has many dimensions, whose entropies
        add up to more than most rewards, so it is often better left out (RLPD, https://arxiv.org/abs/2302.02948).
    :param max_ent_coef: upper bound of an ``ent_coef`` of "auto", which otherwise can run away; None is no bound
    :param policy_delay: critic updates for each update of the actor
    :param policy_kwargs: of the policy
    :param kwargs: further arguments of SB3's ``SAC``; ``gradient_steps`` is the number of updates for each step of all envs.
        ``target_entropy`` counts in the box scaled to [-1, 1]: of noise with std s, about ``log(s / noise_bound) + 1.42`` a
        dimension.
    :raises ValueError: if the env is not steered, or settings do not fit each other or the env
    :raises TypeError: if the policy is of another class, or demos are something else
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"LatentPolicy": LatentSACPolicy}
    policy: LatentSACPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[LatentSACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *,
        critic: CriticName | CriticKind = "noise",
        demos: Demos | FeatureTransitions | None = None,
        gamma: float | None = None,
        backup_entropy: bool = True,
        max_ent_coef: float | None = None,
        policy_delay: int = 1,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, policy_kwargs=policy_kwargs, _init_setup_model=False, **kwargs)
        if not (isinstance(self.policy_class, type) and issubclass(self.policy_class, LatentSACPolicy)):
            raise TypeError(f"LatentSAC needs 'LatentPolicy' or a subclass of LatentSACPolicy, found {self.policy_class}")
        self.critic_kind = critic_kind(critic)
        self.demos, self.learns_from_demos = demos, False
        self.backup_entropy, self.max_ent_coef, self.policy_delay = backup_entropy, max_ent_coef, policy_delay
        self._demo_buffer: ChunkReplayBuffer | None = None
        self._decoder: tuple[Any, Decoder] | None = None
        if not _init_setup_model:
            return
        if not isinstance(self.action_space, NoiseSpace):
            raise ValueError(
                f"LatentSAC needs a steered env, whose actions are noise, found {self.action_space}: wrap the env in "
                f"LatentSteeringWrapper or make it with make_latent_env"
            )
        self.gamma = self.action_space.contract.macro_gamma if gamma is None else gamma
        if self.n_steps != 1:
            raise ValueError(f"LatentSAC learns from single macro-steps: n_steps must be 1, found {self.n_steps}")
        if self.replay_buffer_class is not None and not issubclass(
            self.replay_buffer_class, (ChunkReplayBuffer, DictChunkReplayBuffer)
        ):
            raise ValueError(
                f"replay_buffer_class must be ChunkReplayBuffer, DictChunkReplayBuffer or a subclass, which keep the executed "
                f"chunks, found {self.replay_buffer_class.__name__}"
            )
        if policy_delay < 1:
            raise ValueError(f"policy_delay must be at least 1, found {policy_delay}")
        if max_ent_coef is not None:
            if not (isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto")):
                raise ValueError(f"max_ent_coef bounds an ent_coef of 'auto', but it is fixed at {self.ent_coef}")
            if max_ent_coef <= 0:
                raise ValueError(f"max_ent_coef must be positive, found {max_ent_coef}")
        self._setup_model()

    def _setup_model(self) -> None:
        if self.replay_buffer_class is None:
            of_dicts = isinstance(self.observation_space, spaces.Dict)
            self.replay_buffer_class = DictChunkReplayBuffer if of_dicts else ChunkReplayBuffer
        if self.demos is not None and not self.critic_kind.of_chunks:
            raise ValueError(
                "demos hold actions, not the noise that leads to them, and a critic on noise cannot learn from them: use "
                "critic='action' or critic='distilled', or leave demos out"
            )
        assert isinstance(self.action_space, NoiseSpace)
        kind = self.critic_kind
        self.policy_kwargs = self.policy_kwargs | dict(critic_space=kind.space(self.action_space), distils=kind.distils)
        super()._setup_model()
        if self.env is None:
            return
        decoder = self._get_decoder()
        if self.demos is not None:
            assert decoder is not None
            if isinstance(self.observation_space, spaces.Dict):
                raise ValueError(
                    "demos are known by the flow's features alone: make the env with obs='features', found a dict"
                )
            self._demo_buffer = demo_buffer(self.demos, decoder.steering, self.action_space, self.device)
            self.learns_from_demos = True

    def _get_decoder(self) -> Decoder | None:
        """What the critic decodes with; it is that of the env, which may be another one after ``set_env``."""
        if not self.critic_kind.of_chunks:
            return None
        if self._decoder is None or self._decoder[0] is not self.env:
            normalize = self._vec_normalize_env
            if normalize is not None and normalize.norm_obs:
                raise ValueError(
                    "A critic on actions decodes noise under the flow's own features, but VecNormalize normalises them: use "
                    "VecNormalize(norm_obs=False), or critic='noise'"
                )
            assert self.env is not None
            self._decoder = (self.env, Decoder(find_steering(self.env), self.observation_space))
        return self._decoder[1]

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if self.learns_from_demos and self.demos is None:
            warnings.warn(
                "This model has learned with demos, which are not in its zip, and goes on without: pass demos= to load"
            )
        return super()._setup_learn(*args, **kwargs)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        As in SB3.

        :param gradient_steps: critic updates
        :param batch_size: B, half of it demos if there are any
        """
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        if self.policy.noise_critic is not None:
            optimizers.append(self.policy.noise_critic.optimizer)
        self._update_learning_rate(optimizers)
        scalars: dict[str, list[float]] = {}
        for _ in range(gradient_steps):
            samples = self._sample(batch_size)
            found = self._update_critic(samples)
            if self._n_updates % self.policy_delay == 0:
                found |= self._update_actor(samples.observations)
            if self._n_updates % self.target_update_interval == 0:
                polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
            self._n_updates += 1
            for name, value in found.items():
                scalars.setdefault(name, []).append(value.item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, values in scalars.items():
            self.logger.record(f"train/{name}", np.mean(values))

    def _sample(self, batch_size: int) -> ChunkSamples:
        assert self.replay_buffer is not None
        if self._demo_buffer is None:
            return self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[return-value]
        n_demos = batch_size // 2
        samples: Any = self.replay_buffer.sample(batch_size - n_demos, env=self._vec_normalize_env)
        return samples.joined(self._demo_buffer.sample(n_demos, env=self._vec_normalize_env))

    def alpha(self) -> th.Tensor:
        """The entropy coefficient, as it is now."""
        return self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()

    def td_targets(self, samples: ChunkSamples) -> th.Tensor:
        """
        What the critics learn: ``r + gamma^k * (min Q(s', a') - alpha * log pi(a' | s'))``, without the last term unless
        ``backup_entropy``.

        :param samples: of the replay
        :return: (B, 1)
        """
        with th.no_grad():
            actions, log_prob = self.actor.action_log_prob(samples.next_observations)
            chosen = self.critic_kind.chosen(self._get_decoder(), samples.next_observations, actions)
            values = th.cat(self.critic_target(samples.next_observations, chosen), dim=1).amin(dim=1, keepdim=True)
            if self.backup_entropy:
                values = values - self.alpha() * log_prob[:, None]
            return samples.rewards + samples.discounts(self.gamma) * values

    def _update_critic(self, samples: ChunkSamples) -> dict[str, th.Tensor]:
        targets = self.td_targets(samples)
        values = self.critic(samples.observations, self.critic_kind.recorded(samples))
        loss = 0.5 * sum((F.mse_loss(value, targets) for value in values), start=targets.new_zeros(()))
        self._step(self.critic.optimizer, loss)
        return dict(critic_loss=loss.detach(), q_value=values[0].detach().mean())

    def _update_actor(self, obs: Any) -> dict[str, th.Tensor]:
        decoder = self._get_decoder()
        actions, log_prob = self.actor.action_log_prob(obs)
        found = dict(entropy=-log_prob.detach().mean(), ent_coef=self.alpha())
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            assert isinstance(self.target_entropy, float)
            loss = -(self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean()
            self._step(self.ent_coef_optimizer, loss)
            if self.max_ent_coef is not None:
                self.log_ent_coef.data.clamp_(max=math.log(self.max_ent_coef))
            found["ent_coef_loss"] = loss.detach()
        distilled = self.critic_kind.distil(self.policy, decoder, obs, actions)
        if distilled is not None:
            assert self.policy.noise_critic is not None
            self._step(self.policy.noise_critic.optimizer, distilled)
            found["distill_loss"] = distilled.detach()
        critic = self.policy.noise_critic or self.critic
        critic.requires_grad_(False)  # the gradient of its weights would be computed for nothing
        values = th.cat(self.critic_kind.actor_values(self.policy, decoder, obs, actions), dim=1)
        loss = (found["ent_coef"] * log_prob - values.amin(dim=1)).mean()
        self._step(self.actor.optimizer, loss)
        critic.requires_grad_(True)
        return found | dict(actor_loss=loss.detach())

    @staticmethod
    def _step(optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "demos", "_demo_buffer", "_decoder"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if self.critic_kind.distils:
            state_dicts = [*state_dicts, "policy.noise_critic.optimizer"]
        return state_dicts, variables
