"""Pathfinder (Linsley et al. 2018, arXiv:1805.08315), the variants of the Long Range Arena, drawn on the spot.

Two long dashed curves wind through an image among shorter ones, and two discs mark an end of either: are both on one
curve (label 1) or not (0)? Each image depends on the seed and its own number alone, never on how many are drawn or by
how many threads. `lra.tasks.pathfinder_reference` says step by step how one is made.

The settings are those of the data generator of 2019 with which the Long Range Arena's images were made, of the
difficulty that it uses, 14 bars a curve. Worth knowing:

- At 32 pixels a distractor's bars are a third brighter than a target's (2.0 against 1.5; the discs are 1.0): a cue that
  the larger images lack. `equal_contrast` takes it away.
- That generator loses the first bars of most directions where the margin is small (see `_seeded` of
  `lra.tasks.pathfinder_stamps`). At 32 pixels all but about 40 directions in 360 are lost, so the first curve starts
  towards the upper left and only a third of the distractors come about. The images of the release are like that, and so
  are these, unless `every_direction` asks for all.
- The number of distractors is computed from the length of the curves; the release's own may have been computed from
  that of the easy ones, which gives twice as many: `distractors: easy`.
- One end that can be marked is always near the middle of the image.
- The distance between the discs says a little: whether it lies in the best interval is right in 55 % of the images of
  32 pixels, 51 % of 128 and 63 % of 256. It is among the reference lines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lra.checks import check
from lra.tasks.base import SPLITS, Ids, Levels, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

MOST_VALUES = 1 << 30  # of a part of a column: Arrow's offsets of lists have 31 bits
BLOCK_PIXELS = 1 << 19  # of the images that a thread makes at a time


@dataclass(frozen=True, kw_only=True)
class Pathfinder(Task):
    """Images of 32 x 32 pixels in raster order: 1,024 positions, two classes, 80 / 10 / 10 % of the images.

    The splits have the columns input_ids (uint8 levels), label and index (number of the image); drawn images have also
    margin (free pixels round a bar), distractors (curves) and distance (between the markers, in whole pixels).
    """

    n_images: int = 200_000
    """Images in all; of a release, the first so many."""
    difficulty: Literal["hard", "mid", "easy"] = "hard"
    """Bars of a curve: 14, 9 or 6. The Long Range Arena uses hard."""
    distractors: Literal["length", "easy"] = "length"
    """Whether the number of distractors follows from the length of the curves or from that of the easy ones."""
    equal_contrast: bool = False
    """Draws distractors as bright as targets; the discs stay as they are."""
    every_direction: bool = False
    """Lets curves start in every direction, which the generator of 2019 does not; so more distractors find room."""
    images: Literal["generated", "release"] = "generated"
    """generated: drawn; release: read from the user's copy of the Long Range Arena's files, in `data_dir`."""
    mask_rate: float = 0.5
    """Share of pixels hidden in masked pretraining (Amos et al. 2024, arXiv:2310.02980)."""
    encoding: Literal["pixels", "tokens"] = "pixels"
    """pixels: real values (level - 127.5) / 127.5 through a linear map; tokens: levels through an embedding."""
    pretrain_loss: Literal["l1", "ce"] = "ce"
    """Denoising loss of pixels: absolute error, or cross-entropy over the levels (which is that of tokens)."""

    name: ClassVar[str] = "pathfinder"
    summary: ClassVar[str] = "two discs among dashed curves, on one curve or on two? 32 x 32 (Pathfinder)"
    ink: ClassVar[bool] = True
    not_data: ClassVar[tuple[str, ...]] = (*Task.not_data, "encoding", "pretrain_loss")
    size: ClassVar[int] = 32
    benchmark_rows: ClassVar[dict[str, int]] = {"train": 160_000, "val": 20_000, "test": 20_000}
    n_classes: ClassVar[int] = 2  # type: ignore[assignment]

    def check(self) -> None:
        check(self.n_images >= 10, "n_images", self.n_images, "at least 10")
        check(self.seed < 2**64, "seed", self.seed, "below 2^64")
        if self.images == "release":
            for option in ("distractors", "equal_contrast", "every_direction", "seed"):
                given, default = getattr(self, option), getattr(type(self), option)
                check(given == default, option, given, f"{default!r} with images: release, whose images are drawn")

    @property
    def max_length(self) -> int:
        return self.size**2

    @property
    def inputs(self) -> Ids | Levels:
        if self.encoding == "tokens":
            return Ids(258, pad_id=256, mask_id=257)
        return Levels(1, 127.5, 127.5, self.pretrain_loss)

    @property
    def rows(self) -> dict[str, int] | None:
        return None if self.images == "release" else _split_sizes(self.n_images)

    def generate(self, workers: int | None, data_dir: Path | None) -> dict[str, Dataset]:
        """Returns the splits; see the base.

        Raises:
            ValueError: `data_dir` holds a release that `images` does not ask for, or none, or a damaged one.
        """
        from lra.tasks.pathfinder_release import find_release, read_release

        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        workers = workers or os.cpu_count() or 1
        if self.images == "release":
            return _splits(*read_release(self, data_dir, workers))
        if data_dir is not None and (found := find_release(self, data_dir)) is not None:
            raise ValueError(f"{found} holds the Long Range Arena's images: read them with images: release")
        return _splits(*self._draw(workers))

    def _draw(self, workers: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Levels (n_images, size^2) uint8, and the other columns."""
        from concurrent.futures import ThreadPoolExecutor, as_completed

        import numpy as np
        from tqdm.auto import tqdm

        from lra.tasks.pathfinder_images import make, scene

        drawn = scene(
            self.size, self.difficulty, self.distractors, self.equal_contrast, self.every_direction, self.seed
        )
        n, step = self.n_images, max(1, BLOCK_PIXELS // self.size**2)
        levels = np.empty((n, self.size**2), np.uint8)
        columns: dict[str, np.ndarray] = {
            "label": np.empty(n, np.uint8),
            "index": np.arange(n, dtype=np.int32),
            "margin": np.empty(n, np.uint8),
            "distractors": np.empty(n, np.uint8),
            "distance": np.empty(n, np.uint16),
        }

        def block(start: int) -> int:
            made = make(drawn, start, min(step, n - start))
            rows = slice(start, start + len(made.labels))
            apart = made.marked[:, 0].astype(float) - made.marked[:, 1]
            firsts = made.bars[:, 2 * drawn.paddles :: drawn.distractor_paddles, 2]
            levels[rows] = made.images.reshape(len(made.images), -1)
            columns["label"][rows], columns["margin"][rows] = made.labels, made.margin
            columns["distractors"][rows] = (firsts >= 0).sum(1)
            columns["distance"][rows] = np.round(np.hypot(apart[:, 0], apart[:, 1]))
            return len(made.labels)

        make(drawn, 0, 1)  # a missing library is said, and the tables are made, once and not by every thread
        with (
            tqdm(total=n, desc=f"{self.name} images", unit="image", disable=None, leave=False) as progress,
            ThreadPoolExecutor(workers) as pool,
        ):
            jobs = [pool.submit(block, start) for start in range(0, n, step)]
            try:
                for job in as_completed(jobs):
                    progress.update(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)  # Ctrl-C ends the work at once
                raise
        return levels, columns

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        from lra.tasks.pathfinder_release import describe_release

        return describe_release(self, data_dir, hashes) if self.images == "release" else {}

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Returns the test accuracies of the most frequent label and of the markers' distance alone."""
        from lra.tasks.base import column

        lines = super().reference_lines(splits)
        if self.images == "generated":
            train, test = (
                (column(splits[name], "distance"), column(splits[name], "label")) for name in ("train", "test")
            )
            lines["marker distance"] = interval_accuracy(*train, *test)
        return lines

    def strata(self, split: Dataset) -> dict[str, np.ndarray]:
        """Returns the distance between the markers and, where they differ, the margins; nothing of a release."""
        from lra.tasks.base import column

        if self.images == "release":
            return {}
        strata = {name: column(split, name) for name in ("distance", "margin")}
        return strata if strata["margin"].min() < strata["margin"].max() else {"distance": strata["distance"]}

    def picture(self, splits: Mapping[str, Dataset], path: Path) -> None:
        """Writes a contact sheet of training images: connected in the upper half, unconnected in the lower."""
        import numpy as np

        from lra.tasks.base import column
        from lra.tasks.pictures import contact_sheet

        columns = {32: 10, 128: 4, 256: 3}[self.size]
        label = column(splits["train"], "label")
        shown = np.concatenate([np.flatnonzero(label == wanted)[: 2 * columns] for wanted in (1, 0)])
        levels = np.array(splits["train"].select_columns(["input_ids"])[shown]["input_ids"], dtype=np.uint8)
        names = ["connected" if label[i] else "not connected" for i in shown]
        contact_sheet(levels.reshape(-1, self.size, self.size), names, path, columns)


@dataclass(frozen=True, kw_only=True)
class PathX(Pathfinder):
    """Path-X: Pathfinder of 128 x 128 pixels, 16,384 positions.

    The default is a tenth of the Long Range Arena's 200,000 images, enough for a start and 330 MB.
    """

    n_images: int = 20_000
    """Images in all; of a release, the first so many."""

    name: ClassVar[str] = "pathx"
    summary: ClassVar[str] = "two discs among dashed curves, on one curve or on two? 128 x 128 (Path-X)"
    size: ClassVar[int] = 128


@dataclass(frozen=True, kw_only=True)
class PathX256(PathX):
    """PathX-256: Pathfinder of 256 x 256 pixels, 65,536 positions; 20,000 images, 1.3 GB."""

    name: ClassVar[str] = "pathx256"
    summary: ClassVar[str] = "two discs among dashed curves, on one curve or on two? 256 x 256 (PathX-256)"
    size: ClassVar[int] = 256


def interval_accuracy(x: np.ndarray, label: np.ndarray, test_x: np.ndarray, test_label: np.ndarray) -> float:
    """Test accuracy of the rule `a <= x < b`, or its opposite, that is most often right in training."""
    import numpy as np

    best: tuple[int, int, int, int] | None = None
    for inside in (1, 0):
        gained = np.concatenate([[0], np.cumsum(np.bincount(x, np.where(label == inside, 1, -1)))]).astype(int)
        b = int((gained - np.minimum.accumulate(gained)).argmax())
        a = int(gained[: b + 1].argmin())
        right = int(gained[b] - gained[a] + np.sum(label != inside))
        best = max(best or (0, 0, 0, 0), (right, a, b, inside))
    _, a, b, inside = best or (0, 0, 0, 0)
    return float(np.mean(((a <= test_x) & (test_x < b)) == (test_label == inside)))


def _split_sizes(n: int) -> dict[str, int]:
    train, val = n * 8 // 10, n // 10
    return {"train": train, "val": val, "test": n - train - val}


def _splits(levels: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, Dataset]:
    import numpy as np
    import pyarrow as pa

    from lra.tasks.in_memory import in_memory

    def lists(rows: np.ndarray) -> pa.ListArray:
        offsets = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))

    splits: dict[str, Dataset] = {}
    start, sizes, step = 0, _split_sizes(len(levels)), max(1, MOST_VALUES // levels.shape[1])
    for split in SPLITS:
        rows = slice(start, start + sizes[split])
        start = rows.stop
        images = levels[rows]
        table = {"input_ids": pa.chunked_array([lists(images[i : i + step]) for i in range(0, len(images), step)])}
        splits[split] = in_memory(pa.table({**table, **{name: values[rows] for name, values in columns.items()}}))
    return splits
