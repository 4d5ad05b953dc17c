"""
A latent policy on disk: one safetensors file whose header holds, as JSON, what the policy is built of.

Nothing in such a file is executed. safetensors has no checksum of its own, so the header holds one of everything else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import save
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_dsrl.stage2.optimizers import SCALED
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.utils.checkpoint import atomic_file
from sb3_dsrl.utils.integrity import one_line

#: Key of the constructor arguments in the header.
CONFIG = "latent_policy"

#: What the file names and where the name is looked up.
CLASSES: dict[str, dict[str, type]] = {
    "activation_fn": {name: cls for name, cls in vars(nn).items() if isinstance(cls, type) and issubclass(cls, nn.Module)},
    "optimizer_class": {
        cls.__name__: cls
        for cls in [*vars(th.optim).values(), *SCALED.values()]
        if isinstance(cls, type) and issubclass(cls, th.optim.Optimizer)
    },
    "features_extractor_class": {cls.__name__: cls for cls in (FlattenExtractor, CombinedExtractor)},
}


def to_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Constructor arguments as plain values.

    :param arguments: of a :class:`~sb3_dsrl.LatentPolicy`
    :return: what JSON can hold
    :raises ValueError: if one of them cannot be written, a class of your own, say
    """
    config = {}
    for name, value in arguments.items():
        if isinstance(value, (spaces.Box, spaces.Dict)):
            value = _space_to_config(value)
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        elif name in CLASSES:
            known = [key for key, cls in CLASSES[name].items() if cls is value]
            if not known:
                raise ValueError(
                    f"{name}={value} cannot be saved: only names of torch, SB3 and this package can be written; keep "
                    f"the model with model.save"
                )
            value = known[0]
        try:
            config[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={value!r} cannot be saved: it cannot be written as JSON ({error})") from error
    return config


def from_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    The way back from :func:`to_config`.

    :param config: plain values
    :return: constructor arguments
    :raises ValueError: if a name is unknown
    """
    arguments = dict(config)
    for name in ("observation_space", "action_space"):
        arguments[name] = _space_from_config(config[name])
    for name, known in CLASSES.items():
        if config[name] not in known:
            raise ValueError(f"{name}={config[name]!r} is unknown")
        arguments[name] = known[config[name]]
    return arguments


def _space_to_config(space: spaces.Space) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        return dict(parts={key: _space_to_config(part) for key, part in space.items()})
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{space} cannot be saved: expected a Box, or a Dict of Boxes")
    if isinstance(space, NoiseSpace):
        return dict(shape=list(space.noise_shape), contract=space.contract.as_dict())
    # an infinite bound is None: JSON knows no infinity
    low, high = ([x if np.isfinite(x) else None for x in bound.ravel().tolist()] for bound in (space.low, space.high))
    return dict(shape=list(space.shape), dtype=str(space.dtype), low=low, high=high)


def _space_from_config(config: dict[str, Any]) -> spaces.Space:
    if "parts" in config:
        return spaces.Dict({key: _space_from_config(part) for key, part in config["parts"].items()})
    shape = tuple(config["shape"])
    if "contract" in config:
        return NoiseSpace(shape, Contract(**config["contract"]))
    low, high = (
        np.array([bound if x is None else x for x in config[name]], config["dtype"]).reshape(shape)
        for name, bound in (("low", -np.inf), ("high", np.inf))
    )
    return spaces.Box(low, high, shape, config["dtype"])


def write_policy_file(path: str | Path, config: dict[str, Any], tensors: dict[str, th.Tensor]) -> None:
    """
    :param path: the file, of any name
    :param config: goes into the header
    :param tensors: state of the policy
    :raises OSError: if it cannot be written, because the disk is full, say
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    text = json.dumps(config, sort_keys=True)
    with atomic_file(Path(path)) as file:
        file.write(save(tensors, {CONFIG: text, "sha256": _sha256(text, tensors)}))


def read_policy_file(path: str | Path) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    """
    :param path: of :func:`write_policy_file`
    :return: config and tensors
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is another file, or damaged
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file written by LatentPolicy.save")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except Exception as error:  # of many kinds: nearly every field of a damaged header has its own
        raise ValueError(f"{path} is no file of LatentPolicy.save, or it is damaged ({one_line(error)})") from error
    if CONFIG not in header:
        raise ValueError(f"{path} does not hold a LatentPolicy: it is a safetensors file without the header {CONFIG!r}")
    text = header[CONFIG]
    if header.get("sha256") != _sha256(text, tensors):
        raise ValueError(f"{path} is damaged: its contents do not fit its checksum")
    return json.loads(text), tensors


def _sha256(text: str, tensors: dict[str, th.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(repr((name, str(x.dtype), tuple(x.shape))).encode())
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()
