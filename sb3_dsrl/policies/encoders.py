"""Observation encoders: from stacked frames to the features that the velocity field and the latent policy see.

Letters in shapes: ``B`` batch, ``n`` frames, ``D`` dimensions of the state part of one frame, ``F`` features of one frame,
``C`` = obs_horizon * F.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dsrl.policies.networks import Network
from sb3_dsrl.policies.spatial_features import SpatialFeatures, describe
from sb3_dsrl.utils.observations import map_frames

#: Shape of one frame: of the flat observation, or of each entry of a dict observation.
FrameShapes = tuple[int, ...] | dict[str, tuple[int, ...]]

#: Makes an image of about unit range: colours are bytes, ManiSkill's depth is millimetres.
IMAGE_SCALES = {"rgb": 1 / 255, "depth": 1 / 1000}


class ObsEncoder(Network):
    """
    Base class: the features of each frame, side by side. The state part is normalised with a mean and a standard deviation
    that are fitted once.

    :param obs_horizon: frames, oldest first
    :param frame_dim: F
    :param n_state: D
    :param obs_shapes: shape of one frame
    :param config: constructor arguments beside ``obs_horizon``; ``normalize=False`` leaves the state part as it is
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, obs_horizon: int, frame_dim: int, n_state: int, obs_shapes: FrameShapes, **config: Any) -> None:
        super().__init__(obs_horizon=obs_horizon, **config)
        self.obs_horizon, self.cond_dim, self.obs_shapes = obs_horizon, obs_horizon * frame_dim, obs_shapes
        self.normalizes = bool(config.get("normalize", True))
        self.register_buffer("mean", th.zeros(n_state))
        self.register_buffer("std", th.ones(n_state))

    @property
    def needs_fit(self) -> bool:
        """Whether there is something to normalise, and :meth:`fit` was never called."""
        never_fitted = not self.mean.any() and bool((self.std == 1).all())
        return self.normalizes and len(self.mean) > 0 and never_fitted

    def fit(self, frames: th.Tensor, min_std: float | th.Tensor = 1e-2) -> None:
        """
        Sets mean and standard deviation from demo frames.

        :param frames: state part, (n, D)
        :param min_std: floor of the standard deviation: a dimension that is constant in a few demos must not explode
            as soon as it moves
        :raises ValueError: if the encoder does not normalise
        """
        if not self.normalizes:
            raise ValueError("This encoder was built with normalize=False: it has no statistics to fit")
        self.mean.copy_(frames.mean(dim=0))
        self.std.copy_(frames.std(dim=0, unbiased=False).clamp_min(min_std))

    def normalize(self, frames: th.Tensor) -> th.Tensor:
        """
        :param frames: state part, (n, D)
        """
        return (frames - self.mean) / self.std if self.normalizes else frames

    def encode_frames(self, frames: Any) -> th.Tensor:
        """
        :param frames: ``(n, *shape)``, or a dict of such
        :return: (n, F)
        """
        raise NotImplementedError

    def forward(self, obs: Any) -> th.Tensor:
        """
        :param obs: ``(B, obs_horizon, *shape)``, or a dict of such
        :return: (B, C)
        :raises ValueError: if keys or shapes are others
        """
        found = map_frames(lambda x: tuple(x.shape[1:]), obs)
        expected = map_frames(lambda shape: (self.obs_horizon, *shape), self.obs_shapes)
        if found != expected:
            raise ValueError(f"Observations must have shape (B, obs_horizon, ...) = {_named(expected)}, found {_named(found)}")
        return self.encode_frames(map_frames(lambda x: x.flatten(0, 1), obs)).reshape(-1, self.cond_dim)


def _named(shapes: Any) -> Any:
    """With the batch, as it is written in a docstring."""
    if isinstance(shapes, dict):
        return {key: _named(shape) for key, shape in shapes.items()}
    return f"({', '.join(['B', *map(str, shapes)])})"


class StateEncoder(ObsEncoder):
    """
    Encoder of state observations: normalise every dimension, stack the frames. It has no weights to learn.

    :param obs_dim: D
    :param obs_horizon: frames, oldest first
    :param normalize: False leaves the observations as they are
    :param features: what is made of each frame before it is normalised; None is the frame itself
    :raises ValueError: if the features are of states of another size
    """

    def __init__(
        self, obs_dim: int, obs_horizon: int, normalize: bool = True, features: SpatialFeatures | None = None
    ) -> None:
        config: dict[str, Any] = dict(obs_dim=obs_dim, normalize=normalize)
        dim = obs_dim
        if features is not None:
            if features.state_dim != obs_dim:
                raise ValueError(
                    f"The layout of the state does not fit observations of {obs_dim} dimensions: "
                    f"{describe(features.config['layout'])}"
                )
            config["features"], dim = features, features.out_dim
        super().__init__(obs_horizon, dim, dim, (obs_dim,), **config)
        self.features = features

    def fit(self, frames: th.Tensor, min_std: float | th.Tensor = 1e-2) -> None:
        """
        See :meth:`ObsEncoder.fit`.

        :param frames: (n, D)
        :param min_std: floor where there are no features; those have their own
        :raises ValueError: also if the frames do not have the layout of the features
        """
        if self.features is None:
            return super().fit(frames, min_std)
        self.features.check(frames)
        super().fit(self.features(frames), self.features.min_std)

    def encode_frames(self, frames: th.Tensor) -> th.Tensor:
        return self.normalize(frames if self.features is None else self.features(frames))


class ImageEncoder(ObsEncoder):
    """
    Encoder of images and proprioception, as ManiSkill's ``FlattenRGBDObservationWrapper`` gives them: a dict of ``state`` and
    of ``rgb`` or ``depth`` or both, any number of cameras on the channels. The features of a frame are [visual, state].

    :param state_dim: D, 0 if there is no ``state``
    :param image_shapes: (height, width, channels) of ``rgb`` and ``depth``
    :param backbone: from images (n, channels, height, width), scaled to about [0, 1], to (n, ``backbone.out_dim``); the
        channels of rgb come before those of depth. Or what makes one from the number of channels, such as
        ``functools.partial(SpatialSoftmaxConv, first_stride=2)``. None is a sharp :class:`SpatialSoftmaxConv`.
    :param obs_horizon: frames, oldest first
    :param normalize: False leaves the state part as it is
    :raises ValueError: if an image has another key or shape
    """

    def __init__(
        self,
        state_dim: int,
        image_shapes: dict[str, tuple[int, int, int]],
        backbone: nn.Module | Callable[[int], nn.Module] | None = None,
        obs_horizon: int = 1,
        normalize: bool = True,
    ) -> None:
        shapes = {key: tuple(image_shapes[key]) for key in IMAGE_SCALES if key in image_shapes}
        if not shapes or set(shapes) != set(image_shapes) or any(len(shape) != 3 for shape in shapes.values()):
            raise ValueError(
                f"image_shapes must hold (height, width, channels) of 'rgb', 'depth' or both, found {image_shapes}"
            )
        if not isinstance(backbone, nn.Module):
            make = backbone or partial(SpatialSoftmaxConv, sharpness=5.0)
            backbone = make(sum(shape[-1] for shape in shapes.values()))
        obs_shapes: dict[str, tuple[int, ...]] = {**({"state": (state_dim,)} if state_dim else {}), **shapes}
        super().__init__(
            obs_horizon,
            int(backbone.out_dim) + state_dim,  # type: ignore[arg-type]
            state_dim,
            obs_shapes,
            state_dim=state_dim,
            image_shapes={key: list(shape) for key, shape in shapes.items()},
            backbone=backbone,
            normalize=normalize,
        )
        self.image_keys = tuple(shapes)
        self.backbone = backbone

    def encode_frames(self, frames: dict[str, th.Tensor]) -> th.Tensor:
        images = th.cat([frames[key].float() * IMAGE_SCALES[key] for key in self.image_keys], dim=-1)
        visual = self.backbone(images.permute(0, 3, 1, 2))  # a view: channels stay last in memory, which is fast
        return th.cat([visual, self.normalize(frames["state"])], dim=-1) if "state" in frames else visual


class SpatialSoftmaxConv(Network):
    """
    Small backbone: three convolutions and a spatial softmax (https://arxiv.org/abs/1504.00702), which says *where* each
    feature is. That needs fewer demos than pooling, which says that it is somewhere. Group norms keep the softmax from
    starting flat.

    :param in_channels: of the image
    :param out_dim: features
    :param first_stride: of the first convolution; 2 sees finer and takes three times as long
    :param sharpness: factor on the maps before the softmax. With 1 it starts almost flat on maps of unit variance, and what is
        seen hardly changes the features.
    """

    def __init__(self, in_channels: int, out_dim: int = 256, first_stride: int = 4, sharpness: float = 1.0) -> None:
        super().__init__(in_channels=in_channels, out_dim=out_dim, first_stride=first_stride, sharpness=sharpness)
        self.out_dim, self.sharpness = out_dim, sharpness
        layers: list[nn.Module] = []
        for c_in, c_out, kernel, stride in ((in_channels, 32, 7, first_stride), (32, 64, 3, 2), (64, 64, 3, 1)):
            layers += [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2), nn.GroupNorm(c_out // 8, c_out), nn.ReLU()]
        self.convs = nn.Sequential(*layers[:-1])
        self.outlet = nn.Sequential(nn.Linear(128, out_dim), nn.ReLU())

    def forward(self, images: th.Tensor) -> th.Tensor:
        maps = self.convs(images)
        height, width = maps.shape[2:]
        attention = (self.sharpness * maps).flatten(2).softmax(dim=-1).unflatten(2, (height, width))
        x = attention.sum(dim=2) @ th.linspace(-1, 1, width, device=maps.device)
        y = attention.sum(dim=3) @ th.linspace(-1, 1, height, device=maps.device)
        return self.outlet(th.cat([x, y], dim=1))


class PlainConv(Network):
    """
    Backbone of ManiSkill's diffusion-policy baseline and of AW-ShortCut flow checkpoints: five convolutions and global max
    pooling.

    :param in_channels: of the image
    :param out_dim: features
    """

    def __init__(self, in_channels: int, out_dim: int = 256) -> None:
        super().__init__(in_channels=in_channels, out_dim=out_dim)
        self.out_dim = out_dim
        layers: list[nn.Module] = []
        for c_in, c_out in ((in_channels, 16), (16, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.cnn = nn.Sequential(*layers, nn.Conv2d(128, 128, 1), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(128, out_dim), nn.ReLU())

    def forward(self, images: th.Tensor) -> th.Tensor:
        return self.fc(F.adaptive_max_pool2d(self.cnn(images), 1).flatten(1))


def random_shift(images: dict[str, th.Tensor], pad: int = 4) -> dict[str, th.Tensor]:
    """
    Random-shift augmentation of DrQ (https://arxiv.org/abs/2004.13649): moves each sample by up to ``pad`` pixels, all its
    frames and images alike; what comes in from outside repeats the border.

    :param images: (B, obs_horizon, height, width, channels) each
    :param pad: largest shift in pixels
    """
    first = next(iter(images.values()))
    batch, _, height, width, _ = first.shape
    dy, dx = th.randint(-pad, pad + 1, (2, batch, 1), device=first.device)
    rows = (th.arange(height, device=first.device) + dy).clamp(0, height - 1)[:, :, None]
    columns = (th.arange(width, device=first.device) + dx).clamp(0, width - 1)[:, None]
    sample = th.arange(batch, device=first.device)[:, None, None]
    return {key: x[sample, :, rows, columns].movedim(3, 1) for key, x in images.items()}
