"""A trained policy of LeRobot as a policy that can be steered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from numpy.typing import ArrayLike

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.lerobot.observations import VECTORS, Batch, LeRobotObservations
from sb3_dsrl.policies.lerobot.samplers import sampler_of
from sb3_dsrl.utils.observations import map_frames

Processors = tuple[Callable[[Batch], Batch], Callable[[th.Tensor], th.Tensor]]


class LeRobotPolicy(SteerablePolicy):
    """
    A trained ``DiffusionPolicy``, ``SmolVLAPolicy``, ``PI0Policy`` or ``PI05Policy`` of LeRobot. Its initial noise is what is
    steered.

    :param policy: LeRobot's policy; a ``DiffusionPolicy`` with a DDIM scheduler, since DDPM adds noise of its own
    :param processors: what LeRobot's ``make_pre_post_processors`` returns; None leaves observations and actions as they are
    :param obs_keys: what the env calls the policy's input features, such as ``{"observation.image": "pixels",
        "observation.state": "agent_pos"}``. Features of one key lie side by side on its last axis, cameras with three channels
        each. None: the env's observation is one array, "observation.state" and then "observation.environment_state"
    :param action_bounds: ``action_space.low`` and ``.high`` of the env, between which the postprocessed actions lie; None if
        they lie in [-1, 1]
    :param task: the sentence that SmolVLA, pi0 and pi0.5 read
    :param kwargs: ``critic``, ``env_id``, ``obs_mode``, ``control_mode``, ``gamma``, ``reward_scale`` of
        :class:`~sb3_dsrl.SteerablePolicy`
    :raises ValueError: if it is another kind of policy or not deterministic, a feature has no key, or ``task`` is missing or
        would not be read
    """

    normalization: th.Tensor
    _low: th.Tensor
    _span: th.Tensor

    def __init__(
        self,
        policy: Any,
        processors: Processors | None = None,
        *,
        obs_keys: Mapping[str, str] | None = None,
        action_bounds: tuple[ArrayLike, ArrayLike] | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> None:
        sampler = sampler_of(policy)
        if sampler.reads_task != (task is not None):
            what = "reads a sentence: pass task=" if sampler.reads_task else "reads no sentence: leave task out"
            raise ValueError(f"The policy, {policy.name}, {what}")
        if sampler.reads_task and processors is None:
            raise ValueError(f"The policy, {policy.name}, needs its processors, which make tokens of the task")
        preprocess, postprocess = processors or (lambda batch: batch, lambda actions: actions)
        observations = LeRobotObservations(policy.config, preprocess, obs_keys, task)
        device = next(policy.parameters()).device
        policy.eval()
        with th.no_grad():
            frames = map_frames(lambda shape: th.zeros(1, sampler.obs_horizon, *shape), observations.shapes)
            cond_dim = sampler.encode(observations.batch(frames, device)).shape[1]
        super().__init__(
            obs_shapes=observations.shapes,
            obs_horizon=sampler.obs_horizon,
            noise_shape=sampler.noise_shape,
            cond_dim=cond_dim,
            act_horizon=sampler.act_horizon,
            action_offset=sampler.action_offset,
            **kwargs,
        )
        self.policy, self.num_steps = policy, sampler.num_steps
        self._sampler, self._observations, self._postprocess = sampler, observations, postprocess
        low, high = _bounds(action_bounds, self.action_dim)
        self.register_buffer("_low", low.to(device))
        self.register_buffer("_span", ((high - low) / 2).to(device))
        self.register_buffer("normalization", self._normalization())

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, num_inference_steps: int | None = None, device: str = "auto", **kwargs: Any
    ) -> LeRobotPolicy:
        """
        Loads a policy and its processors as LeRobot saves them. A diffusion policy is loaded with DDIM in place of DDPM, which
        takes the same weights.

        :param name: folder, or repository of the Hugging Face hub
        :param num_inference_steps: decoding steps; None is the policy's own, 100 for a diffusion policy that was trained with
            LeRobot's defaults. Ten do as a rule
        :param device: as SB3 names it
        :param kwargs: further arguments of this class
        :raises ImportError: if LeRobot is not installed
        """
        try:
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.factory import get_policy_class, make_pre_post_processors
        except ImportError as error:
            raise ImportError(f"LeRobotPolicy.from_pretrained needs LeRobot: pip install lerobot ({error})") from error
        config = PreTrainedConfig.from_pretrained(name)
        config.device = device if device != "auto" else "cuda" if th.cuda.is_available() else "cpu"
        if config.type == "diffusion":
            config.noise_scheduler_type = "DDIM"
        if num_inference_steps is not None:
            setattr(config, "num_steps" if hasattr(config, "num_steps") else "num_inference_steps", num_inference_steps)
        policy = get_policy_class(config.type).from_pretrained(name, config=config)
        on_device = {"device_processor": {"device": config.device}}
        processors = make_pre_post_processors(config, str(name), preprocessor_overrides=on_device)
        return cls(policy, processors, **kwargs)

    def encode(self, obs: Any) -> th.Tensor:
        """See :meth:`SteerablePolicy.encode <sb3_dsrl.SteerablePolicy.encode>`."""
        return self._sampler.encode(self._observations.batch(obs, self.device))

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """See :meth:`SteerablePolicy.decode <sb3_dsrl.SteerablePolicy.decode>`."""
        noise = w.reshape(-1, *self.noise_shape)
        cond = cond.repeat_interleave(len(noise) // len(cond), dim=0)
        steps = self.num_steps if num_steps is None else num_steps
        assert steps is not None
        chunk = self._sampler.sample(cond, noise, steps)
        return self._to_unit(chunk).reshape(w.shape)

    def _to_unit(self, chunk: th.Tensor) -> th.Tensor:
        actions = self._postprocess(chunk).to(self._low)
        return ((actions - self._low) / self._span - 1.0).clamp(-1.0, 1.0)

    def _normalization(self) -> th.Tensor:
        """What the processors make of zeros and of ones. It tells policies apart that differ in their statistics only."""
        made = []
        for draw in (th.zeros, th.ones):
            frames = map_frames(lambda shape: draw(1, self.obs_horizon, *shape), self.obs_shapes)  # noqa: B023
            batch = self._observations.batch(frames, self.device)
            made += [x.float().flatten()[:64] for key, x in sorted(batch.items()) if key in VECTORS]
            made.append(self._to_unit(draw(1, *self.noise_shape, device=self.device)).flatten())
        return th.cat(made)


def _bounds(action_bounds: tuple[ArrayLike, ArrayLike] | None, action_dim: int) -> tuple[th.Tensor, th.Tensor]:
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), action_dim) for bound in action_bounds or (-1.0, 1.0))
    if not (np.isfinite([low, high]).all() and (low < high).all()):
        raise ValueError(f"action_bounds must be finite, the lower below the higher, found {low} and {high}")
    return th.tensor(low), th.tensor(high)
