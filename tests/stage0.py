"""Small demos and transitions for the tests of stage 0, and what its training logs."""

from pathlib import Path

import numpy as np
import torch as th
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_dsrl import VelocityMLP
from sb3_dsrl.stage0.demos import Demos, Episode
from sb3_dsrl.stage0.features import FeatureTransitions

SMALL = dict(net_class=VelocityMLP, net_kwargs=dict(width=48, n_blocks=1, embed_dim=16), obs_horizon=1)


def make_demos(actions: np.ndarray, obs: np.ndarray, rewards: np.ndarray | None = None) -> Demos:
    """Episodes of equal length; actions (n, L, A), obs (n, L + 1, D)."""
    done = np.zeros(actions.shape[1], bool)
    episodes = [
        Episode(o.astype(np.float32), a.astype(np.float32), np.ones(len(a), np.float32) if rewards is None else r, done, None)
        for o, a, r in zip(obs, actions, actions[..., 0] if rewards is None else rewards, strict=True)
    ]
    return Demos(Path("made.h5"), episodes, "PushCube-v1", "state", "pd_joint_pos", "sparse")


def random_demos(n: int = 6, length: int = 5) -> Demos:
    rng = np.random.default_rng(0)
    return make_demos(rng.uniform(-1, 1, (n, length, 2)), rng.standard_normal((n, length + 1, 3)))


def chain(n: int, gamma_k: float) -> FeatureTransitions:
    """0 -> 1 -> 2 -> end, with rewards 1, 0.5 and 2; what comes after the end looks like 0. Chunks do not matter."""
    at = th.arange(3).repeat(n)
    features = th.eye(3)
    return FeatureTransitions(
        cond=features[at],
        chunk=th.rand(3 * n, 1, 2) * 2 - 1,
        reward=th.tensor([1.0, 0.5, 2.0])[at],
        discount=th.tensor([gamma_k, gamma_k**2, 0.0])[at],  # the second chunk lasts twice as long
        next_cond=features[(at + 1) % 3],
    )


def scalars(folder: Path) -> dict[str, list[int]]:
    """Name -> steps of all scalars in a TensorBoard folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
