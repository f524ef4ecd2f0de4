"""Induction heads (Mamba: Gu and Dao 2023, arXiv:2312.00752, after Olsson et al. 2022): what followed it last time?

    ids:   e b a S c d a b ... f S        label: c

The special token S occurs twice, the second time as the last token; the label is the token behind the first. Training
sequences have one length and test sequences several, which shows how far a model extrapolates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lra.checks import check
from lra.tasks.base import column
from lra.tasks.controls import FIRST, Control, Rows, check_lengths, label_accuracy, most_frequent, padded

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

SPECIAL, ORDINARY = FIRST, FIRST + 1


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Control):
    """Induction heads: `label` is the token, from 0, behind the first special token; `distance` back to that token.

    Ids: 0 padding, 1 mask, 2 special, then the ordinary tokens.
    """

    n_test: int = 3_500
    """Test sequences, as many of each tested length."""
    length: int = 256
    """Tokens of training and validation sequences."""
    test_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """Lengths of test sequences; the paper goes up to 1048576."""
    vocab: int = 16
    """Different tokens, the special one among them."""
    pooling: str = "last"
    """The last token asks."""

    name: ClassVar[str] = "induction_heads"
    summary: ClassVar[str] = "the token that followed the special one before, also at longer lengths"

    def check(self) -> None:
        super().check()
        check(self.length >= 3, "length", self.length, "at least 3")
        check_lengths("test_lengths", self.test_lengths, 3)
        check(3 <= self.vocab <= 65_000, "vocab", self.vocab, "3 to 65000")

    @property
    def symbols(self) -> int:
        return self.vocab

    @property
    def n_classes(self) -> int:
        return self.vocab - 1

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.length, self.length

    @property
    def tested_lengths(self) -> tuple[int, ...]:
        return self.test_lengths

    def draw(self, rng: np.random.Generator, length: np.ndarray) -> Rows:
        import numpy as np

        row, T = np.arange(len(length)), int(length.max())
        ids = rng.integers(ORDINARY, FIRST + self.vocab, (len(length), T), dtype=np.uint16)
        first = rng.integers(0, length - 2)
        ids[row, first] = SPECIAL
        ids[row, length - 1] = SPECIAL
        return Rows(ids, ids[row, first + 1].astype(np.int32) - ORDINARY, length, {"distance": length - 2 - first})

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Adds the rule that answers the sequence's most frequent token: it counts and knows no order."""
        guess = most_frequent(padded(splits["test"], "input_ids", 0), ORDINARY, self.n_classes)
        frequent = label_accuracy(guess, column(splits["test"], "label")[:, None])
        return {**super().reference_lines(splits), "most frequent token of the sequence": frequent}

    def strata(self, split: Dataset) -> dict[str, np.ndarray]:
        return {"distance": column(split, "distance")}
