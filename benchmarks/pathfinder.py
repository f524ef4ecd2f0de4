"""Pathfinder images: milliseconds of one core for an image, and what the images are like.

    python benchmarks/pathfinder.py

Times are CPU times of one thread, so that a busy machine does not count. The times of the data generator of 2019
(github.com/drewlinsley/pathfinder, the one behind the Long Range Arena's images) were measured once, on another machine
of this kind, and stand here as constants; those of 256 pixels are of longer curves, which are made with fewer attempts.
"""

import argparse
import time

import common
import numpy as np

from lra.tasks.pathfinder import interval_accuracy
from lra.tasks.pathfinder_images import Block, Scene, make, scene
from lra.tasks.pathfinder_reference import generate

SIZES = {32: (40_000, 40), 128: (4_000, 12), 256: (5_000, 20)}  # images, and those made in Python
OF_2019 = {32: 620.0, 128: 20_000.0, 256: 2_400.0}  # ms
GOALS = {32: 6.0, 128: 200.0}


def milliseconds(drawn: Scene, count: int, plain: bool) -> float:
    """CPU milliseconds of an image."""
    make(drawn, 0, 1)
    start = time.thread_time()
    if plain:
        generate(drawn, 0, Block.empty(drawn, count), 10**6)
    else:
        make(drawn, 0, count)
    return 1e3 * (time.thread_time() - start) / count


def share(x: float) -> str:
    return f"{100 * x:.1f} %"


def statistics(drawn: Scene, count: int) -> list[str]:
    """Cells: images, attempts, distractors, ink, black, label 1, accuracy of the markers' distance."""
    block = make(drawn, 0, count)
    apart = block.marked[:, 0].astype(float) - block.marked[:, 1]
    distance = np.round(np.hypot(apart[:, 0], apart[:, 1])).astype(int)
    half = count // 2
    right = interval_accuracy(distance[:half], block.labels[:half], distance[half:], block.labels[half:])
    found = (block.bars[:, 2 * drawn.paddles :: drawn.distractor_paddles, 2] >= 0).sum(1).mean()
    return [
        f"{count:,}",
        f"{block.tried.mean():.0f}",
        f"{found:.1f} of {drawn.distractors}",
        share((block.images > 64).mean()),
        share((block.images == 0).mean()),
        share(block.labels.mean()),
        f"{share(right)} ± {100 * np.sqrt(0.25 / half):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the images, for a quick look")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    lines = [common.head("Pathfinder images", "linrnn", "numpy"), "## One image, one core", ""]
    lines += ["| size | compiled, ms | Python, ms | code of 2019, ms | faster than it | goal, ms |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: |"]
    scenes = {
        (size, every): scene(size, "hard", "length", False, every, 0) for size in SIZES for every in (False, True)
    }
    for size, (count, few) in SIZES.items():
        drawn = scenes[size, False]
        fast = milliseconds(drawn, max(2, int(args.share * count / 4)), False)
        slow = milliseconds(drawn, max(1, int(args.share * few)), True)
        goal = f"{GOALS[size]:g}" if size in GOALS else "-"
        ratio = f"{OF_2019[size] / fast:,.0f} x"
        lines.append(f"| {size} | {fast:.3f} | {slow:.0f} | {OF_2019[size]:,.0f} | {ratio} | {goal} |")
        print(lines[-1], flush=True)
    lines += ["", "## What they are like", ""]
    lines += [
        "14 bars a curve. Ink: levels above 64; black: levels of 0. Distance of the markers: the best interval of it,"
    ]
    lines += ["chosen on one half of the images, tells the labels of so many of the other.", ""]
    lines += [
        "| size | first bars | images | pairs begun | distractors | ink | black | label 1 | distance of markers |"
    ]
    lines += ["| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for (size, every), drawn in scenes.items():
        cells = statistics(drawn, max(20, int(args.share * SIZES[size][0])))
        lines.append(f"| {size} | {'every direction' if every else 'as in 2019'} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if not args.no_write:
        path = common.RESULTS / "pathfinder.md"
        common.write_whole(path, "\n".join([*lines, ""]))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
