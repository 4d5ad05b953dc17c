"""What goes onto a robot: a frozen flow and the latent policy that steers it, without an env.

Letters in shapes: ``B`` batch, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``D`` dimensions of one
observation, ``w`` noise.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.policies.loading import FlowLike, resolve_flow
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.steering import Steering, to_numpy
from sb3_dsrl.steering.vec_env import find_steering
from sb3_dsrl.utils.hub import About, HubModel, find_folder
from sb3_dsrl.utils.integrity import one_line
from sb3_dsrl.utils.observations import map_frames, stack_frames

#: What a folder holds: the contract and what the latent policy is built of, the flow's own folder, the latent policy.
CONFIG, FLOW, LATENT = "config.json", "flow", "latent.safetensors"


class SteeredPolicy(HubModel, library_name="sb3_dsrl", tags=["robotics", "reinforcement-learning", "flow-matching"]):
    """
    A flow together with the latent policy that chooses its noise: observations in, action chunks out, as they were trained::

        policy = SteeredPolicy.of(model)          # PPO, A2C or TRPO with "LatentPolicy"
        policy.save_pretrained("policies/lift")   # complete: JSON and safetensors, no pickle

        policy = SteeredPolicy.from_pretrained("policies/lift")
        policy.reset()                            # an episode begins
        while not done:
            action = policy.select_action(obs)    # in [-1, 1]; a new chunk every H calls

    :param flow: the policy that is steered, or its folder; it is frozen
    :param latent: made for this flow
    :param deterministic: what :meth:`predict` and :meth:`select_action` do unless they are told: play the latent policy's
        mean, or sample from it, as one must that stands for the unsteered flow
    :raises TypeError: if they are something else
    :raises ValueError: if the latent policy was made for another flow, or for an env that is not steered
    """

    #: what :func:`~sb3_dsrl.improve` says of its policy; not saved
    report: Any = None

    def __init__(self, flow: FlowLike, latent: LatentPolicy, deterministic: bool = True) -> None:
        flow = resolve_flow(flow)
        if not isinstance(latent, LatentPolicy):
            raise TypeError(f"latent must be a LatentPolicy, found {type(latent).__name__}")
        if not isinstance(latent.action_space, NoiseSpace):
            raise ValueError(f"latent must be made for a steered env, whose actions are noise; found {latent.action_space}")
        self.flow, self.latent, self.contract = flow, latent, latent.action_space.contract
        self.deterministic = deterministic
        self._steering = Steering(flow, self.contract)
        for what, found, expected in (
            ("features", latent.observation_space.shape, self._steering.observation_space.shape),
            ("noise", latent.action_space.shape, self._steering.action_space.shape),
        ):
            if found != expected:
                raise ValueError(f"latent was made for {what} of shape {found}, but the flow has {expected}")
        self._frames: deque[Any] = deque(maxlen=flow.obs_horizon)
        self.reset()

    @classmethod
    def of(cls, model: BaseAlgorithm) -> SteeredPolicy:
        """
        What a model has learned, so far. Its flow is shared, its latent policy is copied.

        :param model: PPO, A2C or TRPO with "LatentPolicy" on a steered env
        :raises ValueError: if it is another model, or its policy does not see the flow's own features
        """
        policy, env = model.policy, model.get_env()
        if not isinstance(policy, LatentPolicy):
            raise ValueError(
                f"SteeredPolicy.of expects a model with 'LatentPolicy', found {type(policy).__name__}: use PPO, A2C or TRPO"
            )
        if env is None:
            raise ValueError("The model has no env, and its env holds the flow: pass env= to load, or call set_env")
        steering, normalize = find_steering(env), model.get_vec_normalize_env()
        if normalize is not None and normalize.norm_obs:
            raise ValueError(
                "The model's policy sees features that VecNormalize has normalised: train with VecNormalize(norm_obs=False)"
            )
        if env.observation_space != steering.observation_space:
            raise ValueError(
                f"The model's policy sees {env.observation_space}, but the flow's features are {steering.observation_space}: "
                f"train with obs='features', without wrappers that change observations"
            )
        return cls(steering.flow, policy.copy(action_space=steering.action_space))

    def reset(self, seed: int | None = None) -> None:
        """
        Starts an episode: forgets all frames and what is left of the last chunk.

        :param seed: of the unsteered tail of the noise, with ``steer_mode="act_horizon"``; None goes on
        """
        if seed is not None:
            self._steering.seed(seed)
        self._frames.clear()
        self._new: list[Any] = []
        self._queue: deque[np.ndarray] = deque()

    def predict(self, obs: Any, deterministic: bool | None = None) -> np.ndarray:
        """
        The next chunk. After :meth:`reset` the first frame stands for those before it.

        :param obs: the newest frame, (D,) or a dict of such; or a list of all frames since the last chunk, oldest first. The
            list is needed where the flow sees more than one frame, for those inside the chunk are among them.
        :param deterministic: w is the latent policy's mean; otherwise it is sampled; None is the policy's own way
        :return: (H, A), in [-1, 1]
        :raises ValueError: if frames are missing, have another shape, or are NaN or infinite
        """
        frames = list(obs) if isinstance(obs, (list, tuple)) else [obs]
        if not frames:
            raise ValueError("predict needs at least the newest frame, found an empty list")
        if self._frames and frames[0] is obs and min(self.flow.obs_horizon, self.flow.act_horizon) > 1:
            raise ValueError(
                f"The flow sees {self.flow.obs_horizon} frames: pass a list of all frames since the last chunk, or call "
                f"select_action with every frame, or reset if an episode begins"
            )
        frames = [self._frame(frame) for frame in frames]
        if not self._frames:
            self._frames.extend([frames[0]] * self.flow.obs_horizon)
        self._frames.extend(frames)
        self._new, self._queue = [], deque()
        deterministic = self.deterministic if deterministic is None else deterministic
        chunk, _, _ = self._act(map_frames(lambda x: x[None], stack_frames(self._frames)), deterministic)
        return to_numpy(chunk)[0]

    def select_action(self, obs: Any, deterministic: bool | None = None) -> np.ndarray:
        """
        The next action, to be called once an env step; it keeps the frames and the rest of the chunk.

        :param obs: the newest frame, (D,) or a dict of such
        :param deterministic: as in :meth:`predict`
        :return: (A,), in [-1, 1]
        :raises ValueError: as in :meth:`predict`
        """
        self._new.append(self._frame(obs))
        if not self._queue:
            self._queue = deque(self.predict(self._new, deterministic))
        return self._queue.popleft()

    def sample(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Sampled chunks for a batch, without memory of frames; for algorithms of your own.

        :param obs: stacked observations, (B, obs_horizon, D), or a dict of such
        :return: chunks (B, H, A), w (B, T, A) as it was drawn (decoding clips it to the bounds), with the rows of the residual
            if there is one, and its log-density under the latent policy alone, (B,)
        """
        return self._act(obs, deterministic=False)

    @th.no_grad()
    def _act(self, obs: Any, deterministic: bool) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        features = self._steering.encode(obs)
        pi = self.latent.pi(features.to(self.latent.device))
        flat = pi.get_actions(deterministic)
        w = flat.reshape(-1, *self._steering.action_space.shape)
        # SB3 clips what is played, not what it learns from
        return self._steering.chunk(features, self._steering.action_space.clip(w)), w, pi.log_prob(flat)

    def _frame(self, obs: Any) -> Any:
        def array(x: Any) -> np.ndarray:
            x = np.array(x.cpu() if isinstance(x, th.Tensor) else x)  # copied: a driver may write into it again
            return x.astype(np.float32) if x.dtype.kind == "f" else x

        frame = map_frames(array, obs)
        found = map_frames(np.shape, frame)
        if found != self.flow.obs_shapes:
            raise ValueError(f"A frame must have shape {self.flow.obs_shapes}, found {found}")
        return frame

    # Files

    def save_pretrained(self, save_directory: str | Path, *, repo_id: str | None = None, **kwargs: Any) -> str | None:
        """
        Writes a folder that is complete on its own: ``config.json`` (the contract, and what the latent policy is built of),
        ``flow/`` and ``latent.safetensors``. After an error the folder is as it was.

        :param save_directory: the folder
        :param repo_id: for ``push_to_hub=True``; None is the folder's name
        :param kwargs: further arguments of ``huggingface_hub.ModelHubMixin.save_pretrained``
        :raises ValueError: if the flow is no FlowPolicy, which alone has a folder of its own, or a part cannot be written
        :raises OSError: if a file cannot be written
        """
        if not isinstance(self.flow, FlowPolicy):
            raise ValueError(f"Only a steered FlowPolicy can be saved, found {type(self.flow).__name__}: use latent.save")
        folder = Path(save_directory)
        with _whole_folder(folder) as partial:
            return super().save_pretrained(partial, repo_id=repo_id or folder.name, **kwargs)

    def about(self) -> About:
        """What the model card tells of the policy."""
        flow = self.flow
        facts = dict(
            task=flow.env_id or "unknown",
            observations=f"{flow.obs_mode}, {flow.obs_shapes}, {flow.obs_horizon} frames",
            control_mode=flow.control_mode,
            action_dim=flow.action_dim,
            pred_horizon=flow.pred_horizon,
            **self.contract.as_dict(),
        )
        text = (
            "A frozen flow policy, and a latent policy that chooses its noise: observations in, actions in [-1, 1] out. It "
            "was trained with `sb3_dsrl`."
        )
        load = """
from sb3_dsrl import SteeredPolicy

policy = SteeredPolicy.from_pretrained("{path}")
policy.reset()                      # an episode begins
action = policy.select_action(obs)  # once an env step; obs is the newest frame
"""
        return About("Steered flow policy", text, flow.env_id, facts, load)

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self.flow, FlowPolicy)
        self.flow.save_pretrained(save_directory / FLOW)
        self.latent.save(save_directory / LATENT)
        (save_directory / CONFIG).write_text(json.dumps(self._config(), indent=2), encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = dict(contract=self.contract.as_dict(), latent_policy=self.latent.config())
        return config if self.deterministic else config | dict(deterministic=False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, device: th.device | str = "auto", **kwargs: Any
    ) -> SteeredPolicy:
        """
        Loads what :meth:`save_pretrained` wrote. No code in it is run.

        :param pretrained_model_name_or_path: folder, or repository of the Hugging Face hub
        :param device: for flow and latent policy
        :param kwargs: further arguments of ``huggingface_hub.snapshot_download``, such as ``revision``
        :raises FileNotFoundError: if there is no such folder or repository, or a file is missing
        :raises ValueError: if files are damaged or do not fit each other
        """
        names = (CONFIG, FLOW, LATENT)
        folder = find_folder(pretrained_model_name_or_path, names, "SteeredPolicy.save_pretrained", **kwargs)
        flow = FlowPolicy.from_pretrained(folder / FLOW, device=device)
        latent = LatentPolicy.load(folder / LATENT, device)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            sampled = isinstance(config, dict) and config.get("deterministic") is False
            policy = cls(flow, latent, deterministic=not sampled)
        except ValueError as error:
            raise ValueError(f"{folder} does not hold a valid SteeredPolicy: {one_line(error)}") from error
        if config != json.loads(json.dumps(policy._config())):
            raise ValueError(f"{folder / CONFIG} does not fit {LATENT}: it is damaged, or one of them was replaced")
        return policy


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """
    A new folder to write to, beside ``folder``. What it holds moves there, in place of entries of the same names, when the
    block has ended without an error.
    """
    folder = folder.absolute()
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to save to")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        if not folder.exists():
            os.replace(partial, folder)
            return
        (folder / CONFIG).unlink(missing_ok=True)  # and it comes last: a folder without it is not whole
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == CONFIG):
            old = folder / entry.name
            if old.is_dir():
                shutil.rmtree(old)
            os.replace(entry, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
