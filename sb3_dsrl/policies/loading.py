"""A flow by name: wherever one is expected, the folder it was saved in will do."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any, TypeAlias

from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.flow import FlowPolicy

#: A policy, the folder that ``save_pretrained`` wrote, or a repository of the Hugging Face hub.
FlowLike: TypeAlias = SteerablePolicy | str | Path

#: What was loaded from where, as long as somebody uses it.
_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], SteerablePolicy] = weakref.WeakValueDictionary()


def resolve_flow(flow: FlowLike, shared: bool = True) -> SteerablePolicy:
    """
    The one way from what a user passes as a flow to a policy.

    :param flow: a policy, which is returned as it is, or the name of one, which is loaded as
        :meth:`FlowPolicy.from_pretrained <sb3_dsrl.FlowPolicy.from_pretrained>` does
    :param shared: all who name the same files get one policy, so that many envs of a process hold its weights once; False
        loads another one, to be trained
    :return: the policy; a loaded one is frozen, and on a GPU where there is one
    :raises TypeError: if it is neither
    :raises FileNotFoundError: if there is no such folder or repository
    :raises ValueError: if its files are damaged
    """
    if isinstance(flow, SteerablePolicy):
        return flow
    if not isinstance(flow, (str, Path)):
        raise TypeError(
            f"flow must be a FlowPolicy or another SteerablePolicy, or the folder of one, found {type(flow).__name__}"
        )
    if not shared:
        return FlowPolicy.from_pretrained(flow)
    key = _key(flow)
    policy = _LOADED.get(key)
    if policy is None:
        policy = _LOADED[key] = FlowPolicy.from_pretrained(flow)
    return policy


def _key(name: str | Path) -> tuple[Any, ...]:
    """What changes when a folder's files do."""
    folder = Path(name)
    if not folder.is_dir():
        return (str(name),)
    stats = [os.stat(file) for file in sorted(folder.iterdir())]
    return (str(folder.resolve()), *((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))
