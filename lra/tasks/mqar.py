"""Multi-query associative recall (Zoology: Arora et al. 2023, arXiv:2312.04927): a dictionary, then queries.

    ids:    k1 v1 k2 v2 ... kK vK  .  .  k2  .  .  .  k1  .
    labels:  -  -  -  - ...  -  -  -  -  v2  -  -  -  v1  -

Keys and values come from disjoint halves of the vocabulary, each at most once in a sequence. Every key is asked for
once, at an even place behind the dictionary: place i of them (1, 2, ...) is taken with probability proportional to
i^(power_a - 1), without replacement, the first key first. Recall needs a state that grows with the number of pairs, so
the task orders fixed-state models by the size of their state; attention solves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lra.checks import check
from lra.tasks.base import IGNORED
from lra.tasks.controls import FIRST, Control, Rows, choose, padded

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class MQAR(Control):
    """Multi-query associative recall: `labels` holds, at each query, the index of its value, -100 elsewhere.

    Ids: 0 padding, 1 mask, 2 filler, then vocab / 2 keys, then vocab / 2 values.
    """

    vocab: int = 8_192
    """Keys and values together, half of them each."""
    length: int = 256
    """Tokens of a sequence."""
    n_pairs: int = 16
    """Pairs of key and value, and queries."""
    power_a: float = 0.01
    """Exponent a of the power law of the queries' places: the smaller, the more of them soon behind the dictionary."""
    random_filler: bool = False
    """Fill the places that are no query with random tokens but the sequence's own keys, instead of the filler."""
    pooling: str = "none"
    """None: there is a label at each query."""

    name: ClassVar[str] = "mqar"
    summary: ClassVar[str] = "recall the values of keys shown earlier"
    dense: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        half = self.vocab // 2
        check(self.vocab % 2 == 0 and 4 <= self.vocab <= 65_000, "vocab", self.vocab, "even, 4 to 65000")
        check(1 <= self.n_pairs <= half, "n_pairs", self.n_pairs, f"1 to vocab / 2 = {half}")
        least = 4 * self.n_pairs
        check(
            self.length % 2 == 0 and self.length >= least, "length", self.length, f"even, 4 n_pairs = {least} or more"
        )
        check(self.power_a > 0, "power_a", self.power_a, "positive")
        full = self.random_filler and self.n_pairs == half
        check(not full, "random_filler", True, "false if every key of the vocabulary is in use (n_pairs = vocab / 2)")

    @property
    def symbols(self) -> int:
        return 1 + self.vocab

    @property
    def n_classes(self) -> int:
        return self.vocab // 2

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.length, self.length

    @property
    def tested_lengths(self) -> tuple[int, ...]:
        return (self.length,)

    def draw(self, rng: np.random.Generator, length: np.ndarray) -> Rows:
        import numpy as np

        n, K, half = len(length), self.n_pairs, self.vocab // 2
        keys = FIRST + 1 + choose(rng, n, half, K)
        values = choose(rng, n, half, K)  # indices, as in the labels
        ids = np.full((n, self.length), FIRST, np.uint16)
        ids[:, 0 : 2 * K : 2] = keys
        ids[:, 1 : 2 * K : 2] = FIRST + 1 + half + values

        # the K greatest of log-weights plus Gumbel noise, in order, are K draws without replacement
        place = np.arange(1, (self.length - 2 * K) // 2 + 1)
        noisy = (self.power_a - 1) * np.log(place) + rng.gumbel(size=(n, len(place)))
        query = 2 * K + 2 * np.argsort(-noisy, axis=1)[:, :K]
        labels = np.full((n, self.length), IGNORED, np.int16)
        np.put_along_axis(ids, query, keys.astype(np.uint16), axis=1)
        np.put_along_axis(labels, query, values.astype(np.int16), axis=1)
        if self.random_filler:
            _fill(rng, ids, keys, self.vocab)
        return Rows(ids, labels, length, {})

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Adds two rules that match no key: one value of the sequence, and the values in the order shown.

        The first is right for one query in n_pairs; the second for more, since the first key is likely asked first.
        """
        ids, labels = padded(splits["test"], "input_ids", 0), padded(splits["test"], "labels", IGNORED)
        values = ids[:, 1 : 2 * self.n_pairs : 2] - FIRST - 1 - self.n_classes
        return {
            **super().reference_lines(splits),
            "one value of the sequence": 1 / self.n_pairs,
            "values in the order shown": float((values.ravel() == labels[labels != IGNORED]).mean()),
        }


def _fill(rng: np.random.Generator, ids: np.ndarray, keys: np.ndarray, vocab: int) -> None:
    """Replaces the filler by random tokens, drawn again where they are keys of the row (keys (n, K) as ids)."""
    import numpy as np

    own = np.zeros((len(ids), FIRST + 1 + vocab), bool)
    np.put_along_axis(own, keys, True, axis=1)
    row, at = np.nonzero(ids == FIRST)
    while len(row):
        drawn = rng.integers(FIRST + 1, FIRST + 1 + vocab, len(row))
        ids[row, at] = drawn
        again = own[row, drawn]
        row, at = row[again], at[again]
