"""Stage 0: learn a flow from demos.

The flow is trained by flow matching with a self-consistency loss (shortcut models, https://arxiv.org/abs/2410.12557),
optionally weighted by exponentiated advantages as in AWAC (https://arxiv.org/abs/2006.09359).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.policies.networks import VelocityNet
from sb3_dsrl.policies.spatial_features import StateLayout
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import check_demos_fit
from sb3_dsrl.stage0.precision import fast_products
from sb3_dsrl.stage0.validation import Judge, Validation
from sb3_dsrl.stage0.weights import exp_weights
from sb3_dsrl.stage0.windows import FeatureWindows, ImageWindows
from sb3_dsrl.utils.checkpoint import Stateful, TrainingCheckpoint
from sb3_dsrl.utils.devices import get_device
from sb3_dsrl.utils.progress import ProgressLoop

#: Demo windows that are decoded and scored together
BLOCK_SIZE = 1024


@dataclass(frozen=True)
class AdvantageWeighting:
    """
    Weighs demo windows by ``exp(beta * A)``, with the z-scored advantage A under ``flow.critic``. Train the critic first, with
    :func:`train_critic`.

    :param beta: inverse temperature
    :param max_weight: clip of the weights
    :raises ValueError: if one of them is not positive
    """

    beta: float = 1.0
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, found {value}; without advantage weighting pass advantage=None")


@dataclass(frozen=True)
class ImageTraining:
    """
    How a flow with images is trained.

    :param train_encoder: train the encoder with the flow; False keeps it as it is and computes the features once
    :param random_shift_pad: largest random shift in pixels while the encoder learns; 0 shifts nothing
    :param memory: bytes of images that are held in memory at a time while the encoder learns
    :param repeats: how often a window appears in each batch while the encoder learns: it is encoded once, and the loss draws
        another noise each time. Encoding is most of the work.
    :raises ValueError: if ``random_shift_pad`` is negative or ``repeats`` is not positive
    """

    train_encoder: bool = True
    random_shift_pad: int = 4
    memory: float = 2e9
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, found {self.repeats}")
        if self.random_shift_pad < 0:
            raise ValueError(f"random_shift_pad must be >= 0, found {self.random_shift_pad}")


def create_flow(
    demos: Demos | str | Path,
    policy_class: type[FlowPolicy] = FlowPolicy,
    *,
    spatial_features: bool = True,
    state_layout: StateLayout | None = None,
    **kwargs: Any,
) -> FlowPolicy:
    """
    An untrained flow that fits demos: sizes, observation mode, controller and env id are theirs, and so are the statistics
    that it normalises observations and actions with.

    :param demos: demos, or the path of an ``.h5`` file
    :param policy_class: :class:`~sb3_dsrl.policies.diffusion.DiffusionPolicy` makes a diffusion policy
    :param spatial_features: let the encoder make :class:`~sb3_dsrl.policies.spatial_features.SpatialFeatures` of flat
        observations whose layout is known
    :param state_layout: name and size of each part of a flat observation, as ``sb3_dsrl.state_layout(env_id)`` finds them;
        None is what the demos say, if they do
    :param kwargs: arguments of :meth:`FlowPolicy.create`, such as ``net_class``, ``obs_horizon``, ``pred_horizon``,
        ``act_horizon``, ``gamma``
    :return: the flow, on the CPU
    :raises ValueError: if an argument does not fit the demos or another argument
    """
    if not isinstance(demos, Demos):
        demos = load_demos(demos)
    about = dict(env_id=demos.env_id, obs_mode=demos.obs_mode, control_mode=demos.control_mode)
    if spatial_features:
        kwargs["state_layout"] = state_layout or demos.state_layout
    elif state_layout is not None:
        raise ValueError("state_layout does nothing with spatial_features=False")
    sizes = dict(obs_dim=demos.obs_dim, action_dim=demos.action_dim, image_shapes=demos.image_shapes)
    flow = policy_class.create(**(sizes | about | kwargs))
    _fit_statistics(flow, demos)
    return flow


def train_flow(
    demos: Demos | str | Path,
    flow: FlowPolicy | str | Path | None = None,
    *,
    n_iterations: int = 3_000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.995,
    advantage: AdvantageWeighting | None = None,
    images: ImageTraining | None = None,
    loss_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: th.device | str = "auto",
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
    validation: Validation | None = None,
    **create_kwargs: Any,
) -> FlowPolicy:
    """
    Stage 0: trains a flow on demos by (advantage-weighted) shortcut flow matching. If the demos hold images, the image
    encoder is trained with it, under random shifts, and the images are read from the file as they are needed. What
    normalises observations and actions is fitted to these demos if it never was to any.

    :param demos: demos, or the path of an ``.h5`` file
    :param flow: policy to go on with, or its folder, which stays as it is; None creates one with :func:`create_flow`
    :param n_iterations: optimiser steps
    :param batch_size: windows in a batch
    :param learning_rate: start of a cosine schedule to 0 (AdamW)
    :param ema_decay: decay per iteration of the moving average, which is the teacher and the result
    :param advantage: weighs the demos by the advantages that ``flow.critic`` sees; None weighs all alike
    :param images: how images are handled; None is ``ImageTraining()`` if there are any
    :param loss_kwargs: further arguments of ``flow.imitation_loss``, such as ``consistency_fraction`` of a shortcut flow
    :param seed: seeds torch's global generator; None leaves it alone
    :param device: where the flow goes and is trained; "auto" is a GPU where there is one
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :param validation: holds demos out, judges the moving average on them now and then and keeps the best; None learns from all
        demos and keeps the last
    :param create_kwargs: arguments of :func:`create_flow` when ``flow`` is None, such as ``policy_class``, ``state_layout``,
        ``net_class``, ``obs_horizon``, ``pred_horizon``, ``act_horizon``, ``gamma``
    :return: the trained policy, frozen
    :raises ValueError: if demos and flow do not fit, ``advantage`` comes without a trained critic, or an argument was given
        that cannot apply
    """
    if seed is not None:
        th.manual_seed(seed)
    if flow is not None and create_kwargs:
        raise ValueError(f"{sorted(create_kwargs)} describe a new flow, but a flow was given")
    if not isinstance(demos, Demos):
        demos = load_demos(demos)
    if flow is None:
        flow = create_flow(demos, **create_kwargs)
    elif not isinstance(flow, FlowPolicy):
        flow = FlowPolicy.from_pretrained(flow, device)
    loss_kwargs = dict(loss_kwargs or {})
    learns_to_see = _learns_to_see(flow, demos, images)
    _check_settings(flow, advantage, learns_to_see, loss_kwargs)
    images = images or ImageTraining()
    if learns_to_see and batch_size % images.repeats:
        raise ValueError(f"batch_size must be a multiple of images.repeats, found {batch_size} and {images.repeats}")
    _fit_statistics(flow, demos)
    flow.to(get_device(device))

    def windows_of(flow: FlowPolicy, demos: Demos, pad: int = 0) -> FeatureWindows | ImageWindows:
        if not learns_to_see:
            return FeatureWindows(flow, demos)
        return ImageWindows(flow, demos, pad, images.memory, repeats=images.repeats)

    learned, held_out = (demos, demos) if validation is None else validation.split(demos)
    windows = windows_of(flow, learned, images.random_shift_pad)
    if advantage is not None and isinstance(windows, FeatureWindows):
        advantages = _demo_advantages(flow, windows.cond, windows.chunk)
        windows.weights = exp_weights(advantage.beta * advantages, advantage.max_weight)

    net: VelocityNet = flow.net.train().requires_grad_(True)
    learning: list[nn.Module] = [net, flow.encoder.train().requires_grad_(True)] if learns_to_see else [net]
    averages = [AveragedModel(part, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) for part in learning]
    parameters = [parameter for part in learning for parameter in part.parameters()]
    optimizer = th.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, fused=True)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_iterations)
    parts: dict[str, Stateful] = dict(optimizer=optimizer, schedule=schedule, windows=windows)
    for i, (part, average) in enumerate(zip(learning, averages, strict=True)):
        parts |= {f"network {i}": part, f"average {i}": average}
    judge: Judge | None = None
    if validation is not None:
        judge = Judge(validation, flow, lambda candidate: windows_of(candidate, held_out), averages, loss_kwargs)
        parts["validation"] = judge
    loop = ProgressLoop("stage 0: flow", n_iterations, progress_bar, tensorboard_log, checkpoint=checkpoint, parts=parts)
    for i in loop:
        batch = windows.sample(batch_size)
        optimizer.zero_grad()
        with fast_products():
            losses = flow.imitation_loss(averages[0], *batch, **loss_kwargs)
            th.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for average, part in zip(averages, learning, strict=True):
            average.update_parameters(part)
        loop.log(losses)
        if judge is not None and judge.due(i, n_iterations):
            loop.record(judge.judge())
    if judge is not None:
        judge.restore_best()
    for average, part in zip(averages, learning, strict=True):
        part.load_state_dict(average.module.state_dict())
    return flow.freeze()


def _fit_statistics(flow: FlowPolicy, demos: Demos) -> None:
    """Fits statistics that were never fitted, of a flow that was created elsewhere, say."""
    check_demos_fit(flow, demos)
    flow.fit_action_normalizer(th.from_numpy(demos.actions()).to(flow.device))
    if not demos.obs_dim or not flow.encoder.needs_fit:
        return
    if flow.critic is not None and flow.critic.updates:
        raise ValueError(
            "The flow's critic was trained on observations that are not normalised, and normalising them now would make it "
            "useless: create the flow with create_flow(demos), or its encoder with normalize=False"
        )
    flow.encoder.fit(th.from_numpy(demos.frames()).to(flow.device))


def _learns_to_see(flow: FlowPolicy, demos: Demos, images: ImageTraining | None) -> bool:
    has_weights = any(True for _ in flow.encoder.parameters())
    if images is not None and demos.image_shapes is None:
        raise ValueError(f"images was given, but {demos.path} holds no images")
    if images is not None and images.train_encoder and not has_weights:
        raise ValueError("images.train_encoder is set, but the flow's encoder has no weights to train")
    return has_weights and (images is None or images.train_encoder)


def _check_settings(
    flow: FlowPolicy, advantage: AdvantageWeighting | None, learns_to_see: bool, loss_kwargs: Mapping[str, Any]
) -> None:
    """What can be said before anything is computed."""
    if flow.action_offset:
        raise ValueError(
            f"train_flow makes chunks whose entry 0 is the action for now, but the flow's action_offset is "
            f"{flow.action_offset}"
        )
    if advantage is not None and learns_to_see:
        raise ValueError(
            "advantage needs features that stay as the critic knows them: pass images=ImageTraining(train_encoder=False)"
        )
    if advantage is not None and (flow.critic is None or not flow.critic.updates):
        raise ValueError(
            "advantage weights the demos by the critic's advantages: train one first, with train_critic(flow, ...)"
        )
    own = list(inspect.signature(flow.imitation_loss).parameters.values())[4:]  # after teacher, cond, chunk and weights
    known = [parameter.name for parameter in own]
    unknown = sorted(loss_kwargs.keys() - set(known))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        raise ValueError(f"loss_kwargs holds {unknown}, but {type(flow).__name__}.imitation_loss takes {known or 'none'}")


@th.no_grad()
def _demo_advantages(flow: SteerablePolicy, cond: th.Tensor, chunk: th.Tensor, n_samples: int = 4) -> th.Tensor:
    """Z-scored advantages Q(s, a_demo) - mean over the flow's own chunks Q(s, a), (n,)."""
    critic = flow.critic
    assert critic is not None
    parts = []
    for at, demo in zip(cond.split(BLOCK_SIZE), chunk.split(BLOCK_SIZE), strict=True):
        own = [
            critic.get_ucb_q(at, flow.scored(flow.decode(at, th.randn_like(demo)), critic), kappa=0.0)
            for _ in range(n_samples)
        ]
        parts.append(critic.get_ucb_q(at, flow.scored(demo, critic), kappa=0.0) - th.stack(own).mean(dim=0))
    advantage = th.cat(parts)
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
