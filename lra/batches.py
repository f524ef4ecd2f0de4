"""Token batches as pure functions: batch t of a run depends on (seed, t) and nothing else.

That is what makes a killed and resumed run equal an uninterrupted one bit for bit: no sampler or worker carries a
state, the step number is the whole state. Random draws inside a step are keyed the same way by `stream_seed`.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

if TYPE_CHECKING:
    from datasets import Dataset

# Batches whose sequences are sorted together: enough to save most padding, few enough to keep batches mixed.
POOL = 32


class Batch(NamedTuple):
    """B padded sequences: `ids` (B, T) int64, `mask` (B, T) bool (True on real tokens), `labels` (B,) int64."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """Seed of the random `stream` of a run at `step`: 63 bits of a SHA-256, so streams and steps do not overlap."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Tokens:
    """A split in memory: all sequences end to end, with offsets, so that a batch costs one gather.

    Args:
        flat: every token, (total,) of an integer type.
        offsets: where each of the n sequences starts, and the end: (n + 1,).
        labels: (n,).
        pad_id: what fills the end of the shorter sequences of a batch.
    """

    def __init__(self, flat: np.ndarray, offsets: np.ndarray, labels: np.ndarray, pad_id: int):
        self.flat, self.offsets, self.labels, self.pad_id = flat, offsets.astype(np.int64), labels, pad_id
        self.lengths = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_dataset(cls, dataset: "Dataset", pad_id: int, limit: int | None = None) -> "Tokens":
        """Reads the columns `input_ids` and `label` of a split (its first `limit` rows)."""
        table = dataset.with_format("arrow")[: len(dataset) if limit is None else limit]
        ids = table.column("input_ids").combine_chunks()
        lengths = ids.value_lengths().to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        labels = table.column("label").to_numpy().astype(np.int64)
        return cls(ids.flatten().to_numpy(zero_copy_only=False), offsets, labels, pad_id)

    def batch(self, rows: np.ndarray) -> Batch:
        """Pads the given rows to the longest of them."""
        lengths = self.lengths[rows]
        T = max(int(lengths.max(initial=0)), 1)
        at = np.arange(T)[None, :]
        mask = at < lengths[:, None]  # (B, T)
        where = np.where(mask, self.offsets[rows][:, None] + at, 0)
        ids = np.where(mask, self.flat[where], self.pad_id).astype(np.int64)
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(self.labels[rows]))


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


class BatchStream(IterableDataset):
    """Batches `start`, `start + 1`, ... without end; `start` is the only state."""

    def __init__(self, tokens: Tokens, batch_size: int, seed: int):
        super().__init__()
        self.tokens, self.plan, self.start = tokens, BatchPlan(tokens.lengths, batch_size, seed), 0

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            yield self.tokens.batch(self.plan.rows(step))
            step += 1


def evaluation_batches(tokens: Tokens, max_tokens: int = 32_768) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once, longest first, in batches of at most `max_tokens` padded tokens: (rows, batch)."""
    order = np.argsort(-tokens.lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(int(tokens.lengths[order[start]]), 1))
        rows = order[start : start + size]
        yield rows, tokens.batch(rows)
        start += size


def describe(tokens: Tokens) -> dict[str, Any]:
    """Size of a split for `result.json`: rows, tokens, shortest and longest sequence."""
    lengths = tokens.lengths
    return {"rows": len(tokens), "tokens": int(lengths.sum()), "min": int(lengths.min()), "max": int(lengths.max())}
