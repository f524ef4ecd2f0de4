"""Pathfinder images in blocks: what one image consists of, and the compiled generator or, without it, the plain one."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lra.tasks.pathfinder_stamps import CONTRAST, GEOMETRY, Stamps, pad, stamps

if TYPE_CHECKING:
    from numpy.typing import NDArray

ATTEMPTS = 1_000_000  # pairs of chains begun for one image before it is given up; a hundred thousand times the usual
PADDLES = {"hard": 14, "mid": 9, "easy": 6}


@dataclass(frozen=True)
class Scene:
    """What decides an image, but for its number."""

    size: int
    paddles: int
    distractors: int
    distractor_paddles: int
    target: int
    distractor: int
    every_direction: bool
    seed: int

    @property
    def bars(self) -> int:
        """Bars of an image, if no distractor is missing."""
        return 2 * self.paddles + self.distractors * self.distractor_paddles

    @property
    def tables(self) -> list[Stamps]:
        """The tables of each margin."""
        return [stamps(GEOMETRY[self.size], margin) for margin in GEOMETRY[self.size].margins]


@dataclass(frozen=True)
class Block:
    """Images in a row, and what is in them; positions are (y, x)."""

    images: NDArray[np.uint8]  # (n, size, size)
    labels: NDArray[np.uint8]  # (n,)
    margin: NDArray[np.uint8]  # (n,)
    bars: NDArray[np.int32]  # (n, bars, 3): anchor and stamp, chain after chain; -1 for a missing distractor
    marked: NDArray[np.int16]  # (n, 2, 2): origin and terminal marker
    tried: NDArray[np.int64]  # (n,): pairs of chains begun

    @classmethod
    def empty(cls, scene: Scene, count: int) -> Block:
        """Returns a block to be filled."""
        return cls(
            np.zeros((count, scene.size, scene.size), np.uint8),
            np.zeros(count, np.uint8),
            np.zeros(count, np.uint8),
            np.full((count, scene.bars, 3), -1, np.int32),
            np.zeros((count, 2, 2), np.int16),
            np.zeros(count, np.int64),
        )


def scene(
    size: int, difficulty: str, distractors: str, equal_contrast: bool, every_direction: bool, seed: int
) -> Scene:
    """Returns the scene of these options; see `lra.tasks.pathfinder`."""
    geometry, n = GEOMETRY[size], PADDLES[difficulty]
    counted = n if distractors == "length" else PADDLES["easy"]
    return Scene(
        size=size,
        paddles=n,
        distractors=geometry.distractor_paddles // (counted // 3),
        distractor_paddles=n // 3,
        target=geometry.target,
        distractor=geometry.target if equal_contrast else geometry.distractor,
        every_direction=every_direction,
        seed=seed,
    )


def make(scene: Scene, first: int, count: int) -> Block:
    """Returns the images `first` .. `first + count - 1` of a scene; each depends on its number and the scene alone.

    Raises:
        RuntimeError: no pair of chains was found in a million attempts.
    """
    block = Block.empty(scene, count)
    if compiled():
        from linrnn.kernels.cpu import pathfinder

        numbers = {
            "size": scene.size,
            "pad": pad(GEOMETRY[scene.size]),
            "seed_distance": GEOMETRY[scene.size].seed_distance,
            "paddles": scene.paddles,
            "distractors": scene.distractors,
            "distractor_paddles": scene.distractor_paddles,
            "every_direction": scene.every_direction,
            "target": scene.target,
            "distractor": scene.distractor,
            "marker": CONTRAST,
            "seed": scene.seed,
            "first": first,
            "count": count,
            "attempts": ATTEMPTS,
        }
        failed = pathfinder.generate(numbers, scene.tables, vars(block))
    else:
        from lra.tasks import pathfinder_reference

        failed = pathfinder_reference.generate(scene, first, block, ATTEMPTS)
    if failed:
        raise RuntimeError(f"image {first + failed - 1} of {scene}: no two chains found in {ATTEMPTS} attempts")
    return block


@functools.cache
def compiled() -> bool:
    """Whether the compiled generator is there; warns once if it is not."""
    from linrnn.kernels import KernelUnavailable
    from linrnn.kernels.cpu import library

    try:
        library()
    except KernelUnavailable as error:
        warnings.warn(f"Pathfinder images are made in Python, hundreds of times slower: {error}", stacklevel=3)
        return False
    return True
