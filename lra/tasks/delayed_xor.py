"""Delayed XOR: the parity of two marked bits at a given distance in noise, and its twin in which they are neighbours.

The bits are independent and fair, so whatever misses one of the two marks carries no information on the label: no
window of `distance` tokens or fewer does. A task at distance D thus certifies that its accuracy needs D, and the twin
of equal length, on the same noise, shows what the length alone costs.

The certificate is of windows that are read one at a time. A model that pools features of windows over all of time can
count the marked ones, and XOR is a function of their number: by the largest feature ("is there a marked 1?") it is
solved, and by the mean, read by a linear head, to 75 %. So the last position answers: pooling is "last" by default, and
"max" is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lra.checks import check
from lra.tasks.base import column
from lra.tasks.controls import FIRST, Control, Rows, padded

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

MARKED = 2  # added to the id of a bit


@dataclass(frozen=True, kw_only=True)
class DelayedXor(Control):
    """Delayed XOR: `label` is the exclusive or of the two marked bits.

    Ids: 0 padding, 1 mask, 2 and 3 the bits 0 and 1 of the noise, 4 and 5 marked bits.
    """

    length: int = 1_024
    """Tokens of a sequence."""
    distance: int = 512
    """Positions from one marked bit to the other."""
    local: bool = False
    """The twin: the same sequences, but the second mark follows the first at once."""
    pooling: str = "last"
    """The last position answers; with mean, counting the marks is worth 75 %."""

    name: ClassVar[str] = "delayed_xor"
    summary: ClassVar[str] = "the parity of two marked bits far apart in noise"

    def check(self) -> None:
        super().check()
        check(self.length >= 2, "length", self.length, "at least 2")
        check(1 <= self.distance < self.length, "distance", self.distance, f"1 to length - 1 = {self.length - 1}")
        check(self.pooling != "max", "pooling", self.pooling, "last or mean: by its maximum a bag of windows solves it")

    @property
    def symbols(self) -> int:
        return 4

    @property
    def n_classes(self) -> int:
        return 2

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.length, self.length

    @property
    def tested_lengths(self) -> tuple[int, ...]:
        return (self.length,)

    def draw(self, rng: np.random.Generator, length: np.ndarray) -> Rows:
        import numpy as np

        row = np.arange(len(length))
        bits = rng.integers(0, 2, (len(length), self.length), dtype=np.uint16)
        first = rng.integers(0, self.length - self.distance, len(length))
        second = first + (1 if self.local else self.distance)
        label = (bits[row, first] ^ bits[row, second]).astype(np.int32)
        ids = bits + np.uint16(FIRST)
        ids[row, first] += MARKED
        ids[row, second] += MARKED
        return Rows(ids, label, length, {})

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Adds the best threshold on the number of marked ones, which is what a mean of windows can tell: 75 %."""
        import numpy as np

        ones = {name: (padded(splits[name], "input_ids", 0) == FIRST + 1 + MARKED).sum(axis=1) for name in splits}
        label = {name: column(splits[name], "label") for name in splits}

        def accuracy(split: str, threshold: int, above: int) -> float:
            return float(np.mean(np.where(ones[split] >= threshold, above, 1 - above) == label[split]))

        best = max(((t, above) for t in (1, 2) for above in (0, 1)), key=lambda rule: accuracy("train", *rule))
        return {**super().reference_lines(splits), "threshold on the marked ones": accuracy("test", *best)}
