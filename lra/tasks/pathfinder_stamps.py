"""The shapes of Pathfinder as integer tables: every bar, its margin and every turn that a chain can take.

Bars stand on integer pixels in finitely many directions, so all that a chain can do is tabulated once: 360 seed bars
(one per degree, laid forward from the tail) and one bar per candidate pixel on the circle round a pivot (laid back from
the head). The generators then work in integers alone and agree to the bit, on any machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEEDS = 360  # directions of a seed bar, in whole degrees
STRIDE = 32  # width of a stored stamp: one vector register of bytes
CONTRAST = 20  # brightness is kept in twentieths
WEIGHT = 1 << 16  # of going straight on
# In units of 1/255: two masks that add up to 1.8 collide, 0.8 of a mask is its body, more than 0.3 is not free.
COLLISION, BODY, FREE = 459, 204, 76
DEAD_END = 1671  # 1e-4 in units of 1 / (255 WEIGHT): candidates that weigh less are none
_EPS = 1e-6  # keeps decisions at exact multiples of 90 degrees off the rounding of sin and cos


@dataclass(frozen=True)
class Geometry:
    """The settings of the Long Range Arena's images of one size; lengths in pixels, contrasts in twentieths."""

    size: int
    padding: int
    seed_distance: int
    length: int
    thickness: float
    margins: tuple[int, ...]
    marker_radius: float
    continuity: float
    antialias: int
    distractor_paddles: int
    target: int
    distractor: int


GEOMETRY = {
    32: Geometry(32, 1, 7, 2, 0.5, (1,), 1.5, 1.0, 2, 20, 30, 40),
    128: Geometry(128, 1, 20, 5, 1.5, (2, 3), 3.0, 1.8, 2, 35, 18, 18),
    256: Geometry(256, 22, 27, 5, 2.0, (3,), 5.0, 1.8, 2, 30, 20, 20),
}


@dataclass(frozen=True)
class Stamps:
    """Tables of one margin. D bars (360 seeds, then J candidates); offsets are (y, x), levels 0 to 255.

    A stamp is an array (side, STRIDE) around the bar's anchor (the tail of a seed, the head of any other bar), which is
    at [reach, reach]; columns from `side` on change nothing.
    """

    margin: int
    reach: int
    ink: NDArray[np.uint8]  # (D, side, STRIDE): the bar
    mask: NDArray[np.uint8]  # (D, side, STRIDE): the bar and its margin
    dilated: NDArray[np.uint8]  # (D, side, STRIDE): the mask dilated once more by the margin
    limit: NDArray[np.uint8]  # (D, side, STRIDE): the greatest occupancy at which the bar still fits
    clear: NDArray[np.uint8]  # (D, side, STRIDE): the same for a seed
    turn: NDArray[np.uint32]  # (D, J): weight of candidate j after bar d
    candidate: NDArray[np.int32]  # (J, 2): head relative to the pivot
    advance: NDArray[np.int32]  # (D, 2): next pivot relative to this one (for a seed, to its tail)
    seed_head: NDArray[np.int32]  # (360, 2): relative to the tail
    seed_pivot: NDArray[np.int32]  # (360, 2): relative to the tail
    seeded: NDArray[np.uint8]  # (360,): 1 for the directions in which the 2019 code can seed
    circle: NDArray[np.int32]  # (360, 2): tail of the second seed relative to that of the first
    border: NDArray[np.uint8]  # (canvas, canvas): occupancy before anything is drawn
    border_dilated: NDArray[np.uint8]  # (canvas, canvas)
    disc: NDArray[np.uint8]  # (side, STRIDE): a marker


def pad(geometry: Geometry) -> int:
    """Returns the width of the frame round an image in which every stamp fits, whatever the margin."""
    return max(_reach(geometry, margin) for margin in geometry.margins)


def _reach(geometry: Geometry, margin: int) -> int:
    bar = geometry.length + int(np.ceil(geometry.thickness)) + 2 * margin
    return max(bar, int(np.ceil(geometry.marker_radius)) + 3)


@functools.cache
def stamps(geometry: Geometry, margin: int) -> Stamps:
    """Returns the tables of images of this geometry and margin."""
    length, radius = geometry.length, geometry.length + margin
    circle = np.deg2rad(np.arange(0, 360, 360 / (2 * np.pi * radius)))  # an arc of one pixel from each to the next
    around = np.stack([np.sin(circle), np.cos(circle)], axis=1)
    candidate = np.unique(np.floor(radius * around + _EPS).astype(np.int32), axis=0)
    degrees = np.deg2rad(np.arange(SEEDS) - 180)
    angle = np.concatenate([degrees, np.arctan2(candidate[:, 0], candidate[:, 1])])
    heading = np.stack([np.sin(angle), np.cos(angle)], axis=1)

    laid = heading * np.where(np.arange(len(angle)) < SEEDS, 1, -1)[:, None]
    reach = _reach(geometry, margin)
    fine = _bars(reach * geometry.antialias, laid, geometry)
    ink = _shrink(fine, reach)
    mask = _shrink(_dilate(fine, margin * geometry.antialias), reach)
    turn = np.abs(angle[:, None] - angle[None, SEEDS:])
    turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * geometry.continuity, np.pi / 2)

    seeds = heading[:SEEDS]
    seed_head = _up(length * seeds)
    seed_pivot = seed_head + _up(-radius * seeds)
    advance = _up((length + 2 * margin) * heading)
    advance[:SEEDS] += seed_pivot

    frame = pad(geometry)
    canvas = geometry.size + 2 * frame
    border = np.full((canvas, canvas), 255, np.uint8)
    inner = slice(frame + geometry.padding, canvas - frame - geometry.padding)
    border[inner, inner] = 0
    return Stamps(
        margin=margin,
        reach=reach,
        ink=_stored(ink, 0),
        mask=_stored(mask, 0),
        dilated=_stored(_dilate(mask, margin), 0),
        limit=_stored(np.minimum(255, COLLISION - 1 - mask.astype(int)).astype(np.uint8), 255),
        clear=_stored(np.where(mask >= BODY, np.uint8(FREE), np.uint8(255)), 255),
        turn=np.round(WEIGHT * np.cos(turn) ** 2).astype(np.uint32),
        candidate=candidate,
        advance=advance,
        seed_head=seed_head,
        seed_pivot=seed_pivot,
        seeded=_seeded(mask[:SEEDS], reach, radius),
        circle=np.floor(geometry.seed_distance * seeds + 0.5 + _EPS).astype(np.int32),
        border=border,
        border_dilated=_dilate(border[None], margin)[0],
        disc=_stored(_shrink(_disc(reach * geometry.antialias, geometry), reach), 0)[0],
    )


def _up(offsets: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.ceil(offsets - _EPS).astype(np.int32)


def _grid(half: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float64)
    return y, x


def _bars(half: int, laid: NDArray[np.float64], geometry: Geometry) -> NDArray[np.uint8]:
    """Draws straight bars from the middle of a finer canvas along the unit vectors `laid`: (D, 2 half + 1, same)."""
    y, x = _grid(half)
    along = laid[:, 0, None, None] * y + laid[:, 1, None, None] * x
    across = laid[:, 1, None, None] * y - laid[:, 0, None, None] * x
    width, length = geometry.thickness * geometry.antialias, geometry.length * geometry.antialias
    inside = (along > -0.5 - _EPS) & (along < length + 0.5 + _EPS)
    inside &= (across > _EPS - width / 2) & (across < width / 2 + _EPS)
    return np.where(inside, np.uint8(255), np.uint8(0))


def _disc(half: int, geometry: Geometry) -> NDArray[np.uint8]:
    y, x = _grid(half)
    radius = geometry.marker_radius * geometry.antialias
    return np.where(x**2 + y**2 <= radius**2, np.uint8(255), np.uint8(0))[None]


def _dilate(images: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    """Grey dilation of (N, H, W) by a disc: the greatest level within `radius`."""
    H, W = images.shape[1:]
    framed = np.pad(images, ((0, 0), (radius, radius), (radius, radius)))
    out = np.zeros_like(images)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dy * dy + dx * dx <= radius * radius:
                shifted = framed[:, radius + dy : radius + dy + H, radius + dx : radius + dx + W]
                np.maximum(out, shifted, out=out)
    return out


def _shrink(fine: NDArray[np.uint8], reach: int) -> NDArray[np.uint8]:
    """Lanczos-3 reduction of (N, fine, fine) to (N, 2 reach + 1, same).

    Columns first, then rows, each rounded and clipped to 0..255 as image libraries do: so its ripples stay faint.
    """
    n, m = 2 * reach + 1, fine.shape[1]
    scale = m / n
    distance = (np.arange(m)[None] + 0.5) / scale - (np.arange(n)[:, None] + 0.5)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    weights /= weights.sum(1, keepdims=True)
    columns = np.clip(np.floor(fine @ weights.T + 0.5), 0, 255)
    return np.clip(np.floor(weights @ columns + 0.5), 0, 255).astype(np.uint8)


def _seeded(masks: NDArray[np.uint8], reach: int, radius: int) -> NDArray[np.uint8]:
    """The directions in which the 2019 code finds room for a seed, (360,).

    It looks for room with the full pixels of the bar's mask, displaced by (1, 1), and takes a corner of the image at
    which none of them is inside for an image without room. It so loses the direction, on every image.
    """
    usable = []
    for mask in masks:
        full = np.argwhere(mask == 255) - reach + 1
        full = full[(np.abs(full) <= radius).all(1)]
        corners = [(full * signs >= 0).all(1).any() for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        usable.append(all(corners))
    return np.array(usable, np.uint8)


def _stored(shapes: NDArray[np.uint8], neutral: int) -> NDArray[np.uint8]:
    return np.pad(shapes, ((0, 0), (0, 0), (0, STRIDE - shapes.shape[2])), constant_values=neutral)
