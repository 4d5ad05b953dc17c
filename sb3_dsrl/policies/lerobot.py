"""Steers a diffusion policy of LeRobot (https://github.com/huggingface/lerobot, 0.4). Nothing here imports LeRobot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

from sb3_dsrl.policies.base import SteerablePolicy, check_frame_shapes
from sb3_dsrl.policies.networks import EnsembleChunkCritic

Batch = dict[str, th.Tensor]


class LeRobotDiffusionPolicy(SteerablePolicy):
    """
    A trained ``lerobot.policies.diffusion.modeling_diffusion.DiffusionPolicy`` as a policy that can be steered.

    Its global conditioning is what the latent policy sees; its ``noise`` argument is what it steers. LeRobot keeps
    normalisation outside of the policy, so it is given here.

    :param policy: LeRobot's policy, with a DDIM scheduler: DDPM adds noise of its own at every step
    :param obs_shapes: shape of one frame of the env: (D,), or a dict of ``state`` and ``rgb`` (height, width, 3 a camera)
    :param preprocess: from ``observation.state`` (B, n_obs_steps, D) and ``observation.images``
        (B, n_obs_steps, cameras, 3, height, width) in [0, 1] to what the policy was trained on; None changes nothing
    :param postprocess: from the policy's actions to the env's, in [-1, 1]; None changes nothing
    :param critic: ensemble chunk critic, or None
    :param kwargs: ``env_id``, ``obs_mode``, ``control_mode``, ``gamma``, ``reward_scale`` of
        :class:`~sb3_dsrl.policies.base.SteerablePolicy`
    :raises TypeError: if ``obs_shapes`` are no shapes
    :raises ValueError: if the scheduler is not deterministic
    """

    def __init__(
        self,
        policy: Any,
        obs_shapes: Any,
        preprocess: Callable[[Batch], Batch] | None = None,
        postprocess: Callable[[th.Tensor], th.Tensor] | None = None,
        critic: EnsembleChunkCritic | None = None,
        **kwargs: Any,
    ) -> None:
        config = policy.config
        if config.noise_scheduler_type != "DDIM":
            raise ValueError(
                f"The policy's scheduler is {config.noise_scheduler_type}, which adds noise of its own; set "
                f"config.noise_scheduler_type='DDIM' and load the weights again"
            )
        check_frame_shapes(obs_shapes)
        frame = (config.n_obs_steps, *(obs_shapes["state"] if isinstance(obs_shapes, dict) else obs_shapes))
        images = obs_shapes.get("rgb") if isinstance(obs_shapes, dict) else None
        probe: Any = th.zeros(1, *frame)
        if images is not None:
            probe = {"state": probe, "rgb": th.zeros(1, config.n_obs_steps, *images, dtype=th.uint8)}
        identity: Callable[[Any], Any] = lambda x: x  # noqa: E731
        with th.no_grad():
            device = next(policy.parameters()).device
            batch = (preprocess or identity)(_batch(probe, device))
            cond_dim = policy.diffusion._prepare_global_conditioning(batch).shape[1]
        super().__init__(
            obs_shapes=obs_shapes,
            obs_horizon=config.n_obs_steps,
            noise_shape=(config.horizon, config.action_feature.shape[0]),
            cond_dim=cond_dim,
            act_horizon=config.n_action_steps,
            action_offset=config.n_obs_steps - 1,
            critic=critic,
            **kwargs,
        )
        self.policy, self.num_steps = policy, policy.diffusion.num_inference_steps
        self._preprocess, self._postprocess = preprocess or identity, postprocess or identity

    def encode(self, obs: Any) -> th.Tensor:
        """See :meth:`SteerablePolicy.encode <sb3_dsrl.policies.base.SteerablePolicy.encode>`."""
        return self.policy.diffusion._prepare_global_conditioning(self._preprocess(_batch(obs, self.device)))

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """See :meth:`SteerablePolicy.decode <sb3_dsrl.policies.base.SteerablePolicy.decode>`."""
        noise = w.reshape(-1, *self.noise_shape)
        cond = cond.repeat_interleave(len(noise) // len(cond), dim=0)
        diffusion = self.policy.diffusion
        own_steps = diffusion.num_inference_steps
        diffusion.num_inference_steps = self.num_steps if num_steps is None else num_steps
        try:
            chunk = diffusion.conditional_sample(len(noise), global_cond=cond, noise=noise)
        finally:
            diffusion.num_inference_steps = own_steps
        return self._postprocess(chunk).reshape(w.shape).clamp(-1.0, 1.0)


def _batch(obs: Any, device: th.device) -> Batch:
    """LeRobot's names and layouts."""
    parts = obs if isinstance(obs, dict) else {"state": obs}
    batch = {"observation.state": th.as_tensor(parts["state"], device=device).float()}
    if "rgb" in parts:
        rgb = th.as_tensor(parts["rgb"], device=device).float() / 255
        batch["observation.images"] = rgb.unflatten(-1, (-1, 3)).permute(0, 1, 4, 5, 2, 3)
    return batch
