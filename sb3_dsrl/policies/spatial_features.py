"""Where things are to each other, and finely: features of a flat state whose parts are known by name.

Letters in shapes: ``n`` frames, ``D`` dimensions of the state, ``K`` places, ``P`` poses among them, ``L`` pairs of places,
``F`` features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch as th

from sb3_dsrl.policies.networks import Network

#: Name and size of each part of a flat state, in its order: ``[("agent/qpos", 9), ..., ("extra/tcp_pose", 7), ...]``.
StateLayout = Sequence[tuple[str, int]]


class SpatialFeatures(Network):
    """
    Normalised over a whole table, a millimetre is a thousandth. These features show it, for any task whose state names its
    poses and positions as ManiSkill's tasks do:

    - in place of each quaternion the first two columns of its rotation matrix (https://arxiv.org/abs/1812.07035): q and -q are
      one rotation;
    - of each pair of poses or positions the difference in the axes of the world and, where they have axes, of either of them;
      of each pair of poses also the rotation between them;
    - of all these differences, and of those that the state itself holds, ``tanh(x / scale)`` for each scale: finely around 0,
      where things touch.

    What is no pose stays as it is.

    A part is a pose if its name ends in "pose" and its size is 7 (position in metres, quaternion with w first), a position if
    its name ends in "pos" and its size is 3. A position with "_to_" in its name is a difference.

    :param layout: name and size of each part of the state
    :param scales: in metres
    :raises ValueError: if a part has no name or no size, or a scale is not positive
    """

    def __init__(self, layout: StateLayout, scales: Sequence[float] = (0.05, 0.01)) -> None:
        layout = [(str(name), int(size)) for name, size in layout]
        if any(size < 1 for _, size in layout) or not all(scale > 0 for scale in scales):
            raise ValueError(f"Sizes of a layout and scales must be positive, found {describe(layout)} and {list(scales)}")
        super().__init__(layout=[list(part) for part in layout], scales=list(scales))
        starts = list(_starts(layout))
        #: name and first entry of each pose
        self.poses = [(name, at) for name, at, size in starts if size == 7 and name.endswith("pose")]
        points = [(name, at) for name, at, size in starts if size == 3 and name.endswith("pos")]
        offsets = [at for name, at in points if "_to_" in name.rpartition("/")[2]]
        places = [at for _, at in self.poses] + [at for _, at in points if at not in offsets]
        pairs = list(combinations(range(len(places)), 2))
        n_poses = len(self.poses)
        self.scales = tuple(scales)
        self.state_dim = sum(size for _, size in layout)
        quaternions = [list(range(at + 3, at + 7)) for _, at in self.poses]
        rotating = {i for quaternion in quaternions for i in quaternion}
        self._index("kept", [i for i in range(self.state_dim) if i not in rotating])
        self._index("quaternions", quaternions, 4)
        self._index("places", [[at, at + 1, at + 2] for at in places], 3)
        self._index("offsets", [[at, at + 1, at + 2] for at in offsets], 3)
        self._index("pairs", pairs, 2)
        self._index("from_first", [[k, i] for k, (i, _) in enumerate(pairs) if i < n_poses], 2)
        self._index("from_second", [[k, j] for k, (_, j) in enumerate(pairs) if j < n_poses], 2)
        self._index("pose_pairs", [[i, j] for i, j in pairs if j < n_poses], 2)
        n_differences = 3 * (len(pairs) + len(self.from_first) + len(self.from_second))
        n_rotations = 6 * (n_poses + len(self.pose_pairs))
        n_fine = len(self.scales) * (n_differences + 3 * len(offsets))
        #: F
        self.out_dim = len(self.kept) + n_differences + n_rotations + n_fine
        #: Floors of the standard deviation of each feature. Those without unit move by 1 where a constant one moves at all.
        self.min_std: th.Tensor
        metres, unitless = len(self.kept) + n_differences, n_rotations + n_fine
        self.register_buffer("min_std", th.tensor([1e-2] * metres + [1e-1] * unitless), persistent=False)

    kept: th.Tensor
    quaternions: th.Tensor
    places: th.Tensor
    offsets: th.Tensor
    pairs: th.Tensor
    from_first: th.Tensor
    from_second: th.Tensor
    pose_pairs: th.Tensor

    def _index(self, name: str, index: Sequence[Sequence[int] | int], columns: int | None = None) -> None:
        shape = (-1,) if columns is None else (len(index), columns)
        self.register_buffer(name, th.tensor(index, dtype=th.long).reshape(shape), persistent=False)

    def check(self, frames: th.Tensor) -> None:
        """
        :param frames: states of demos, (n, D)
        :raises ValueError: if they do not have this layout
        """
        for name, at in self.poses:
            length = frames[:, at + 3 : at + 7].norm(dim=1)
            if ((length - 1).abs() > 1e-2).any():
                raise ValueError(
                    f"The layout of the state does not fit the demos: {name} should end in quaternions of length 1, found "
                    f"{length.min():.3g} to {length.max():.3g}; the layout is {describe(self.config['layout'])}"
                )

    def forward(self, frames: th.Tensor) -> th.Tensor:
        """
        :param frames: states, (n, D)
        :return: (n, F)
        """
        rotations = rotation_matrices(frames[:, self.quaternions])  # (n, P, 3, 3)
        places = frames[:, self.places]  # (n, K, 3)
        differences = places[:, self.pairs[:, 1]] - places[:, self.pairs[:, 0]]  # (n, L, 3)
        inverse = rotations.transpose(-1, -2)
        seen = [
            (inverse[:, index[:, 1]] @ differences[:, index[:, 0], :, None]).squeeze(-1)
            for index in (self.from_first, self.from_second)
        ]
        between = inverse[:, self.pose_pairs[:, 0]] @ rotations[:, self.pose_pairs[:, 1]]
        differences = th.cat([differences, *seen], dim=1)
        near = th.cat([differences, frames[:, self.offsets]], dim=1).flatten(1)
        columns = th.cat([rotations, between], dim=1)[..., :2].flatten(1)
        fine = [(near / scale).tanh() for scale in self.scales]
        return th.cat([frames[:, self.kept], differences.flatten(1), columns, *fine], dim=1)


def rotation_matrices(quaternions: th.Tensor) -> th.Tensor:
    """
    :param quaternions: w first, of any length but 0, (..., 4)
    :return: (..., 3, 3)
    """
    w, x, y, z = (quaternions / quaternions.norm(dim=-1, keepdim=True).clamp_min(1e-8)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return th.stack([th.stack(row, dim=-1) for row in rows], dim=-2)


def describe(layout: StateLayout) -> str:
    """A layout in words, with the sum of its sizes."""
    return f"{', '.join(f'{name} {size}' for name, size in layout)} ({sum(size for _, size in layout)} in all)"


def _starts(layout: StateLayout) -> Iterator[tuple[str, int, int]]:
    """Name, first entry and size of each part."""
    at = 0
    for name, size in layout:
        yield name, at, size
        at += size
