"""Selective copying (Mamba: Gu and Dao 2023, arXiv:2312.00752): repeat the data tokens, skip the noise between them.

    ids:    . . a . . . b . c . .  _ _ _
    labels: - - - - - - - - - - -  a b c

The data tokens stand at random places of the context, so that a fixed convolution cannot know where; as many slots
follow, and the k-th asks for the k-th data token. With blank noise, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lra.checks import check
from lra.tasks.base import IGNORED
from lra.tasks.controls import FIRST, Control, Rows, choose, label_accuracy, most_frequent, padded

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

NOISE, SLOT, DATA = FIRST, FIRST + 1, FIRST + 2


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Control):
    """Selective copying: `labels` holds the data tokens, from 0, at the slots and -100 before them.

    Ids: 0 padding, 1 mask, 2 noise, 3 slot, then the data tokens. The paper draws every batch afresh; here the
    training sequences are n_train.
    """

    n_train: int = 20_000
    """Training sequences."""
    n_val: int = 1_000
    """Validation sequences."""
    n_test: int = 1_000
    """Test sequences."""
    context: int = 4_096
    """Tokens before the slots: noise and data."""
    n_tokens: int = 16
    """Data tokens, and slots."""
    vocab: int = 16
    """Different tokens, the noise and the slot among them."""
    pooling: str = "none"
    """None: there is a label at each slot."""

    name: ClassVar[str] = "selective_copying"
    summary: ClassVar[str] = "repeat the data tokens found among noise"
    dense: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        check(4 <= self.vocab <= 32_000, "vocab", self.vocab, "4 to 32000")
        check(self.n_tokens >= 1, "n_tokens", self.n_tokens, "at least 1")
        check(self.context >= self.n_tokens, "context", self.context, f"n_tokens = {self.n_tokens} or more")

    @property
    def symbols(self) -> int:
        return self.vocab

    @property
    def n_classes(self) -> int:
        return self.vocab - 2

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.context + self.n_tokens, self.context + self.n_tokens

    @property
    def tested_lengths(self) -> tuple[int, ...]:
        return (self.context + self.n_tokens,)

    def draw(self, rng: np.random.Generator, length: np.ndarray) -> Rows:
        import numpy as np

        n, M = len(length), self.n_tokens
        data = rng.integers(0, self.n_classes, (n, M))
        place = np.sort(choose(rng, n, self.context, M), axis=1)
        ids = np.full((n, self.context + M), NOISE, np.uint16)
        ids[:, self.context :] = SLOT
        np.put_along_axis(ids, place, (DATA + data).astype(np.uint16), axis=1)
        labels = np.full(ids.shape, IGNORED, np.int16)
        labels[:, self.context :] = data
        return Rows(ids, labels, length, {})

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Adds the rule that answers the sequence's most frequent data token: it counts and knows no order."""
        ids, labels = padded(splits["test"], "input_ids", 0), padded(splits["test"], "labels", IGNORED)
        frequent = label_accuracy(most_frequent(ids, DATA, self.n_classes), labels)
        return {**super().reference_lines(splits), "most frequent token of the sequence": frequent}
