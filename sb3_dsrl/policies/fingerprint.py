"""What tells two policies apart: their weights or, where they have none, what they do with a fixed input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch as th

from sb3_dsrl.policies.encoders import FrameShapes
from sb3_dsrl.utils.integrity import one_line
from sb3_dsrl.utils.observations import map_frames

#: Rows of each input of a probe
_BATCH = 2


def digest(about: str, tensors: Mapping[str, th.Tensor], behaviour: bytes = b"") -> str:
    """
    :param about: what else makes the policy
    :param tensors: name -> weights, of any type
    :param behaviour: of :func:`probe`
    :return: 16 hexadecimal digits
    """
    found = hashlib.sha256(about.encode())
    for key, value in sorted(tensors.items()):
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy().tobytes())
    found.update(behaviour)
    return found.hexdigest()[:16]


def state_of(tensors: Mapping[str, th.Tensor]) -> list[tuple[str, int, int]] | None:
    """What changes when weights are written to or replaced; None where torch does not count that (inference mode)."""
    if any(value.is_inference() for value in tensors.values()):
        return None
    return [(key, value.data_ptr(), value._version) for key, value in tensors.items()]


@th.no_grad()
def probe(
    encode: Callable[[Any], Any],
    decode: Callable[[th.Tensor, th.Tensor], Any],
    obs_shapes: FrameShapes,
    obs_horizon: int,
    cond_dim: int,
    noise_shape: tuple[int, int],
) -> bytes:
    """
    What a policy makes of random observations, features and noises that are always the same, to three decimals.

    :param encode: see :meth:`SteerablePolicy.encode <sb3_dsrl.policies.base.SteerablePolicy.encode>`
    :param decode: see :meth:`SteerablePolicy.decode <sb3_dsrl.policies.base.SteerablePolicy.decode>`
    :param obs_shapes: shape of one frame
    :param obs_horizon: frames
    :param cond_dim: C
    :param noise_shape: (T, A)
    :raises ValueError: if ``encode`` or ``decode`` fails or does not return numbers
    """
    generator = th.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], is_colour: bool = False) -> th.Tensor:
        if is_colour:
            return th.randint(0, 256, (_BATCH, *shape), generator=generator, dtype=th.uint8)
        return th.randn(_BATCH, *shape, generator=generator)

    frames = {"": obs_shapes} if not isinstance(obs_shapes, dict) else obs_shapes
    drawn = {key: random((obs_horizon, *shape), key == "rgb") for key, shape in frames.items()}
    obs = drawn if isinstance(obs_shapes, dict) else drawn[""]
    cond, noise = random((cond_dim,)), random(noise_shape)
    behaviour = []
    for name, call in (("encode", lambda: encode(obs)), ("decode", lambda: decode(cond, noise))):
        try:
            with th.random.fork_rng(devices=[]):  # a policy that draws is no business of the caller's generator
                values = th.as_tensor(call()).double().cpu()
            behaviour.append((1e3 * values).round().nan_to_num().to(th.int64).numpy().tobytes())
        except Exception as error:  # a user's code
            given = map_frames(lambda x: tuple(x.shape), obs) if name == "encode" else (tuple(cond.shape), tuple(noise.shape))
            raise ValueError(
                f"A policy without weights is told from others by what it does, but its {name} failed on random input of "
                f"shape {given}: {one_line(error)}"
            ) from error
    return b"".join(behaviour)
