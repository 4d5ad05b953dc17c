"""Demos as starts of training: the simulator's states in a ManiSkill file, read when they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sb3_dsrl.stage0.demo_files import episode_names, read_demo_json
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.episodes import DemoError
from sb3_dsrl.stage0.hdf5 import open_demo_file
from sb3_dsrl.steering.starts import Recorded, RecordedStarts


class DemoStarts(RecordedStarts):
    """
    Training starts from states of demos, at first near their end, then earlier as success allows, mixed with true starts::

        env = make_latent_env("PegInsertionSide-v1", flow, n_envs=8, starts=DemoStarts("demos.h5"))

    What moves the starts is in :class:`~sb3_dsrl.steering.starts.RecordedStarts`. Evaluation (:func:`~sb3_dsrl.evaluate` and
    all that plays episodes) uses true starts even in the same env; SB3's own ``rollout/success_rate`` counts all episodes.

    States stay in the file, which each worker reads for itself. It must hold ``env_states``, as ManiSkill's ``RecordEpisode``
    and ``examples/make_demos.py`` write them, and the JSON the ``reset_kwargs`` of each episode, which make its objects again.

    :param demos: path of an ``.h5`` file, or demos that were read from one
    :param num_demos: use only the first so many episodes; None uses all of them
    :param true_starts: share of episodes that start as without demos
    :param step: part of an episode by which starts move after a success
    :param target: share of successes at which starts stay where they are
    :raises FileNotFoundError: if a file is missing
    :raises DemoError: if the file holds no ``env_states`` or is damaged; the sentence names file and key
    :raises ValueError: if an argument is out of range
    """

    def __init__(
        self,
        demos: Demos | str | Path,
        num_demos: int | None = None,
        *,
        true_starts: float = 0.25,
        step: float = 0.05,
        target: float = 0.5,
    ) -> None:
        if isinstance(demos, Demos):
            num_demos = len(demos.episodes) if num_demos is None else num_demos
        self.path = Path(demos.path if isinstance(demos, Demos) else demos)
        if isinstance(demos, Demos) and not self.path.is_file():
            raise DemoError(
                f"{demos.path} is no file with 'env_states': starts need the simulator's states of a ManiSkill file"
            )
        env_id, control_mode, _, meta = read_demo_json(self.path, num_demos)
        resets = {episode.get("episode_id"): episode.get("reset_kwargs") for episode in meta["episodes"]}
        with open_demo_file(self.path) as file:
            self.names = episode_names(self.path, file, num_demos)
            last_starts = [_last_start(f"{self.path}:{name}", file[name]) for name in self.names]
        self.options = [_reset_options(self.path, name, resets.get(int(name.removeprefix("traj_")))) for name in self.names]
        super().__init__(
            last_starts,
            where=str(self.path),
            true_starts=true_starts,
            step=step,
            target=target,
            env_id=env_id,
            control_mode=control_mode,
        )

    def read(self, episode: int, start: int, stop: int) -> Recorded:
        """See :meth:`RecordedStarts.read <sb3_dsrl.steering.starts.RecordedStarts.read>`."""
        name = self.names[episode]
        try:
            with h5py.File(self.path, "r") as file:
                group = file[name]
                env_states = {
                    kind: {name: np.asarray(values[start])[None] for name, values in part.items()}
                    for kind, part in group["env_states"].items()
                }
                actions = np.asarray(group["actions"][start:stop], np.float32).clip(-1.0, 1.0)
        except Exception as error:  # of many kinds: HDF5 checks little before it reads
            raise DemoError(f"{self.path}:{name} cannot be read any more; it is damaged or was replaced ({error})") from error
        return Recorded(dict(env_states=env_states, elapsed_steps=start), actions, start, self.options[episode])


def _reset_options(path: Path, name: str, found: Any) -> dict[str, Any]:
    """What makes the objects and goals of an episode again."""
    seed = found.get("seed") if isinstance(found, dict) else None
    seed = seed[0] if isinstance(seed, list) and len(seed) == 1 else seed
    if not isinstance(seed, int):
        raise DemoError(f"{path.with_suffix('.json')}: {name} has no 'reset_kwargs' with one 'seed', found {found!r}")
    return (found.get("options") or {}) | dict(episode_seed=seed)


def _last_start(where: str, group: Any) -> int:
    """The step whose action brought success, or the last one."""
    for key in ("actions", "env_states"):
        if key not in group:
            raise DemoError(
                f"{where} has no {key!r}: record the demos with examples/make_demos.py, or with ManiSkill's RecordEpisode and "
                f"record_env_state=True"
            )
    length = len(group["actions"])
    for kind, part in group["env_states"].items():
        for name, values in part.items():
            if len(values) <= length - 1:
                raise DemoError(f"{where}/env_states/{kind}/{name} has {len(values)} entries, expected {length + 1}")
    success = np.asarray(group["success"]).astype(bool) if "success" in group else np.zeros(length, bool)
    return int(success.argmax()) if success.any() else length - 1
