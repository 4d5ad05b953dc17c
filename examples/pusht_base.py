"""LeRobot's side of pusht.py: demos as a LeRobotDataset, and LeRobot's own DiffusionPolicy that learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401  registers the env
import gymnasium as gym
import numpy as np
import torch as th
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import dataset_to_policy_features
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from pusht_pusher import Pusher
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

ENV_ID = "gym_pusht/PushT-v0"
ENV_KWARGS: dict[str, Any] = dict(obs_type="environment_state_agent_pos")
#: LeRobot's name of what the env calls otherwise
OBS_KEYS = {"observation.state": "agent_pos", "observation.environment_state": "environment_state"}
REPO_ID, TASK, FPS = "local/pusht", "Push the T onto its outline.", 10


def record_demos(folder: Path, n_demos: int, seed: int = 0) -> None:
    """
    Records episodes of the scripted pusher in which it succeeds.

    :param folder: of the dataset; it must not be there
    :param n_demos: successful episodes
    :param seed: of the first episode; the others follow
    """
    one = lambda dtype: dict(dtype=dtype, shape=(1,), names=None)  # noqa: E731
    features = {
        "observation.state": dict(dtype="float32", shape=(2,), names=["x", "y"]),
        "observation.environment_state": dict(dtype="float32", shape=(16,), names=None),
        "action": dict(dtype="float32", shape=(2,), names=["x", "y"]),
        "next.reward": one("float32"),
        "next.done": one("bool"),
        "next.success": one("bool"),
    }
    dataset = LeRobotDataset.create(REPO_ID, FPS, features, root=folder, use_videos=False)
    env = gym.make(ENV_ID, **ENV_KWARGS)
    tried = 0
    for _ in trange(n_demos, desc="demos"):
        while not _record_episode(dataset, env, seed + tried):
            tried += 1
        tried += 1
    dataset.finalize()
    print(f"{n_demos} of {tried} episodes of the pusher succeeded and are in {folder}", flush=True)


def _record_episode(dataset: LeRobotDataset, env: gym.Env, seed: int) -> bool:
    obs, _ = env.reset(seed=seed)
    frames: list[dict[str, Any]] = []
    base: Any = env.unwrapped
    for action in Pusher(base, np.random.default_rng(seed)).actions():
        frame: dict[str, np.ndarray] = {name: np.asarray(obs[key], np.float32) for name, key in OBS_KEYS.items()}
        obs, reward, terminated, truncated, _ = env.step(action)
        frame |= {
            "action": action,
            "next.reward": np.array([reward], np.float32),
            "next.done": np.array([terminated or truncated]),
            "next.success": np.array([terminated]),
        }
        frames.append(frame)
        if terminated or truncated:
            break
    if not terminated:
        return False
    for frame in frames:
        dataset.add_frame(frame | {"task": TASK})
    dataset.save_episode()
    return True


def diffusion_config(dataset: LeRobotDataset, **settings: Any) -> DiffusionConfig:
    """
    A small DiffusionPolicy for states, decoded by DDIM.

    :param dataset: whose features it maps
    :param settings: of ``DiffusionConfig``
    """
    features = dataset_to_policy_features(dataset.meta.features)
    defaults: dict[str, Any] = dict(
        input_features={key: features[key] for key in OBS_KEYS},
        output_features={key: ft for key, ft in features.items() if ft.type is FeatureType.ACTION},
        # LeRobot's own default leaves the environment state as it is, hundreds of pixels
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
        down_dims=(32, 64),
        diffusion_step_embed_dim=32,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
        device="cpu",
    )
    return DiffusionConfig(**(defaults | settings))


def train_policy(
    demos: Path, folder: Path, *, n_demos: int, n_iterations: int, seed: int, batch_size: int = 64, lr: float = 5e-4
) -> list[float]:
    """
    Trains LeRobot's DiffusionPolicy, and saves it with its processors as LeRobot does. What is saved is the average of the
    weights, as in the original.

    :param demos: folder of the dataset
    :param folder: for the policy
    :param n_demos: the first so many episodes
    :param n_iterations: gradient steps
    :param seed: of weights and batches
    :param batch_size: windows of a gradient step
    :param lr: highest learning rate; it falls to 0 along a cosine
    :return: mean loss of every hundredth of the training
    """
    th.manual_seed(seed)
    dataset = LeRobotDataset(REPO_ID, root=demos, episodes=list(range(n_demos)))
    config = diffusion_config(dataset)
    policy = DiffusionPolicy(config).train()
    stats = _stats(dataset)
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=stats)
    batches = preprocess(_windows(dataset, config))
    n = len(batches["action"])
    keys = [*OBS_KEYS, "action", "action_is_pad"]
    optimizer = th.optim.AdamW(policy.get_optim_params(), lr, config.optimizer_betas, weight_decay=1e-6)
    warmup = max(0.05, 1.5 / n_iterations)  # of exactly one step it divides by zero
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_iterations, pct_start=warmup)
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    losses: list[float] = []
    for _ in trange(n_iterations, desc="DiffusionPolicy"):
        rows = th.randint(n, (batch_size,))
        loss, _ = policy({key: batches[key][rows] for key in keys})
        optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(policy)
        losses.append(loss.item())
    saved: Any = average.module.eval()
    saved.save_pretrained(folder)
    preprocess.save_pretrained(folder)
    postprocess.save_pretrained(folder)
    return [float(part.mean()) for part in np.array_split(losses, 100) if len(part)]


def _windows(dataset: LeRobotDataset, config: DiffusionConfig) -> dict[str, th.Tensor]:
    """
    Every window of the dataset at once, as LeRobot cuts them: past the ends of an episode its first or last frame is repeated.
    They are small, and reading them one by one takes longer than the training.
    """
    table = dataset.hf_dataset.with_format("numpy")
    columns = {key: np.stack(table[key][:]).astype(np.float32) for key in (*OBS_KEYS, "action")}
    episode = np.asarray(table["episode_index"][:]).reshape(-1)
    first, last = np.searchsorted(episode, episode, "left"), np.searchsorted(episode, episode, "right") - 1
    rows = np.arange(len(episode))
    rows = rows[rows <= last - config.drop_n_last_frames]

    def cut(key: str, deltas: list[int]) -> tuple[np.ndarray, np.ndarray]:
        wanted = rows[:, None] + deltas
        inside = wanted.clip(first[rows, None], last[rows, None])
        return columns[key][inside], inside != wanted

    action, is_pad = cut("action", config.action_delta_indices)
    arrays = {key: cut(key, config.observation_delta_indices)[0] for key in OBS_KEYS}
    return {key: th.from_numpy(array) for key, array in {**arrays, "action": action, "action_is_pad": is_pad}.items()}


def _stats(dataset: LeRobotDataset) -> dict[str, dict[str, th.Tensor]]:
    """The env's own range instead of the dataset's: whatever is in reach, (0, 512) px becomes (-1, 1)."""
    sizes = {key: dataset.meta.features[key]["shape"] for key in (*OBS_KEYS, "action")}
    return {key: dict(min=th.zeros(shape), max=th.full(shape, 512.0)) for key, shape in sizes.items()}
