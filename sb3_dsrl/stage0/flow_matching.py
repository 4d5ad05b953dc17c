"""Stage 0: learn a flow from demos.

The flow is trained by flow matching with a self-consistency loss (shortcut models, https://arxiv.org/abs/2410.12557),
optionally weighted by exponentiated advantages as in AWAC (https://arxiv.org/abs/2006.09359).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.policies.networks import VelocityNet
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.weights import exp_weights
from sb3_dsrl.stage0.windows import FeatureWindows, ImageWindows
from sb3_dsrl.utils.checkpoint import Stateful, TrainingCheckpoint
from sb3_dsrl.utils.progress import ProgressLoop


def train_flow(
    demos: Demos | str | Path,
    flow: FlowPolicy | None = None,
    *,
    n_iterations: int = 3_000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.995,
    beta: float = 0.0,
    max_weight: float = 10.0,
    consistency_fraction: float = 0.25,
    train_encoder: bool = True,
    random_shift_pad: int = 4,
    image_memory: float = 2e9,
    policy_class: type[FlowPolicy] = FlowPolicy,
    seed: int | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
    **create_kwargs: Any,
) -> FlowPolicy:
    """
    Stage 0: trains a flow on demos by (advantage-weighted) shortcut flow matching. If the demos hold images, the image
    encoder is trained with it, under random shifts, and the images are read from the file as they are needed.

    :param demos: demos, or the path of an ``.h5`` file
    :param flow: policy to go on with; None creates one that fits the demos
    :param n_iterations: optimiser steps
    :param batch_size: windows in a batch
    :param learning_rate: start of a cosine schedule to 0 (AdamW)
    :param ema_decay: decay per iteration of the moving average, which is the teacher and the result
    :param beta: inverse temperature of the advantage weights ``exp(beta * A)``, A from ``flow.critic`` (train it first, with
        :func:`train_critic`); 0 is plain flow matching
    :param max_weight: clip of these weights
    :param consistency_fraction: part of each batch for the self-consistency loss of a shortcut flow
    :param train_encoder: train the encoder, if it has weights; False keeps them, and computes the features once
    :param random_shift_pad: largest random shift of images in pixels; 0 shifts nothing
    :param image_memory: bytes of images that are held in memory at a time
    :param policy_class: class of a new policy; :class:`~sb3_dsrl.policies.diffusion.DiffusionPolicy` trains a diffusion policy
    :param seed: seeds torch's global generator; None leaves it alone
    :param tensorboard_log: folder for TensorBoard, or None
    :param progress_bar: show a progress bar
    :param checkpoint: keeps the state of the training on disk, to resume it; None keeps none
    :param create_kwargs: arguments of :meth:`FlowPolicy.create` when ``flow`` is None, such as ``net_class``,
        ``obs_horizon``, ``pred_horizon``, ``act_horizon``, ``gamma``
    :return: the trained policy, frozen
    :raises ValueError: if demos and flow do not fit, ``beta > 0`` without a trained critic, or arguments
        contradict each other
    """
    if seed is not None:
        th.manual_seed(seed)
    if not 0 <= consistency_fraction < 1:
        raise ValueError(f"consistency_fraction must lie in [0, 1), found {consistency_fraction}")
    if flow is not None and create_kwargs:
        raise ValueError(f"{sorted(create_kwargs)} describe a new flow, but a flow was given")
    if not isinstance(demos, Demos):
        demos = load_demos(demos)
    if flow is None:
        about = dict(env_id=demos.env_id, obs_mode=demos.obs_mode, control_mode=demos.control_mode)
        sizes = dict(obs_dim=demos.obs_dim, action_dim=demos.action_dim, image_shapes=demos.image_shapes)
        flow = policy_class.create(**(sizes | about | create_kwargs))
        if demos.obs_dim:
            flow.encoder.fit(th.from_numpy(demos.frames()))
    learns_to_see = train_encoder and any(True for _ in flow.encoder.parameters())
    windows: FeatureWindows | ImageWindows
    if learns_to_see:
        if beta > 0:
            raise ValueError("beta > 0 needs features that stay as the critic knows them: set train_encoder=False")
        windows = ImageWindows(flow, demos, random_shift_pad, image_memory)
    else:
        windows = FeatureWindows(flow, demos)
        if beta > 0:
            windows.weights = exp_weights(beta * _demo_advantages(flow, windows.cond, windows.chunk), max_weight)

    velocity: VelocityNet = flow.net.train().requires_grad_(True)
    learning: list[nn.Module] = [velocity, flow.encoder.train().requires_grad_(True)] if learns_to_see else [velocity]
    averages = [AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) for net in learning]
    parameters = [parameter for net in learning for parameter in net.parameters()]
    optimizer = th.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_iterations)
    parts: dict[str, Stateful] = dict(optimizer=optimizer, schedule=schedule, windows=windows)
    for i, (net, average) in enumerate(zip(learning, averages, strict=True)):
        parts |= {f"network {i}": net, f"average {i}": average}
    loop = ProgressLoop("stage 0: flow", n_iterations, progress_bar, tensorboard_log, checkpoint=checkpoint, parts=parts)
    for _ in loop:
        cond, chunk, weights = windows.sample(batch_size)
        losses = flow.imitation_loss(averages[0], cond, chunk, weights, consistency_fraction)
        optimizer.zero_grad()
        sum(losses.values(), th.zeros(())).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for average, net in zip(averages, learning, strict=True):
            average.update_parameters(net)
        loop.log(losses)
    for average, net in zip(averages, learning, strict=True):
        net.load_state_dict(average.module.state_dict())
    return flow.freeze()


@th.no_grad()
def _demo_advantages(flow: SteerablePolicy, cond: th.Tensor, chunk: th.Tensor, n_samples: int = 4) -> th.Tensor:
    """Z-scored advantages Q(s, a_demo) - mean over the flow's own chunks Q(s, a), (n,)."""
    if flow.critic is None or not flow.critic.updates:
        raise ValueError(
            "beta > 0 weights the demos by the critic's advantages: train one first, with train_critic(flow, ...)"
        )
    q = flow.critic.get_ucb_q(cond, flow.executed(chunk), kappa=0.0)
    own = [
        flow.critic.get_ucb_q(cond, flow.executed(flow.decode(cond, th.randn_like(chunk))), kappa=0.0)
        for _ in range(n_samples)
    ]
    advantage = q - th.stack(own).mean(dim=0)
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
