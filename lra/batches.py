"""Batches as pure functions: batch t of a run depends on (seed, t) and nothing else.

That is what makes a killed and resumed run equal an uninterrupted one bit for bit: no sampler or worker carries a
state, the step number is the whole state. Random draws inside a step are keyed the same way by `stream_seed`.
"""

import hashlib
import time
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import IterableDataset

from lra.examples import Batch, Examples

# Batches whose sequences are sorted together: enough to save most padding, few enough to keep batches mixed.
POOL = 32


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """Seed of the random `stream` of a run at `step`: 63 bits of a SHA-256, so streams and steps do not overlap."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class BatchPlan:
    """Rows of batch t of an endless training run over sequences of the given lengths.

    Each epoch is a permutation drawn from (seed, epoch), cut into pools of 32 batches; a pool is sorted by length and
    cut into batches, and the batches of the epoch are shuffled.
    What does not fill a last batch is left out of the epoch.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        if len(lengths) == 0:
            raise ValueError("cannot draw batches from an empty split")
        self.lengths, self.seed = lengths, seed
        self.batch_size = min(batch_size, len(lengths))
        self.batches_per_epoch = len(lengths) // self.batch_size
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(stream_seed(self.seed, "order", epoch))
        order = rng.permutation(len(self.lengths))[: self.batches_per_epoch * self.batch_size]
        pool = POOL * self.batch_size
        for start in range(0, len(order), pool):
            chunk = order[start : start + pool]
            order[start : start + pool] = chunk[np.argsort(self.lengths[chunk], kind="stable")]
        return rng.permutation(order.reshape(self.batches_per_epoch, self.batch_size))

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of batch `step`, (batch_size,)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self.epoch(epoch)[position]

    def uses(self, steps: int) -> np.ndarray:
        """How often each row is in the first `steps` batches, (rows,)."""
        count = np.zeros(len(self.lengths), dtype=np.int64)
        whole, rest = divmod(steps, self.batches_per_epoch)
        for epoch in range(whole):
            count[self.epoch(epoch)] += 1
        if rest:
            count[self.epoch(whole)[:rest]] += 1
        return count


class BatchStream(IterableDataset):
    """Batches `start`, `start + 1`, ... without end; `start` is the only state.

    Args:
        rank, world: which share of each batch's rows is asked for.
        multiple: sequences are padded to a multiple of this.
    """

    def __init__(
        self, examples: Examples, batch_size: int, seed: int, rank: int = 0, world: int = 1, multiple: int = 1
    ):
        super().__init__()
        self.examples, self.plan, self.start = examples, BatchPlan(examples.lengths, batch_size, seed), 0
        self.rank, self.world, self.multiple = rank, world, multiple
        self.seconds = 0.0  # spent on making batches, while the network waited

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            since = time.monotonic()
            batch = self.examples.batch(self.plan.rows(step), self.rank, self.world, self.multiple)
            self.seconds += time.monotonic() - since
            yield batch
            step += 1


def evaluation_batches(
    examples: Examples, max_tokens: int = 32_768, multiple: int = 1, rank: int = 0, world: int = 1
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once, longest first, in batches of at most `max_tokens` padded tokens: (rows, batch).

    Args:
        multiple: sequences are padded to a multiple of this.
        rank, world: of all batches, those at rank, rank + world, ...
    """
    order = np.argsort(-examples.lengths, kind="stable")
    start = i = 0
    while start < len(order):
        size = max(1, max_tokens // max(int(examples.lengths[order[start]]), 1))
        rows = order[start : start + size]
        if i % world == rank:
            yield rows, examples.batch(rows, multiple=multiple)
        start, i = start + size, i + 1
