"""The rows of a split in memory, and batches of them: one gather, on whatever device they are."""

from copy import copy
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lra.tasks.base import IGNORED, Ids, Task, chunks, column

if TYPE_CHECKING:
    from datasets import Dataset


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


class Ragged:
    """Rows of different lengths, end to end: flat (total, ...), row i is flat[offsets[i] : offsets[i + 1]]."""

    def __init__(self, flat: Tensor, offsets: np.ndarray):
        self.flat, self.offsets = flat, torch.from_numpy(offsets)
        self.lengths = np.diff(offsets)
        self.uniform = len(self.lengths) > 0 and bool((self.lengths == self.lengths[0]).all())

    @classmethod
    def read(cls, dataset: "Dataset", name: str, channels: int | None = None) -> "Ragged":
        """Reads a column of lists; with `channels` each position has that many entries."""
        parts = list(chunks(dataset, name))
        mapped = [part.flatten().to_numpy(zero_copy_only=False) for part in parts]  # of the file: nothing is read yet
        lengths = np.concatenate([part.value_lengths().to_numpy(zero_copy_only=False) for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        dtype = (
            mapped[0].dtype if mapped[0].dtype not in (np.uint16, np.uint32) else np.int32
        )  # torch indexes no others
        # one copy in the type wanted: a data set on disk consists of batches of rows, so its values lie not end to end
        flat = torch.from_numpy(np.concatenate(mapped, dtype=dtype, casting="unsafe"))
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

    `counts` (n,) is how many labels each row has, `asked` the most of them.

    Args:
        sides: the input of each row, or the two inputs.
        labels: (n,) int64, or for a dense task one per position.
        pad: what fills the end of the shorter sequences of a batch.
    """

    def __init__(self, sides: list[Ragged], labels: Tensor | Ragged, pad: int):
        self.sides, self.labels, self.pad = sides, labels, pad
        self.counts = np.ones(len(labels), np.int64) if isinstance(labels, Tensor) else label_counts(labels)
        self.asked = max(1, int(self.counts.max(initial=0)))
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

    def shuffled(self, block: int, rng: np.random.Generator) -> "Examples":
        """The same rows with their blocks of `block` positions in random order (a last, shorter block stays last)."""
        return Examples([shuffle_blocks(side, block, rng) for side in self.sides], self.labels, self.pad)


def label_counts(labels: Ragged) -> np.ndarray:
    """How many labels each row has, (n,)."""
    given = np.concatenate([[0], np.cumsum((labels.flat != IGNORED).numpy())])
    return np.diff(given[labels.offsets.numpy()])


def shuffle_blocks(rows: Ragged, block: int, rng: np.random.Generator) -> Ragged:
    """Permutes the blocks of each row."""
    offsets = rows.offsets.numpy()
    order = np.arange(offsets[-1])
    for start, length in zip(offsets[:-1], rows.lengths, strict=True):
        n = length // block
        part = order[start : start + n * block].reshape(n, block)
        part[:] = part[rng.permutation(n)]
    return Ragged(rows.flat[torch.from_numpy(order)], offsets)


def resident(examples: Examples, device: torch.device) -> Examples:
    """The examples on `device` if they take no more than a quarter of its free memory, else as they are."""
    if device.type != "cuda" or examples.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return examples
    return examples.to(device)


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
