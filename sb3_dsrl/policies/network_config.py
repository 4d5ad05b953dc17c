"""Networks in config.json: what they are and what they were built with."""

from __future__ import annotations

from typing import Any

from torch import nn

from sb3_dsrl.policies.networks import Network


def to_config(net: Any) -> Any:
    """
    :param net: a network; other values stay as they are
    :return: its class and arguments, for JSON
    :raises ValueError: if it is not one of the package's networks
    """
    if not isinstance(net, nn.Module):
        return net
    if not isinstance(net, Network):
        raise ValueError(
            f"Only subclasses of sb3_dsrl.policies.networks.Network can be saved, since they know what they were built with; "
            f"found {type(net).__name__}"
        )
    return {"class": net.registered_name(), **{key: to_config(value) for key, value in net.config.items()}}


def from_config(config: Any) -> Any:
    """
    :param config: of :func:`to_config`
    :return: the network, with new weights
    :raises ValueError: if its class is unknown
    """
    if not (isinstance(config, dict) and "class" in config):
        return config
    kwargs = {key: from_config(value) for key, value in config.items()}
    name = kwargs.pop("class")
    if name not in Network.classes:
        raise ValueError(f"config.json names the network class {name!r}, which is unknown; import the module that defines it")
    return Network.classes[name](**kwargs)
