"""Batches as pure functions: batch t of a run depends on (seed, t) and nothing else.

That is what makes a killed and resumed run equal an uninterrupted one bit for bit: no sampler or worker carries a
state, the step number is the whole state. Random draws inside a step are keyed the same way by `stream_seed`.
"""

import hashlib
import time
import warnings
from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lra.tasks.base import IGNORED, Ids, Task, column

if TYPE_CHECKING:
    from datasets import Dataset

# Batches whose sequences are sorted together: enough to save most padding, few enough to keep batches mixed.
POOL = 32


class Side(NamedTuple):
    """One input of B rows: `inputs` (B, T) int64 ids or (B, T, C) uint8 levels, `mask` (B, T), True on real positions.

    `mask` is None where every position is real.
    """

    inputs: Tensor
    mask: Tensor | None

    @property
    def real(self) -> Tensor:
        """The mask as a tensor, (B, T) bool."""
        return self.inputs.new_ones(self.inputs.shape[:2], dtype=torch.bool) if self.mask is None else self.mask


class Batch(NamedTuple):
    """B rows: their input, or two; labels (B,), or (B, T) of a dense task; and which share of a step's rows they are.

    Of a dense task no row has more than `asked` labels. `share` is (rank, world): of the rows of the step, those at
    rank, rank + world, ...
    """

    first: Side
    second: Side | None
    labels: Tensor
    share: tuple[int, int] = (0, 1)
    asked: int = 1

    @property
    def sides(self) -> list[Side]:
        return [self.first] if self.second is None else [self.first, self.second]

    def to(self, device: torch.device) -> "Batch":
        def move(side: Side) -> Side:
            return Side(send(side.inputs, device), None if side.mask is None else send(side.mask, device))

        second = None if self.second is None else move(self.second)
        return Batch(move(self.first), second, send(self.labels, device), self.share, self.asked)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the CPU to a GPU without waiting for what that is doing."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """Seed of the random `stream` of a run at `step`: 63 bits of a SHA-256, so streams and steps do not overlap."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Ragged:
    """Rows of different lengths, end to end: flat (total, ...), row i is flat[offsets[i] : offsets[i + 1]]."""

    def __init__(self, flat: Tensor, offsets: np.ndarray):
        self.flat, self.offsets = flat, torch.from_numpy(offsets)
        self.lengths = np.diff(offsets)
        self.uniform = len(self.lengths) > 0 and bool((self.lengths == self.lengths[0]).all())

    @classmethod
    def read(cls, dataset: "Dataset", name: str, channels: int | None = None) -> "Ragged":
        """Reads a column of lists; with `channels` each position has that many entries."""
        lists = dataset.select_columns([name]).with_format("arrow")[:].column(name).combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False)
        if values.dtype in (np.uint16, np.uint32):  # torch does not index them
            values = values.astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))]).astype(
            np.int64
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # mapped from the file, and only read
            flat = torch.from_numpy(values)
        if channels is None:
            return cls(flat, offsets)
        return cls(flat.view(-1, channels), offsets // channels)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes + self.offsets.nbytes

    def to(self, device: torch.device) -> "Ragged":
        moved = Ragged.__new__(Ragged)
        moved.__dict__.update(self.__dict__)
        moved.flat, moved.offsets = self.flat.to(device), self.offsets.to(device)
        return moved

    def gather(self, rows: Tensor, T: int) -> tuple[Tensor, Tensor | None]:
        """The given rows, (B, T, ...), and which positions are real, (B, T), or None for all; the rest is arbitrary."""
        if self.uniform and T == self.lengths[0]:
            return self.flat.view(len(self.lengths), T, *self.flat.shape[1:])[rows], None
        start = self.offsets[rows]
        at = torch.arange(T, device=self.flat.device)
        mask = at < (self.offsets[rows + 1] - start)[:, None]
        return self.flat[torch.where(mask, start[:, None] + at, 0)], mask


class Examples:
    """The rows of a split in memory, on any device, so that a batch costs one gather.

    Args:
        sides: the input of each row, or the two inputs.
        labels: (n,) int64, or for a dense task one per position.
        pad: what fills the end of the shorter sequences of a batch.
    """

    def __init__(self, sides: list[Ragged], labels: Tensor | Ragged, pad: int):
        self.sides, self.labels, self.pad = sides, labels, pad
        self.asked = 1 if isinstance(labels, Tensor) else most_labels(labels)
        self.lengths = np.sum([side.lengths for side in sides], axis=0)

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_dataset(cls, dataset: "Dataset", task: Task, limit: int | None = None) -> "Examples":
        """Reads a split (its first `limit` rows)."""
        dataset = dataset.select(range(len(dataset) if limit is None else min(limit, len(dataset))))
        channels, pad = (None, task.inputs.pad_id) if isinstance(task.inputs, Ids) else (task.inputs.channels, 0)
        names = ["input_ids", "input_ids_2"] if task.two_inputs else ["input_ids"]
        sides = [Ragged.read(dataset, name, channels) for name in names]
        labels = Ragged.read(dataset, "labels") if task.dense else torch.from_numpy(column(dataset, "label"))
        return cls(sides, labels, pad)

    @property
    def device(self) -> torch.device:
        return self.sides[0].flat.device

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for side in self.sides) + self.labels.nbytes

    def to(self, device: torch.device) -> "Examples":
        """The same rows on a device; lengths stay with the CPU, which plans the batches."""
        moved = copy(self)
        moved.sides, moved.labels = [side.to(device) for side in self.sides], self.labels.to(device)
        return moved

    def batch(self, rows: np.ndarray, rank: int = 0, world: int = 1, multiple: int = 1) -> Batch:
        """The rows of a step that fall to `rank`, padded to the longest of all of them.

        That is rounded up to a `multiple`, but not beyond the longest row of the split.
        """
        mine = send(torch.from_numpy(np.ascontiguousarray(rows[rank::world])), self.device)
        sides = []
        for side in self.sides:
            T = max(int(side.lengths[rows].max(initial=0)), 1)
            T = max(T, min(ceil(T / multiple) * multiple, int(side.lengths.max())))
            values, mask = side.gather(mine, T)
            if mask is not None:
                values = values.masked_fill(~(mask if values.ndim == 2 else mask[..., None]), self.pad)
            sides.append(Side(values.long() if values.ndim == 2 else values, mask))
        if isinstance(self.labels, Tensor):
            labels = self.labels[mine]
        else:
            labels, mask = self.labels.gather(mine, sides[0].inputs.shape[1])
            labels = (labels if mask is None else labels.masked_fill(~mask, IGNORED)).long()
        return Batch(sides[0], sides[1] if len(sides) > 1 else None, labels, (rank, world), self.asked)

    def shuffled(self, block: int, seed: int) -> "Examples":
        """The same rows with their blocks of `block` positions in random order (a last, shorter block stays last)."""
        rng = np.random.default_rng(stream_seed(seed, "shuffle", block))
        return Examples([shuffle_blocks(side, block, rng) for side in self.sides], self.labels, self.pad)


def most_labels(labels: Ragged) -> int:
    """Most labels that a row has: at least 1."""
    given = np.concatenate([[0], np.cumsum((labels.flat != IGNORED).numpy())])
    offsets = labels.offsets.numpy()
    return max(1, int(np.diff(given[offsets]).max(initial=0)))


def shuffle_blocks(rows: Ragged, block: int, rng: np.random.Generator) -> Ragged:
    """Permutes the blocks of each row."""
    offsets = rows.offsets.numpy()
    order = np.arange(offsets[-1])
    for start, length in zip(offsets[:-1], rows.lengths, strict=True):
        n = length // block
        part = order[start : start + n * block].reshape(n, block)
        part[:] = part[rng.permutation(n)]
    return Ragged(rows.flat[torch.from_numpy(order)], offsets)


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


def resident(examples: Examples, device: torch.device) -> Examples:
    """The examples on `device` if they take no more than a quarter of its free memory, else as they are."""
    if device.type != "cuda" or examples.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return examples
    return examples.to(device)


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


def describe(examples: Examples) -> dict[str, Any]:
    """Size of a split for `result.json`: rows, tokens, shortest and longest row (both inputs together)."""
    lengths = examples.lengths
    return {"rows": len(examples), "tokens": int(lengths.sum()), "min": int(lengths.min()), "max": int(lengths.max())}


def histogram(examples: Examples, uses: np.ndarray) -> dict[int, int]:
    """How many sequences of each length are read when row i is used `uses[i]` times; of two inputs each counts."""
    count: dict[int, int] = {}
    for side in examples.sides:
        lengths, which = np.unique(side.lengths, return_inverse=True)
        for length, n in zip(lengths.tolist(), np.bincount(which, weights=uses).astype(np.int64).tolist(), strict=True):
            count[length] = count.get(length, 0) + n
    return {length: n for length, n in count.items() if n}
