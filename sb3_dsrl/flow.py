"""The frozen policy that is steered: noise in, action chunk out."""

# No ``from __future__ import annotations`` here: the hub mixin reads the annotations of ``__init__`` to rebuild networks.
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

from sb3_dsrl import networks
from sb3_dsrl.decoding import Integrate, accelerated, integrate
from sb3_dsrl.networks import EnsembleChunkCritic, StateEncoder, VelocityNet, VelocityUNet


def _to_config(net: Any) -> dict[str, Any]:
    return {"class": type(net).__name__, **net.config}


def _from_config(config: dict[str, Any]) -> Any:
    kwargs = dict(config)
    name = kwargs.pop("class")
    cls = getattr(networks, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"config.json names the network class {name!r}, which sb3_dsrl.networks does not have")
    return cls(**kwargs)


class FlowPolicy(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sb3_dsrl",
    tags=["robotics", "flow-matching"],
    coders={net: (_to_config, _from_config) for net in (VelocityNet, StateEncoder, EnsembleChunkCritic)},
):
    """
    Shortcut-flow policy over action chunks, with the chunk critic that was trained beside it.

    ``encode`` turns observations into features, ``decode`` turns features and noise into a chunk. Everything a stranger
    needs to run it is in the folder that ``save_pretrained`` writes (``config.json`` and ``model.safetensors``).

    :param encoder: observation encoder; its output has ``encoder.cond_dim`` = C features
    :param velocity: velocity field v(x, t, d | cond) over (T, A)
    :param critic: ensemble chunk critic, or None
    :param act_horizon: H, env steps of each chunk that are executed
    :param num_steps: default number of steps of :meth:`decode`
    :param action_offset: index of the chunk's entry that is the action for *now*; other than 0 in legacy checkpoints only
    :param env_id: environment that the demos came from
    :param obs_mode: ManiSkill observation mode
    :param obs_keys: keys of a dict observation that the encoder reads, in order; empty for a flat observation
    :param control_mode: ManiSkill controller that the actions are for
    :param gamma: discount per env step that the critic was trained with
    :param reward_scale: factor on the rewards that the critic was trained with
    :raises ValueError: if the horizons or the networks do not fit each other
    """

    def __init__(
        self,
        encoder: StateEncoder,
        velocity: VelocityNet,
        critic: EnsembleChunkCritic | None = None,
        act_horizon: int = 8,
        num_steps: int = 8,
        action_offset: int = 0,
        env_id: str | None = None,
        obs_mode: str = "state",
        obs_keys: tuple[str, ...] = (),
        control_mode: str | None = None,
        gamma: float = 0.99,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if action_offset < 0 or num_steps < 1:
            raise ValueError(f"action_offset must be >= 0 and num_steps >= 1, found {action_offset} and {num_steps}")
        if not 1 <= act_horizon <= velocity.pred_horizon - action_offset:
            raise ValueError(
                f"act_horizon must lie in 1..{velocity.pred_horizon - action_offset} (pred_horizon - action_offset), "
                f"found {act_horizon}"
            )
        if velocity.cond_dim != encoder.cond_dim:
            raise ValueError(f"velocity expects {velocity.cond_dim} features, but the encoder gives {encoder.cond_dim}")
        self.encoder, self.velocity, self.critic = encoder, velocity, critic
        self.obs_horizon, self.pred_horizon, self.act_horizon = encoder.obs_horizon, velocity.pred_horizon, act_horizon
        self.action_dim, self.cond_dim = velocity.action_dim, encoder.cond_dim
        self.num_steps, self.action_offset = num_steps, action_offset
        self.env_id, self.obs_mode, self.obs_keys, self.control_mode = env_id, obs_mode, tuple(obs_keys), control_mode
        self.gamma, self.reward_scale = gamma, reward_scale
        self._integrate: Integrate = integrate

    @classmethod
    def create(
        cls,
        obs_dim: int,
        action_dim: int,
        obs_horizon: int = 2,
        pred_horizon: int = 16,
        act_horizon: int = 8,
        velocity_class: type[VelocityNet] = VelocityUNet,
        velocity_kwargs: dict[str, Any] | None = None,
        critic_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "FlowPolicy":
        """
        Builds an untrained policy for flat (state) observations from sizes alone.

        :param obs_dim: dimensions of one frame
        :param action_dim: A
        :param obs_horizon: frames that the policy sees
        :param pred_horizon: T
        :param act_horizon: H
        :param velocity_class: ``VelocityUNet`` or ``VelocityMLP``
        :param velocity_kwargs: further arguments of the velocity network
        :param critic_kwargs: further arguments of the critic
        :param kwargs: further arguments of the policy itself
        """
        encoder = StateEncoder(obs_dim, obs_horizon)
        velocity = velocity_class(action_dim, pred_horizon, encoder.cond_dim, **(velocity_kwargs or {}))
        critic = EnsembleChunkCritic(encoder.cond_dim, act_horizon, action_dim, **(critic_kwargs or {}))
        return cls(encoder, velocity, critic, act_horizon=act_horizon, **kwargs)

    @property
    def device(self) -> th.device:
        """Device that the weights are on."""
        return next(self.parameters()).device

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape (T, A) of one noise."""
        return (self.pred_horizon, self.action_dim)

    def encode(self, obs: th.Tensor | np.ndarray) -> th.Tensor:
        """
        Features of stacked observations: what the velocity field is conditioned on and what the latent policy sees.

        :param obs: (B, obs_horizon, obs_dim), oldest frame first
        :return: (B, C)
        """
        return self.encoder(th.as_tensor(obs, dtype=th.float32, device=self.device))

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """
        Integrates the flow from noise to chunk in equal shortcut steps of size ``d = 1 / num_steps``.

        :param cond: (B, C)
        :param w: noise, (B, T, A), or M noises for each observation, (B, M, T, A)
        :param num_steps: steps; None is the policy's own ``num_steps``. Training knows the step sizes 1, 1/2, 1/4 and 1/8;
            other numbers of steps than 1, 2, 4 and 8 rely on the network between and beyond them.
        :return: chunks of the shape of w, clipped to [-1, 1]
        :raises ValueError: if ``num_steps`` is not positive
        """
        n = self.num_steps if num_steps is None else num_steps
        if n < 1:
            raise ValueError(f"num_steps must be at least 1, found {n}")
        x = self._integrate(self.velocity, cond, w if w.dim() == 4 else w[:, None], n)
        return x.reshape(w.shape).clamp(-1.0, 1.0)

    def accelerate(self, dtype: th.dtype | None = None, compile_kwargs: dict[str, Any] | None = None) -> "FlowPolicy":
        """
        Decodes in lower precision, compiled, or both, from now on. For a GPU; on a CPU the default is faster.
        ``flow.accelerate(torch.bfloat16, dict(mode="reduce-overhead"))`` replays CUDA graphs.

        :param dtype: of the matrix products (autocast); None is float32
        :param compile_kwargs: arguments of ``torch.compile``; None does not compile
        :return: the policy itself; ``accelerate()`` goes back to the default
        """
        self._integrate = integrate if dtype is None and compile_kwargs is None else accelerated(dtype, compile_kwargs)
        return self

    def executed(self, chunk: th.Tensor) -> th.Tensor:
        """
        The part of a chunk that is sent to the env. This slice convention exists nowhere else.

        :param chunk: (..., T, A)
        :return: (..., H, A)
        """
        return chunk[..., self.action_offset : self.action_offset + self.act_horizon, :]

    @th.no_grad()
    def sample(self, obs: th.Tensor | np.ndarray, num_steps: int | None = None) -> th.Tensor:
        """
        Chunks of the unsteered policy: decodes fresh noise w ~ N(0, I).

        :param obs: (B, obs_horizon, obs_dim)
        :param num_steps: see :meth:`decode`
        :return: (B, T, A)
        """
        cond = self.encode(obs)
        return self.decode(cond, th.randn(len(cond), *self.noise_shape, device=cond.device), num_steps)

    def freeze(self) -> "FlowPolicy":
        """Evaluation mode and no gradients, for good. Returns the policy itself."""
        return self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """
        Hash of what makes a flow this flow: encoder, velocity field, horizons. ``num_steps`` is not part of it, so
        that a policy may be moved to a cheaper decode of the same flow. The critic is not part
        of it, since steering does not run it.

        :return: 16 hexadecimal digits
        """
        digest = hashlib.sha256(repr((self.noise_shape, self.act_horizon, self.obs_horizon, self.action_offset)).encode())
        for name, module in (("encoder", self.encoder), ("velocity", self.velocity)):
            for key, value in sorted(module.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "FlowPolicy":
        """
        Loads a folder written by ``save_pretrained``, or a repository of the Hugging Face hub. The result is frozen.

        :param pretrained_model_name_or_path: folder or repository id
        :param kwargs: further arguments of ``huggingface_hub.PyTorchModelHubMixin.from_pretrained``
        :raises FileNotFoundError: if there is no such folder or repository, or ``config.json`` or
            ``model.safetensors`` is missing
        :raises ValueError: if the files are damaged or do not fit each other
        """
        folder = Path(pretrained_model_name_or_path)
        kwargs.setdefault("strict", True)
        if folder.is_dir():
            for name in ("config.json", "model.safetensors"):
                if not (folder / name).is_file():
                    raise FileNotFoundError(
                        f"{folder} holds no {name}: expected a folder written by FlowPolicy.save_pretrained"
                    )
        try:
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs).freeze()
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{pretrained_model_name_or_path} is neither a folder written by FlowPolicy.save_pretrained "
                f"nor a model on the Hugging Face hub that can be reached from here"
            ) from error
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{pretrained_model_name_or_path} does not hold a valid FlowPolicy: {error}") from error

    def _save_pretrained(self, save_directory: Path) -> None:
        for net in (self.encoder, self.velocity, self.critic):
            if net is not None and getattr(networks, type(net).__name__, None) is not type(net):
                raise ValueError(f"Only networks of sb3_dsrl.networks can be saved, found {type(net).__name__}")
        # What the policy is now, not what it was built with
        names = ("act_horizon", "num_steps", "action_offset", "env_id", "obs_mode", "control_mode", "gamma", "reward_scale")
        self._hub_mixin_config = dict(
            encoder=_to_config(self.encoder),
            velocity=_to_config(self.velocity),
            critic=None if self.critic is None else _to_config(self.critic),
            obs_keys=list(self.obs_keys),
            **{name: getattr(self, name) for name in names},
        )
        super()._save_pretrained(save_directory)
