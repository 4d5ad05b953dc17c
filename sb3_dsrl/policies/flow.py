"""The frozen policy that is steered: noise in, action chunk out."""

# No ``from __future__ import annotations`` here: the hub mixin reads the annotations of ``__init__`` to rebuild networks.
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch as th
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

from sb3_dsrl.policies.action_normalizer import ActionNormalizer
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.decoding import Integrate, accelerated, integrate, walk_back
from sb3_dsrl.policies.encoders import ImageEncoder, ObsEncoder, StateEncoder
from sb3_dsrl.policies.inversion import Inversion, gauss_newton, root_mean_square
from sb3_dsrl.policies.losses import shortcut_loss
from sb3_dsrl.policies.network_config import from_config, to_config
from sb3_dsrl.policies.networks import EnsembleChunkCritic, VelocityNet, VelocityUNet
from sb3_dsrl.policies.spatial_features import SpatialFeatures, StateLayout
from sb3_dsrl.utils.devices import get_device
from sb3_dsrl.utils.hub import About, HubModel
from sb3_dsrl.utils.integrity import check_config, config_sha256, one_line
from sb3_dsrl.utils.observations import map_frames

#: How the hub mixin builds networks from ``config.json``; subclasses must name it, too. What it writes at construction is
#: replaced when the policy is saved.
CODERS: dict[type, Any] = {
    net: (lambda net: type(net).__name__, from_config)
    for net in (VelocityNet, ObsEncoder, EnsembleChunkCritic, ActionNormalizer)
}


#: Chunks that are inverted at once, which bounds the memory of their Jacobians.
INVERTED_AT_ONCE = 1_024

#: Subclasses that come with the package, for folders that name them
SUBCLASSES = {"DiffusionPolicy": "sb3_dsrl.policies.diffusion"}


def _saved_by(folder: Path) -> type["FlowPolicy"]:
    name = json.loads((folder / "config.json").read_text()).get("policy_class")
    return getattr(import_module(SUBCLASSES[name]), name) if name in SUBCLASSES else FlowPolicy


class FlowPolicy(
    SteerablePolicy,
    HubModel,
    PyTorchModelHubMixin,
    library_name="sb3_dsrl",
    tags=["robotics", "flow-matching"],
    coders=CODERS,
):
    """
    Shortcut-flow policy over action chunks, with the chunk critic that was trained beside it.

    ``encode`` turns observations into features, ``decode`` turns features and noise into a chunk. Everything a stranger
    needs to run it is in the folder that ``save_pretrained`` writes (``config.json`` and ``model.safetensors``).

    :param encoder: observation encoder; its output has ``encoder.cond_dim`` = C features
    :param net: velocity field v(x, t, d | cond) over (T, A)
    :param critic: ensemble chunk critic, or None
    :param act_horizon: H, env steps of each chunk that are executed
    :param num_steps: default number of steps of :meth:`decode`
    :param action_offset: index of the chunk's entry that is the action for *now*; other than 0 in legacy checkpoints only
    :param env_id: environment that the demos came from
    :param obs_mode: ManiSkill observation mode
    :param control_mode: ManiSkill controller that the actions are for
    :param gamma: discount per env step that the critic was trained with
    :param reward_scale: factor on the rewards that the critic was trained with
    :param action_normalizer: from actions to the numbers that ``net`` sees; None leaves them as they are, as in foreign
        checkpoints and in folders that were saved before there were normalisers
    :param policy_class: name of the class that saved this policy, for a check; None checks nothing
    :raises ValueError: if the horizons or the networks do not fit each other, or another class saved the policy
    """

    num_steps: int

    def __init__(
        self,
        encoder: ObsEncoder,
        net: VelocityNet,
        critic: EnsembleChunkCritic | None = None,
        act_horizon: int = 8,
        num_steps: int = 8,
        action_offset: int = 0,
        env_id: str | None = None,
        obs_mode: str = "state",
        control_mode: str | None = None,
        gamma: float = 0.99,
        reward_scale: float = 1.0,
        action_normalizer: ActionNormalizer | None = None,
        policy_class: str | None = None,
    ) -> None:
        if policy_class is not None and policy_class != type(self).__name__:
            raise ValueError(f"it was saved by {policy_class}: load it with {policy_class}.from_pretrained")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, found {num_steps}")
        super().__init__(
            obs_shapes=encoder.obs_shapes,
            obs_horizon=encoder.obs_horizon,
            noise_shape=(net.pred_horizon, net.action_dim),
            cond_dim=encoder.cond_dim,
            act_horizon=act_horizon,
            action_offset=action_offset,
            critic=critic,
            env_id=env_id,
            obs_mode=obs_mode,
            control_mode=control_mode,
            gamma=gamma,
            reward_scale=reward_scale,
        )
        if net.cond_dim != encoder.cond_dim:
            raise ValueError(f"net expects {net.cond_dim} features, but the encoder gives {encoder.cond_dim}")
        self.encoder, self.net, self.num_steps = encoder, net, num_steps
        self.action_normalizer = action_normalizer
        self._integrate: Integrate = integrate

    @classmethod
    def create(
        cls,
        obs_dim: int,
        action_dim: int,
        obs_horizon: int = 2,
        pred_horizon: int = 16,
        act_horizon: int = 8,
        image_shapes: dict[str, tuple[int, int, int]] | None = None,
        backbone: nn.Module | Callable[[int], nn.Module] | None = None,
        net_class: type[VelocityNet] = VelocityUNet,
        net_kwargs: dict[str, Any] | None = None,
        critic_kwargs: dict[str, Any] | None = None,
        normalize_actions: bool = True,
        state_layout: StateLayout | None = None,
        **kwargs: Any,
    ) -> "FlowPolicy":
        """
        Builds an untrained policy from sizes alone.

        :param obs_dim: dimensions of the state part of one frame
        :param action_dim: A
        :param obs_horizon: frames that the policy sees
        :param pred_horizon: T
        :param act_horizon: H
        :param image_shapes: (height, width, channels) of ``rgb`` and ``depth``; None is a flat (state) observation
        :param backbone: of the images, or what makes it, see :class:`~sb3_dsrl.policies.encoders.ImageEncoder`
        :param net_class: ``VelocityUNet`` or ``VelocityMLP``
        :param net_kwargs: further arguments of the network
        :param critic_kwargs: further arguments of the critic
        :param normalize_actions: with a normaliser of actions, which training fits to the demos
        :param state_layout: name and size of each part of a flat observation, of which
            :class:`~sb3_dsrl.policies.spatial_features.SpatialFeatures` are made; None takes the observation as it is
        :param kwargs: further arguments of the policy itself
        :raises ValueError: if a backbone comes without images or a layout with them, or horizons and networks do not fit
        """
        if image_shapes and state_layout:
            raise ValueError(
                "A layout of the state was given, but there are images: spatial features are of flat observations"
            )
        features = SpatialFeatures(state_layout) if state_layout else None
        encoder: ObsEncoder = StateEncoder(obs_dim, obs_horizon, features=features)
        if image_shapes:
            encoder = ImageEncoder(obs_dim, image_shapes, backbone, obs_horizon)
        elif backbone is not None:
            raise ValueError("A backbone was given, but there are no images: pass image_shapes, or demos with images")
        net = net_class(action_dim, pred_horizon, encoder.cond_dim, **(net_kwargs or {}))
        critic = EnsembleChunkCritic(encoder.cond_dim, act_horizon, action_dim, **(critic_kwargs or {}))
        normalizer = ActionNormalizer(action_dim) if normalize_actions else None
        return cls(encoder, net, critic, act_horizon=act_horizon, action_normalizer=normalizer, **kwargs)

    def encode(self, obs: Any) -> th.Tensor:
        """
        Features of stacked observations: what the velocity field is conditioned on and what the latent policy sees.

        :param obs: (B, obs_horizon, D), or a dict of such arrays or tensors; oldest frame first
        :return: (B, C)
        :raises ValueError: if keys or shapes are not the encoder's
        """
        return self.encoder(map_frames(self._tensor, obs))

    def _tensor(self, x: Any) -> th.Tensor:
        x = th.as_tensor(x, device=self.device)
        return x if x.dtype == th.uint8 else x.float()  # images become floats where they are encoded

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
        return self._to_actions(self._generate(cond, w, self._steps(num_steps)))

    def _steps(self, num_steps: int | None) -> int:
        n = self.num_steps if num_steps is None else num_steps
        if n < 1:
            raise ValueError(f"num_steps must be at least 1, found {n}")
        return n

    def _generate(self, cond: th.Tensor, w: th.Tensor, n: int) -> th.Tensor:
        """What :meth:`decode` returns, in the network's units and not clipped."""
        return self._integrate(self.net, cond, w if w.dim() == 4 else w[:, None], n).reshape(w.shape)

    def _undo(self, cond: th.Tensor, x: th.Tensor, n: int) -> th.Tensor:
        """About the noise of a chunk (B, T, A), which is in the network's units: where :meth:`invert` begins."""
        return walk_back(self.net, cond, x, n)

    @th.no_grad()
    def invert(
        self, cond: th.Tensor, chunk: th.Tensor, num_steps: int | None = None, n_iterations: int = 5, sigma: float = 0.01
    ) -> Inversion:
        """
        The noise whose decode comes nearest to a chunk: the flow integrated backwards, then Gauss-Newton steps. Of all noises
        that reach the chunk the likeliest under the prior is sought, as if the chunk were known up to a standard deviation of
        ``sigma``: the sum of ``||decode(w) - chunk||^2`` and ``sigma^2 ||w||^2`` is minimised.

        :param cond: (B, C)
        :param chunk: actions in [-1, 1], (B, T, A), or the executed part alone, (B, H, A); if H is T that is the same
        :param num_steps: of :meth:`decode`
        :param n_iterations: Gauss-Newton steps; 0 integrates backwards alone
        :param sigma: in the units of the noise, which with an action normaliser are standard deviations of the demos' actions;
            0 seeks the nearest chunk, whatever noise that takes
        :return: the noise, and how near it comes
        :raises ValueError: if the chunks have another shape, are NaN or infinite, or an argument is out of range
        """
        n = self._steps(num_steps)
        rows = th.arange(self.pred_horizon, device=chunk.device)
        if chunk.shape[1:2] == (self.act_horizon,):
            rows = self.executed(rows[:, None])[:, 0]
        expected = (len(cond), len(rows), self.action_dim)
        if tuple(chunk.shape) != expected or not chunk.isfinite().all():
            raise ValueError(
                f"Chunks to invert must be finite and have shape (B, T, A) = {expected}, or be their executed part, found "
                f"{tuple(chunk.shape)}"
            )
        parts = []
        for c, part in zip(cond.split(INVERTED_AT_ONCE), chunk.split(INVERTED_AT_ONCE), strict=True):
            ways = partial(self._generate, c, n=n), partial(self._undo, c, n=n)
            at_bound = part.sign() * (part.abs() >= 1.0)
            wanted = self._from_actions(part)
            parts.append(gauss_newton(*ways, wanted, at_bound, rows, self.pred_horizon, sigma, n_iterations))
        noise = th.cat(parts)
        found = self.decode(cond, noise, n)
        return Inversion(noise, found, root_mean_square(found[:, rows] - chunk), root_mean_square(noise))

    def _to_actions(self, x: th.Tensor) -> th.Tensor:
        """From the network's units to actions, clipped; ``imitation_loss`` goes the other way."""
        return (x if self.action_normalizer is None else self.action_normalizer.undo(x)).clamp(-1.0, 1.0)

    def _from_actions(self, chunk: th.Tensor) -> th.Tensor:
        return chunk if self.action_normalizer is None else self.action_normalizer(chunk)

    def fit_action_normalizer(self, actions: th.Tensor) -> None:
        """
        Fits the normaliser to demos, if there is one that was never fitted.

        :param actions: (n, A)
        """
        if self.action_normalizer is not None and self.action_normalizer.needs_fit:
            self._fit(self.action_normalizer, actions)

    @staticmethod
    def _fit(normalizer: ActionNormalizer, actions: th.Tensor) -> None:
        normalizer.fit_moments(actions)

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

    def imitation_loss(
        self,
        teacher: nn.Module,
        cond: th.Tensor,
        chunk: th.Tensor,
        weights: th.Tensor | None = None,
        consistency_fraction: float = 0.25,
    ) -> dict[str, th.Tensor]:
        """
        What stage 0 minimises: the sum of these terms.

        :param teacher: exponential moving average of the velocity field
        :param cond: (B, C)
        :param chunk: actions of the env, (B, T, A)
        :param weights: weight of each sample, (B,); None is 1
        :param consistency_fraction: part of the batch for self-consistency
        :return: name -> loss
        :raises ValueError: if ``consistency_fraction`` is out of range
        """
        if not 0 <= consistency_fraction < 1:
            raise ValueError(f"consistency_fraction must lie in [0, 1), found {consistency_fraction}")
        target = self._from_actions(chunk)
        matching, consistency = shortcut_loss(self.net, teacher, cond, target, weights, consistency_fraction)
        return {"flow/matching_loss": matching, "flow/consistency_loss": consistency}

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, device: th.device | str = "auto", **kwargs: Any
    ) -> "FlowPolicy":
        """
        Loads a folder written by ``save_pretrained``, or a repository of the Hugging Face hub. The result is frozen.
        ``FlowPolicy`` itself loads folders of its subclasses, too, as what they are.

        :param pretrained_model_name_or_path: folder or repository id
        :param device: where the policy goes; "auto" is a GPU where there is one
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
            saved_by = cls
            if folder.is_dir():
                check_config(folder, "model.safetensors")
                saved_by = _saved_by(folder) if cls is FlowPolicy else cls
            flow = super(FlowPolicy, saved_by).from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{pretrained_model_name_or_path} is neither a folder written by FlowPolicy.save_pretrained "
                f"nor a model on the Hugging Face hub that can be reached from here"
            ) from error
        except Exception as error:  # what a damaged config.json or header raises depends on the byte
            raise ValueError(f"{pretrained_model_name_or_path} does not hold a valid FlowPolicy: {one_line(error)}") from error
        return flow.to(get_device(device)).freeze()

    def about(self) -> About:
        """What the model card tells of the policy."""
        name = type(self).__name__
        imports = f"from sb3_dsrl import make_latent_env\nfrom {type(self).__module__} import {name}"
        if type(self) is FlowPolicy:
            imports = "from sb3_dsrl import FlowPolicy, make_latent_env"
        facts = dict(
            task=self.env_id or "unknown",
            observations=f"{self.obs_mode}, {self.obs_shapes}, {self.obs_horizon} frames",
            control_mode=self.control_mode,
            pred_horizon=self.pred_horizon,
            act_horizon=self.act_horizon,
            action_dim=self.action_dim,
            num_steps=self.num_steps,
            network=type(self.net).__name__,
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            critic="none" if self.critic is None else f"for gamma {self.gamma}, reward_scale {self.reward_scale}",
            fingerprint=self.fingerprint(),
        )
        text = (
            "A frozen policy that turns noise into chunks of actions. `sb3_dsrl` steers it: reinforcement learning chooses "
            "the noise, the weights stay as they are."
        )
        load = f"""
{imports}

flow = {name}.from_pretrained("{{path}}")
env = make_latent_env("{self.env_id or "MyEnv-v0"}", flow)  # its actions are the flow's noise
"""
        return About("Flow policy", text, self.env_id, facts, load)

    def _save_pretrained(self, save_directory: Path) -> None:
        # What the policy is now, not what it was built with
        names = ("act_horizon", "num_steps", "action_offset", "env_id", "obs_mode", "control_mode", "gamma", "reward_scale")
        self._hub_mixin_config = dict(
            encoder=to_config(self.encoder),
            net=to_config(self.net),
            critic=to_config(self.critic),
            action_normalizer=to_config(self.action_normalizer),
            policy_class=type(self).__name__,
            **{name: getattr(self, name) for name in names},
        )
        try:
            super()._save_pretrained(save_directory)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{save_directory / 'model.safetensors'} cannot be written: {error}") from error
        self._hub_mixin_config["sha256"] = config_sha256(self._hub_mixin_config, save_directory / "model.safetensors")
