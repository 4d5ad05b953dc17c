"""Encoders: shapes and order of the features, normalisation, augmentation, and that a flow with images travels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dsrl import FlowPolicy, VelocityMLP
from sb3_dsrl.policies.encoders import ImageEncoder, PlainConv, SpatialSoftmaxConv, StateEncoder, random_shift
from sb3_dsrl.policies.networks import Network

SHAPES: dict[str, tuple[int, int, int]] = {"rgb": (16, 12, 6), "depth": (16, 12, 2)}


class Mean(Network):
    """A backbone that is easy to predict: the mean of each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels=channels)
        self.out_dim = channels

    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.mean(dim=(2, 3))


def batch(n: int = 5, obs_horizon: int = 2, seed: int = 0) -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    return {
        "depth": th.randint(0, 4000, (n, obs_horizon, *SHAPES["depth"]), generator=generator, dtype=th.int16),
        "state": th.randn(n, obs_horizon, 3, generator=generator),
        "rgb": th.randint(0, 256, (n, obs_horizon, *SHAPES["rgb"]), generator=generator, dtype=th.uint8),
    }


def test_features_of_a_frame_are_visual_then_state_and_rgb_comes_before_depth() -> None:
    encoder = ImageEncoder(3, SHAPES, Mean(8), obs_horizon=2)
    encoder.fit(4 * th.randn(100, 3) + 1)
    obs = batch()
    assert encoder.cond_dim == 2 * (8 + 3)
    expected = [
        [
            *(obs["rgb"][b, i].float() / 255).mean(dim=(0, 1)),
            *(obs["depth"][b, i].float() / 1000).mean(dim=(0, 1)),
            *((obs["state"][b, i] - encoder.mean) / encoder.std),
        ]
        for b in range(5)
        for i in range(2)
    ]
    th.testing.assert_close(encoder(obs), th.tensor(expected).reshape(5, -1))


@pytest.mark.parametrize("backbone_class", [SpatialSoftmaxConv, PlainConv])
def test_backbones(backbone_class: type[nn.Module]) -> None:
    backbone = backbone_class(3)
    for size in ((128, 128), (64, 96)):
        assert backbone(th.rand(2, 3, *size)).shape == (2, 256)


def test_spatial_softmax_tells_where_something_is() -> None:
    """Features of a blob move steadily with it, which a linear map can read off."""
    th.manual_seed(0)
    backbone = SpatialSoftmaxConv(1, 64)
    centres = [(y, x) for y in range(20, 108, 8) for x in range(20, 108, 8)]
    images = th.zeros(len(centres), 1, 128, 128)
    for image, (y, x) in zip(images, centres, strict=True):
        image[0, y - 5 : y + 5, x - 5 : x + 5] = 30.0
    with th.no_grad():
        features = th.cat([backbone(images), th.ones(len(centres), 1)], dim=1)
    target = th.tensor(centres, dtype=th.float32) / 64
    fit = features @ th.linalg.lstsq(features, target, driver="gelsd").solution
    assert (fit - target).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda obs: obs.pop("depth"), "Observations must have shape"),
        (lambda obs: obs.update(rgb=obs["rgb"][..., :3]), r"\(B, 2, 16, 12, 3\)"),
        (lambda obs: obs.update(state=obs["state"][:, :1]), r"'state': '\(B, 1, 3\)'"),
    ],
)
def test_other_observations_are_refused(change: Any, sentence: str) -> None:
    obs = batch()
    change(obs)
    with pytest.raises(ValueError, match=sentence):
        ImageEncoder(3, SHAPES, Mean(8), obs_horizon=2)(obs)


@pytest.mark.parametrize("shapes", [{}, {"segmentation": (8, 8, 1)}, {"rgb": (8, 8)}])
def test_unknown_images_are_refused(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"image_shapes must hold \(height, width, channels\) of 'rgb', 'depth' or both"):
        ImageEncoder(3, shapes)


def test_without_state() -> None:
    encoder = ImageEncoder(0, {"rgb": (16, 12, 6)}, Mean(6))
    assert encoder.cond_dim == 6
    assert encoder({"rgb": batch(obs_horizon=1)["rgb"]}).shape == (5, 6)


def test_encoder_says_whether_it_was_fitted() -> None:
    for encoder in (StateEncoder(3, 2), ImageEncoder(3, SHAPES, Mean(8))):
        assert encoder.needs_fit and encoder.config["normalize"]
        encoder.fit(th.randn(20, 3))
        assert not encoder.needs_fit
    assert not ImageEncoder(0, SHAPES, Mean(8)).needs_fit  # there is nothing to fit


def test_encoder_without_normalisation() -> None:
    encoder = StateEncoder(3, 2, normalize=False)
    obs = batch()["state"]
    assert th.equal(encoder(obs), obs.flatten(1)) and not encoder.needs_fit
    with pytest.raises(ValueError, match=r"built with normalize=False: it has no statistics to fit"):
        encoder.fit(obs[:, 0])
    raw = ImageEncoder(3, SHAPES, Mean(8), normalize=False)
    assert th.equal(raw(batch(obs_horizon=1))[:, -3:], batch(obs_horizon=1)["state"][:, 0]) and not raw.needs_fit


def test_random_shift_moves_all_images_of_a_sample_alike() -> None:
    th.manual_seed(0)
    obs = batch(n=30)
    shifted = random_shift({key: obs[key] for key in ("rgb", "depth")}, pad=3)
    seen = set()
    for b in range(30):
        matches = []
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                rows = np.clip(np.arange(16) + dy, 0, 15)
                columns = np.clip(np.arange(12) + dx, 0, 11)
                if all(th.equal(shifted[key][b], obs[key][b][:, rows][:, :, columns]) for key in shifted):
                    matches.append((dy, dx))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 15  # each sample has a shift of its own
    assert shifted["rgb"].dtype == th.uint8


def test_random_shift_of_nothing_is_nothing() -> None:
    images = {"rgb": batch()["rgb"]}
    assert th.equal(random_shift(images, pad=0)["rgb"], images["rgb"])


@pytest.mark.parametrize("backbone", [None, Mean(8)], ids=["default", "own subclass"])
def test_flow_with_images_travels_through_a_folder(tmp_path: Path, backbone: nn.Module | None) -> None:
    flow = FlowPolicy.create(3, 2, 2, 4, 3, image_shapes=SHAPES, backbone=backbone, net_class=VelocityMLP, obs_mode="rgbd")
    flow.encoder.fit(th.randn(20, 3))
    flow.freeze().save_pretrained(tmp_path)
    loaded = FlowPolicy.from_pretrained(tmp_path)
    assert loaded.obs_shapes == {"state": (3,), **SHAPES} and loaded.obs_mode == "rgbd"
    obs = batch()
    assert th.equal(loaded.encode(obs), flow.encode(obs))
    assert th.equal(loaded.encode({key: x.numpy() for key, x in obs.items()}), flow.encode(obs))
    assert loaded.fingerprint() == flow.fingerprint()


def test_foreign_backbone_can_be_used_but_not_saved(tmp_path: Path) -> None:
    foreign = nn.Sequential(nn.Flatten(), nn.LazyLinear(7))
    foreign.out_dim = 7  # type: ignore[assignment]
    flow = FlowPolicy.create(3, 2, 2, 4, 3, image_shapes=SHAPES, backbone=foreign, net_class=VelocityMLP)
    assert flow.encode(batch()).shape == (5, 20)
    with pytest.raises(
        ValueError, match=r"Only subclasses of sb3_dsrl.policies.networks.Network can be saved.*found Sequential"
    ):
        flow.save_pretrained(tmp_path / "flow")


def test_backbone_without_images() -> None:
    with pytest.raises(ValueError, match="A backbone was given, but there are no images"):
        FlowPolicy.create(3, 2, backbone=Mean(8))
