"""Control tasks: generated sequences whose labels need one known ability, beside the benchmark's own tasks.

Their base draws distinct sequences in blocks, each block from a seed of its own, and shares them out: training and
validation sequences come from one pool, test sequences may have other lengths, and no sequence is in two splits.

Sequences are drawn by methods of NumPy's `Generator`, whose streams a NumPy release may change: the same options then
give other sequences of the same distribution, under the same key. The fingerprint that results carry tells them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lra.checks import check
from lra.tasks.base import IGNORED, SPLITS, Ids, Task, flat_column

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from tqdm import tqdm

PAD, MASK, FIRST = 0, 1, 2  # ids; the symbols of a task start at FIRST
BLOCK_TOKENS = 1 << 21  # tokens drawn at once
PATIENCE = 20  # blocks without a new sequence before the options are taken to admit no more
# Streams of draws: two orders, then sequences. SeedSequence ignores trailing zeros, so (seed, s) is (seed, s, 0): an
# order and a block must not have one stream number.
POOL_ORDER, TEST_ORDER, POOL, TEST = 0, 1, 2, 3


class Rows(NamedTuple):
    """n sequences: `ids` (n, T), meaningless behind `length` (n,); `labels` (n, T) or (n,); `extra` columns (n,)."""

    ids: np.ndarray
    labels: np.ndarray
    length: np.ndarray
    extra: dict[str, np.ndarray]

    def take(self, rows: np.ndarray | slice) -> Rows:
        extra = {name: values[rows] for name, values in self.extra.items()}
        return Rows(self.ids[rows], self.labels[rows], self.length[rows], extra)


@dataclass(frozen=True, kw_only=True)
class Control(Task):
    """Base of the control tasks: a subclass says which lengths it draws and how a block of sequences is drawn."""

    version: ClassVar[int] = 2

    n_train: int = 100_000
    """Training sequences."""
    n_val: int = 3_000
    """Validation sequences, of the lengths of training."""
    n_test: int = 3_000
    """Test sequences, as many of each tested length."""

    def check(self) -> None:
        for name in ("n_train", "n_val", "n_test"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        tested = len(self.tested_lengths)
        check(self.n_test >= tested, "n_test", self.n_test, f"at least {tested}, the number of test_lengths")

    @property
    def symbols(self) -> int:
        """Number of different tokens; their ids start at FIRST."""
        raise NotImplementedError

    @property
    def trained_lengths(self) -> tuple[int, int]:
        """Least and greatest length of training and validation sequences, drawn uniformly."""
        raise NotImplementedError

    @property
    def tested_lengths(self) -> tuple[int, ...]:
        """Lengths of test sequences."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, length: np.ndarray) -> Rows:
        """Returns sequences of the given lengths (n,), as many as there are."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence, longer test sequences included."""
        return max(self.trained_lengths[1], *self.tested_lengths)

    @property
    def inputs(self) -> Ids:
        return Ids(FIRST + self.symbols, pad_id=PAD, mask_id=MASK)

    @property
    def rows(self) -> dict[str, int]:
        return dict(zip(SPLITS, (self.n_train, self.n_val, self.n_test), strict=True))

    def generate(self, workers: int | None = None, data_dir: Path | None = None) -> dict[str, Dataset]:
        """Returns freshly drawn splits train, val and test, in memory; one thread draws them, whatever `workers`.

        Raises:
            ValueError: fewer distinct sequences than asked for exist.
        """
        from tqdm.auto import tqdm

        from lra.tasks.draws import permutation

        seen: set[bytes] = set()
        with tqdm(total=sum(self.rows.values()), desc=self.name, unit="row", disable=None, leave=False, delay=2) as bar:
            pool = _concatenate(list(self._distinct(self.n_train + self.n_val, self.trained_lengths, POOL, seen, bar)))
            tested = self.tested_lengths
            parts: list[Rows] = []
            for i, length in enumerate(tested):
                n = self.n_test // len(tested) + (i < self.n_test % len(tested))
                parts += self._distinct(n, (length, length), TEST + i, seen, bar)
        # short sequences may run out early, so the pool is not in a random order; test sequences are in that of lengths
        order = permutation(self.n_train + self.n_val, self.seed, POOL_ORDER)
        return {
            "train": self._dataset(pool.take(order[: self.n_train])),
            "val": self._dataset(pool.take(order[self.n_train :])),
            "test": self._dataset(_concatenate(parts).take(permutation(self.n_test, self.seed, TEST_ORDER))),
        }

    def _distinct(self, n: int, lengths: tuple[int, int], stream: int, seen: set[bytes], bar: tqdm) -> Iterator[Rows]:
        """Yields n sequences that are not in `seen`, adding them to it; block i is a function of (seed, stream, i)."""
        import numpy as np

        size = max(1, min(n, BLOCK_TOKENS // lengths[1]))
        barren = 0
        for block in count():
            rng = np.random.default_rng([self.seed, stream, block])
            rows = self.draw(rng, rng.integers(lengths[0], lengths[1] + 1, size))
            new: list[int] = []
            for i, (ids, length) in enumerate(zip(rows.ids, rows.length, strict=True)):
                key = hashlib.blake2b(ids[:length].tobytes(), digest_size=16).digest()
                if len(new) < n and key not in seen:
                    seen.add(key)
                    new.append(i)
            yield rows.take(np.array(new, dtype=np.int64))
            bar.update(len(new))
            n -= len(new)
            if n == 0:
                return
            barren = 0 if new else barren + 1
            if barren == PATIENCE:
                raise ValueError(
                    f"{self.name} with these options has too few distinct sequences of length {lengths[0]} to "
                    f"{lengths[1]}: {n} more are asked for; lower n_train, n_val or n_test, or use longer sequences"
                )

    def _dataset(self, rows: Rows) -> Dataset:
        import numpy as np
        import pyarrow as pa

        from lra.tasks.in_memory import in_memory

        real = np.arange(rows.ids.shape[1]) < rows.length[:, None]
        offsets = pa.array(np.concatenate([[0], np.cumsum(rows.length)]).astype(np.int32))

        def lists(values: np.ndarray, dtype: type) -> pa.ListArray:
            return pa.ListArray.from_arrays(offsets, pa.array(values[real].astype(dtype)))

        columns = {"input_ids": lists(rows.ids, np.uint8 if self.inputs.vocab_size <= 256 else np.uint16)}
        if self.dense:
            columns["labels"] = lists(rows.labels, np.int32)
        else:
            columns["label"] = pa.array(rows.labels.astype(np.int32))
        columns |= {name: pa.array(values.astype(np.int32)) for name, values in rows.extra.items()}
        return in_memory(pa.table(columns))


def _concatenate(parts: list[Rows]) -> Rows:
    import numpy as np

    def wide(arrays: list[np.ndarray]) -> np.ndarray:
        if arrays[0].ndim == 1:
            return np.concatenate(arrays)
        joined = np.zeros((sum(map(len, arrays)), max(a.shape[1] for a in arrays)), arrays[0].dtype)
        start = 0
        for a in arrays:
            joined[start : start + len(a), : a.shape[1]] = a
            start += len(a)
        return joined

    ids, labels, length, extra = zip(*parts, strict=True)
    return Rows(wide(ids), wide(labels), wide(length), {k: wide([e[k] for e in extra]) for k in extra[0]})


def choose(rng: np.random.Generator, n: int, population: int, k: int) -> np.ndarray:
    """Draws k of range(population) without replacement, in random order, n times: (n, k) int64."""
    import numpy as np

    if 4 * population < k * k:  # rows drawn with replacement would nearly all hold a repetition
        return rng.permuted(np.tile(np.arange(population), (n, 1)), axis=1)[:, :k]
    chosen = rng.integers(0, population, (n, k))
    while True:
        ordered = np.sort(chosen, axis=1)
        repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if len(repeated) == 0:
            return chosen
        chosen[repeated] = rng.integers(0, population, (len(repeated), k))


def padded(split: Dataset, name: str, fill: int) -> np.ndarray:
    """A column of lists as a matrix, (rows, longest), `fill` behind the end of a row."""
    import numpy as np

    lists = split.select_columns([name]).with_format("arrow")[:].column(name).combine_chunks()
    length = lists.value_lengths().to_numpy(zero_copy_only=False)
    matrix = np.full((len(length), length.max()), fill, np.int64)
    matrix[np.arange(length.max()) < length[:, None]] = flat_column(split, name)
    return matrix


def label_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers among all that are asked for, as test accuracies are counted; (rows, T) or (rows, 1)."""
    asked = labels != IGNORED
    return float((predicted == labels)[asked].mean())


def most_frequent(ids: np.ndarray, first: int, n: int) -> np.ndarray:
    """The most frequent of the ids first to first + n - 1 in each row, counted from `first`: (rows, 1)."""
    import numpy as np

    counts = np.stack([(ids == first + i).sum(axis=1) for i in range(n)], axis=1)
    return counts.argmax(axis=1)[:, None]


def check_lengths(name: str, lengths: tuple[int, ...], least: int) -> None:
    """Refuses a list of lengths that is empty, repeats one or has one below `least`."""
    allowed = f"different lengths, each at least {least}"
    check(len(lengths) > 0 and len(set(lengths)) == len(lengths) and min(lengths) >= least, name, lengths, allowed)
