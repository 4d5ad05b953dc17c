"""How noise becomes a chunk in the policies of LeRobot: what differs between them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch as th

from sb3_dsrl.policies.lerobot.observations import Batch

TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


class Sampler(Protocol):
    """
    What :class:`~sb3_dsrl.LeRobotPolicy` asks of a kind of policy. T, H and A are LeRobot's ``horizon`` or ``chunk_size``,
    ``n_action_steps`` and the size of the action.
    """

    obs_horizon: int
    noise_shape: tuple[int, int]
    act_horizon: int
    action_offset: int
    num_steps: int
    #: whether the policy reads a sentence, the task
    reads_task: bool

    def encode(self, batch: Batch) -> th.Tensor:
        """From a preprocessed batch to features, (B, C): all that :meth:`sample` needs."""

    def sample(self, cond: th.Tensor, noise: th.Tensor, num_steps: int) -> th.Tensor:
        """From features (B, C) and noise (B, T, A) to the policy's own, normalised actions, (B, T, A)."""


def sampler_of(policy: Any) -> Sampler:
    """
    :param policy: of LeRobot
    :raises ValueError: if it has no noise, or adds noise of its own
    """
    kinds: dict[str, Any] = dict(diffusion=DiffusionSampler, smolvla=VLASampler, pi0=VLASampler, pi05=VLASampler)
    name = getattr(policy, "name", type(policy).__name__)
    if name not in kinds:
        raise ValueError(f"A LeRobot policy of type {name!r} cannot be steered; those of {sorted(kinds)} can")
    return kinds[name](policy)


class DiffusionSampler:
    """
    ``DiffusionPolicy``: its features are the global conditioning.

    :param policy: LeRobot's policy
    :raises ValueError: if its scheduler is not DDIM
    """

    reads_task = False

    def __init__(self, policy: Any) -> None:
        config = policy.config
        if config.noise_scheduler_type != "DDIM":
            raise ValueError(
                f"The policy's scheduler is {config.noise_scheduler_type}, which adds noise of its own; "
                f"LeRobotPolicy.from_pretrained loads the same weights with DDIM"
            )
        self._model, self._images = policy.diffusion, list(config.image_features)
        self.obs_horizon = config.n_obs_steps
        self.noise_shape = (config.horizon, config.action_feature.shape[0])
        self.act_horizon, self.action_offset = config.n_action_steps, config.n_obs_steps - 1
        self.num_steps = self._model.num_inference_steps

    def encode(self, batch: Batch) -> th.Tensor:
        """See :class:`Sampler`."""
        if self._images:
            batch = batch | {"observation.images": th.stack([batch[key] for key in self._images], dim=-4)}
        return self._model._prepare_global_conditioning(batch)

    def sample(self, cond: th.Tensor, noise: th.Tensor, num_steps: int) -> th.Tensor:
        """See :class:`Sampler`."""
        with _set(self._model, "num_inference_steps", num_steps):
            return self._model.conditional_sample(len(noise), global_cond=cond, noise=noise)


class VLASampler:
    """
    ``SmolVLAPolicy``, ``PI0Policy`` and ``PI05Policy``: a language model reads images and a sentence, a flow reads the
    language model. Features are what goes into the language model: the embedded tokens of images and sentence, which of them
    count, and the state. They are exact but many, so let the latent policy look at the env instead (``obs="env"``).

    The noise of these policies is as wide as their widest robot. Where this one has no action, the noise is a fixed draw from
    N(0, I): the policy was trained with noise there, too, and the same noise must give the same chunk.

    :param policy: LeRobot's policy
    """

    reads_task = True
    obs_horizon, action_offset = 1, 0

    def __init__(self, policy: Any) -> None:
        config = policy.config
        self._policy, self._model, self._config = policy, policy.model, config
        self.noise_shape = (config.chunk_size, config.action_feature.shape[0])
        self.act_horizon = config.n_action_steps
        self._steps = "num_steps" if hasattr(config, "num_steps") else "num_inference_steps"
        self.num_steps = getattr(config, self._steps)
        idle = config.max_action_dim - self.noise_shape[1]
        self._idle = th.randn(config.chunk_size, idle, generator=th.Generator().manual_seed(0))
        self._prefix: tuple[th.Size, th.dtype, th.Tensor] | None = None  # (P, E), type, attention mask (P,)

    def encode(self, batch: Batch) -> th.Tensor:
        """See :class:`Sampler`."""
        policy = self._policy
        if hasattr(policy, "_prepare_batch"):
            batch = policy._prepare_batch(batch)
        prepare_images = policy.prepare_images if hasattr(policy, "prepare_images") else policy._preprocess_images
        images, image_masks = prepare_images(batch)
        state = policy.prepare_state(batch) if hasattr(policy, "prepare_state") else None  # pi0.5 reads it as words
        is_token = dict(state=state) if policy.name == "smolvla" else {}
        embedded, counts, attention = self._model.embed_prefix(images, image_masks, batch[TOKENS], batch[MASK], **is_token)
        self._prefix = (embedded.shape[1:], embedded.dtype, attention[0].cpu())
        parts = [embedded.flatten(1), counts, *([] if state is None else [state])]
        return th.cat([part.float() for part in parts], dim=1)

    def sample(self, cond: th.Tensor, noise: th.Tensor, num_steps: int) -> th.Tensor:
        """See :class:`Sampler`."""
        assert self._prefix is not None
        (n_tokens, width), dtype, attention = self._prefix
        embedded, counts, state = cond.split([n_tokens * width, n_tokens, cond.shape[1] - n_tokens * (width + 1)], dim=1)
        prefix = (
            embedded.unflatten(1, (n_tokens, width)).to(dtype),
            counts.bool(),
            attention.to(cond.device).expand(len(cond), -1),
        )
        idle = self._idle.to(noise).expand(len(noise), -1, -1)
        unread = th.zeros(len(cond), 1, device=cond.device)  # tokens: only their number and device are asked for
        known = [None, None, unread, unread, *([state] if hasattr(self._policy, "prepare_state") else [])]
        with _set(self._config, self._steps, num_steps), _set(self._model, "embed_prefix", lambda *_, **__: prefix):
            chunk = self._model.sample_actions(*known, noise=th.cat([noise, idle], dim=-1))
        chunk = chunk[..., : self.noise_shape[1]]
        if getattr(self._config, "adapt_to_pi_aloha", False):
            chunk = self._policy._pi_aloha_encode_actions(chunk)
        return chunk


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of LeRobot's is another one for a while."""
    own, had = owner.__dict__.get(name), name in owner.__dict__
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
