"""The generator of Pathfinder images in plain Python: what kernels/cpu/pathfinder.cpp does, number by number.

It is what the compiled one is tested against, to the bit, and what runs where there is no compiler. One image:

1. the label and the margin m are drawn; the first chain starts near the middle, the second at `seed_distance` from it;
2. the chains grow in turn, a bar at a time: from the pivot, m beyond the last bar, a candidate pixel on the circle of
   radius length + m is drawn with weight (1 - occupancy) cos^2(min(continuity |turn|, 90 degrees)), and the bar is laid
   from there back towards the pivot; it is refused where occupancies add up to 1.8; a dead end starts both afresh;
3. distractors grow likewise, from anywhere free;
4. one marker goes on the first bar of either chain, the other on the last bar of the same chain (label 1) or of the
   other (label 0); everything is joined by the maximum and stretched to 0..255.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lra.tasks.pathfinder_stamps import CONTRAST, DEAD_END, FREE, GEOMETRY, SEEDS, Geometry, Stamps, pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lra.tasks.pathfinder_images import Block, Scene

DRAWS, TRIES, PLACES = 3, 5, 1000  # of a bar or a second seed; of a distractor; of its seed's place
_WORD, _GAMMA = (1 << 64) - 1, 0x9E3779B97F4A7C15

Bar = tuple[int, int, int]  # y, x, stamp


class Stream:
    """SplitMix64 (Steele et al. 2014) as a counter-based generator: number n is a hash of the key + n gamma."""

    def __init__(self, seed: int, index: int):
        self.state = _mix((_mix((seed + _GAMMA) & _WORD) + index) & _WORD)

    def below(self, n: int) -> int:
        """Returns a number of 0 .. n - 1, n at most 2^32."""
        self.state = (self.state + _GAMMA) & _WORD
        return (_mix(self.state) >> 32) * n >> 32


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _WORD
    return z ^ (z >> 31)


class Canvas:
    """What is taken, and what lies within a margin of it: both 0..255, in a frame in which every stamp fits."""

    def __init__(self, geometry: Geometry, tables: Stamps):
        self.geometry, self.tables, self.pad = geometry, tables, pad(geometry)
        self.size, self.side = geometry.size, 2 * tables.reach + 1
        self.taken, self.near = tables.border.copy(), tables.border_dilated.copy()

    def inside(self, y: int, x: int) -> bool:
        return 0 <= y < self.size and 0 <= x < self.size

    def window(self, levels: NDArray, bar: Bar) -> NDArray:
        """The part of a canvas on which the stamp of a bar lies."""
        y, x = bar[0] + self.pad - self.tables.reach, bar[1] + self.pad - self.tables.reach
        return levels[y : y + self.side, x : x + self.side]

    def fits(self, limits: NDArray[np.uint8], bar: Bar) -> bool:
        return bool((self.window(self.taken, bar) <= limits[bar[2], :, : self.side]).all())

    def take(self, bar: Bar) -> None:
        for levels, shapes in ((self.taken, self.tables.mask), (self.near, self.tables.dilated)):
            part = self.window(levels, bar)
            np.maximum(part, shapes[bar[2], :, : self.side], out=part)

    def crowded(self) -> bool:
        inner = slice(self.pad, self.pad + self.size)
        return bool(100 * np.count_nonzero(self.taken[inner, inner] <= FREE) < self.size**2)


class Chain:
    """A chain of bars and the pivot of the next one."""

    def __init__(self, canvas: Canvas, y: int, x: int, degree: int):
        tables = canvas.tables
        self.canvas, self.bars = canvas, [(y, x, degree)]
        self.pivot = (y + int(tables.advance[degree, 0]), x + int(tables.advance[degree, 1]))
        ends = [(0, 0), tables.seed_head[degree], tables.seed_pivot[degree]]
        self.inside = all(canvas.inside(y + int(end[0]), x + int(end[1])) for end in ends)

    def extend(self, random: Stream) -> bool:
        """One more bar, the one before it becoming an obstacle; False at a dead end."""
        canvas, tables = self.canvas, self.canvas.tables
        positions = [(self.pivot[0] + int(dy), self.pivot[1] + int(dx)) for dy, dx in tables.candidate]
        weights = np.zeros(len(positions), np.int64)
        for j, (y, x) in enumerate(positions):
            if canvas.inside(y, x):
                free = 255 - int(canvas.near[y + canvas.pad, x + canvas.pad])
                weights[j] = int(tables.turn[self.bars[-1][2], j]) * free
        cumulative = np.cumsum(weights)
        if cumulative[-1] < DEAD_END:
            return False
        for _ in range(DRAWS):
            j = int(np.searchsorted(cumulative, random.below(int(cumulative[-1])), side="right"))
            bar = (*positions[j], SEEDS + j)
            if canvas.fits(tables.limit, bar):
                canvas.take(self.bars[-1])
                self.bars.append(bar)
                dy, dx = tables.advance[SEEDS + j]
                self.pivot = (self.pivot[0] + int(dy), self.pivot[1] + int(dx))
                return True
        return False


def generate(scene: Scene, first: int, block: Block, attempts: int) -> int:
    """Fills a block with the images from `first` on; returns 0, or 1 + the number of the image that failed."""
    geometry = GEOMETRY[scene.size]
    for i in range(len(block.labels)):
        random = Stream(scene.seed, first + i)
        label = random.below(2)
        tables = scene.tables[random.below(len(geometry.margins))]
        pair, tried = None, 0
        while pair is None:
            if tried == attempts:
                return i + 1
            canvas, tried = Canvas(geometry, tables), tried + 1
            pair = _pair(canvas, scene, random)
        bars = [bar for chain in pair for bar in chain.bars]
        for _ in range(scene.distractors):
            bars += _distractor(canvas, scene, random)
        marked = random.below(2)
        origin, terminal = pair[marked].bars[0], pair[marked if label else 1 - marked].bars[-1]
        block.images[i] = _paint(canvas, scene, bars, (origin, terminal))
        block.labels[i], block.margin[i], block.tried[i] = label, tables.margin, tried
        block.bars[i] = bars
        block.marked[i] = [origin[:2], terminal[:2]]
    return 0


def _pair(canvas: Canvas, scene: Scene, random: Stream) -> tuple[Chain, Chain] | None:
    margin = 2 * canvas.geometry.seed_distance
    room = canvas.size - 2 * margin
    degree = random.below(SEEDS)
    if not (scene.every_direction or canvas.tables.seeded[degree]):
        return None
    y = margin + random.below(room)
    x = margin + random.below(room)
    first = Chain(canvas, y, x, degree)
    for _ in range(DRAWS):
        degree = random.below(SEEDS)
        away = canvas.tables.circle[random.below(SEEDS)]
        second = Chain(canvas, y + int(away[0]), x + int(away[1]), degree)
        if second.inside:
            break
    else:
        return None
    for _ in range(scene.paddles - 1):
        for chain in (first, second):
            if not chain.extend(random):
                return None
    for chain in (first, second):
        canvas.take(chain.bars[-1])
    return first, second


def _distractor(canvas: Canvas, scene: Scene, random: Stream) -> list[Bar]:
    n = scene.distractor_paddles
    for _ in range(TRIES):
        if canvas.crowded():
            break
        kept = canvas.taken.copy(), canvas.near.copy()
        chain = _seed(canvas, scene, random)
        if chain is not None and all(chain.extend(random) for _ in range(n - 1)):
            canvas.take(chain.bars[-1])
            return chain.bars
        canvas.taken, canvas.near = kept
    return [(-1, -1, -1)] * n


def _seed(canvas: Canvas, scene: Scene, random: Stream) -> Chain | None:
    degree = random.below(SEEDS)
    if not (scene.every_direction or canvas.tables.seeded[degree]):
        return None
    for _ in range(PLACES):
        y = random.below(canvas.size)
        chain = Chain(canvas, y, random.below(canvas.size), degree)
        if chain.inside and canvas.fits(canvas.tables.clear, chain.bars[0]):
            return chain
    return None


def _paint(canvas: Canvas, scene: Scene, bars: list[Bar], tips: tuple[Bar, Bar]) -> NDArray[np.uint8]:
    light = np.zeros(canvas.taken.shape, np.int64)
    shapes = [(bar, canvas.tables.ink[bar[2]], scene.target) for bar in bars[: 2 * scene.paddles]]
    shapes += [(bar, canvas.tables.ink[bar[2]], scene.distractor) for bar in bars[2 * scene.paddles :] if bar[2] >= 0]
    shapes += [(tip, canvas.tables.disc, CONTRAST) for tip in tips]
    for bar, shape, brightness in shapes:
        part = canvas.window(light, bar)
        np.maximum(part, shape[:, : canvas.side].astype(np.int64) * brightness, out=part)
    inner = slice(canvas.pad, canvas.pad + canvas.size)
    light = light[inner, inner] - light[inner, inner].min()
    return ((510 * light + light.max()) // (2 * light.max())).astype(np.uint8)
