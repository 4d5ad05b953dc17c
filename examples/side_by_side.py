"""A small picture that moves: the episodes of two films, all at once, side by side.

    python examples/side_by_side.py runs/quickstart/before.mp4 runs/quickstart/after.mp4 --output before_after.gif

``make demo`` makes the films. Each holds ``--episodes`` episodes of the same length, one after the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import imageio.v2 as imageio
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from sb3_dsrl.cli.common import cli


@dataclass
class Args:
    """Two films side by side."""

    before: Annotated[Path, tyro.conf.Positional]
    """Film of the frozen flow."""
    after: Annotated[Path, tyro.conf.Positional]
    """Film of the steered policy, from the same starts."""
    output: Path = Path("before_after.gif")
    """The picture."""
    episodes: int = 8
    """Episodes in each film."""
    rows: int = 2
    """The episodes of each film stand in so many rows."""
    crop: tuple[int, int, int, int] = (24, 64, 232, 256)
    """What is shown of each frame: left, top, right and bottom in pixels."""
    width: int = 110
    """Of an episode, in pixels."""
    captions: tuple[str, str] = ("frozen flow, random noise", "the same flow, steered")
    """What stands above the two."""
    fps: int = 15
    """Frames per second."""


def episodes(path: Path, args: Args) -> np.ndarray:
    """The cropped frames of a film, (episodes, frames, height, width, 3)."""
    frames = imageio.mimread(path, memtest=False)
    if len(frames) % args.episodes:
        raise ValueError(f"{path} has {len(frames)} frames, which are not {args.episodes} episodes of the same length")
    left, top, right, bottom = args.crop
    size = (args.width, args.width * (bottom - top) // (right - left))
    small = [np.asarray(Image.fromarray(frame).crop(args.crop).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    return np.stack(small).reshape(args.episodes, -1, *small[0].shape)


def grid(film: np.ndarray, rows: int, gap: int = 3) -> np.ndarray:
    """All episodes in one picture for each frame, (frames, height, width, 3)."""
    padded = np.pad(film, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    n, length, height, width, _ = padded.shape
    table = padded.reshape(rows, n // rows, length, height, width, 3)
    return table.transpose(2, 0, 3, 1, 4, 5).reshape(length, rows * height, n // rows * width, 3)


def main(args: Args) -> None:
    """Writes the picture."""
    sides = [grid(episodes(path, args), args.rows) for path in (args.before, args.after)]
    space = np.full((*sides[0].shape[:2], 14, 3), 255, np.uint8)
    frames = np.concatenate([sides[0], space, sides[1]], axis=2)
    frames = np.pad(frames, ((0, 0), (24, 0), (0, 0), (0, 0)), constant_values=255)
    font = ImageFont.load_default(size=15)
    pictures = []
    for frame in frames:
        picture = Image.fromarray(frame)
        for text, x in zip(args.captions, (2, sides[0].shape[2] + space.shape[2] + 2), strict=True):
            ImageDraw.Draw(picture).text((x, 2), text, fill=(40, 40, 40), font=font)
        pictures.append(picture)
    palette = pictures[len(pictures) // 2].quantize(64)
    small = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pause = [round(1000 / args.fps)] * (len(small) - 1) + [1500]  # ms; the last frame stays
    small[0].save(args.output, save_all=True, append_images=small[1:], duration=pause, loop=0, optimize=True)
    print(f"{args.output}: {len(small)} frames, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli(main, Args)
