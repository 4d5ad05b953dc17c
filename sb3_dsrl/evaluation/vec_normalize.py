"""
What playing has to do with wrappers that change observations: the statistics of SB3's VecNormalize stay as they were, or such
a wrapper must not be there at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_dsrl.steering.vec_env import find_steering


def normalizers(env: gym.Env | VecEnv) -> list[VecNormalize]:
    """
    :param env: any env
    :return: its VecNormalize layers, outermost first
    """
    layers: list[VecNormalize] = []
    layer = env
    while isinstance(layer, VecEnvWrapper):
        if isinstance(layer, VecNormalize):
            layers.append(layer)
        layer = layer.venv
    return layers


def require_raw_features(env: gym.Env | VecEnv, who: str, rewards: bool = False) -> None:
    """
    Refuses an env that normalises, stacks or otherwise changes features, for what must see them as the flow emits them.

    :param env: steered env, gym or vectorised
    :param who: needs them, the subject of the message
    :param rewards: whether it needs raw rewards as well
    :raises ValueError: if the env is wrapped in something that changes them, or not steered
    """
    if any(layer.norm_obs or (rewards and layer.norm_reward) for layer in normalizers(env)):
        needed = "features and rewards" if rewards else "features"
        raise ValueError(f"{who} needs the flow's own {needed}: pass the env below VecNormalize")
    features = find_steering(env).observation_space
    if env.observation_space != features:
        raise ValueError(
            f"{who} needs the flow's own features, {features}, but {type(env).__name__} shows {env.observation_space}: steer "
            f"with obs='features', without wrappers that change observations"
        )


@contextmanager
def statistics_kept(venv: VecEnv) -> Iterator[None]:
    """
    Leaves the statistics of every VecNormalize as they are, those of a training env, too.

    :param venv: is played in the block
    """
    kept = [(layer, layer.training, layer.returns.copy()) for layer in normalizers(venv)]
    for layer, _, _ in kept:
        layer.training = False
    try:
        yield
    finally:
        for layer, training, returns in kept:
            layer.training, layer.returns = training, returns
