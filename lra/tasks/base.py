"""What a task is: a frozen dataclass of options that describes a data set, can make it, and says how to feed it."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_origin

from lra.checks import check, check_types, field_type

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
IGNORED = -100  # a position without a label


@dataclass(frozen=True)
class Ids:
    """Inputs are token ids, read through an embedding; pretraining predicts tokens."""

    vocab_size: int
    """Number of ids, padding and mask symbol included."""
    pad_id: int
    """What fills the end of a shorter sequence; never scored."""
    mask_id: int
    """What stands for a hidden token in masked pretraining."""


@dataclass(frozen=True)
class Levels:
    """Inputs are 8-bit levels, read as (level - mean) / std through a linear map; pretraining predicts levels."""

    channels: int
    """Values per position."""
    mean: float
    """Level that becomes 0, which is also what stands for a hidden value."""
    std: float
    """Levels per unit."""
    loss: Literal["l1", "ce"]
    """Denoising loss: absolute error of the normalised value, or cross-entropy over the 256 levels."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks; the fields of a subclass are its options.

    The splits are `datasets.Dataset`s of integer columns. `input_ids` holds tokens, or 8-bit levels with the channels
    of a position side by side; a task with `two_inputs` has `input_ids_2` as well. Labels are in `label`, one a row,
    or, if the task is `dense`, in `labels`, one a position, -100 where nothing is asked. Rows are in random order: the
    first n of a split are a fair sample.
    """

    mask_rate: float = 0.15
    """Share of positions hidden in masked pretraining."""
    pooling: str = "mean"
    """How the classifier pools over time: mean, max or last (none: a label for every position)."""
    seed: int = 0
    """Seed of what is drawn: data, or the validation split."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # a change of the data of given options raises it
    summary: ClassVar[str] = ""
    two_inputs: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    ink: ClassVar[bool] = False  # denoising is also scored on levels above 0 alone
    hub: ClassVar[str | None] = None  # the source of real data on the Hugging Face hub
    # rows of each split of the benchmark with which published numbers compare; None where there is none
    benchmark_rows: ClassVar[dict[str, int] | None] = None
    causal_pooling: ClassVar[str | None] = None  # for models that see only the past; None: as for the others
    not_data: ClassVar[tuple[str, ...]] = ("mask_rate", "pooling")  # options that leave the cached data as they are
    pretraining_only: ClassVar[tuple[str, ...]] = ("mask_rate", "pretrain_loss")  # options that no classifier reads

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if get_origin(field_type(self, f.name)) is tuple and isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))  # YAML and JSON have no tuples
        check_types(self)
        check(0.0 <= self.mask_rate <= 1.0, "mask_rate", self.mask_rate, "in [0, 1]")
        poolings = ("none",) if self.dense else ("mean", "max", "last")
        check(self.pooling in poolings, "pooling", self.pooling, f"one of {', '.join(poolings)}")
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        self.check()

    def check(self) -> None:
        """Refuses options out of range.

        Raises:
            ValueError: the option, its value and what is allowed.
        """

    @property
    def n_classes(self) -> int:
        """Number of labels."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """Most positions of an input."""
        raise NotImplementedError

    @property
    def inputs(self) -> Ids | Levels:
        """How inputs are read."""
        raise NotImplementedError

    @property
    def encoding(self) -> str:
        """How inputs are read, in two words, for the results."""
        return "tokens" if isinstance(self.inputs, Ids) else "real levels"

    @property
    def rows(self) -> dict[str, int] | None:
        """Rows of each split, if they are known without the data."""
        return None

    def data_config(self) -> dict[str, Any]:
        """Returns what decides the data, and nothing else, as JSON has it: the identity of a cached data set."""
        config = {name: value for name, value in asdict(self).items() if name not in self.not_data}
        return json.loads(json.dumps({"task": self.name, "version": self.version, **config}))

    def generate(self, workers: int | None, data_dir: Path | None) -> "dict[str, Dataset]":
        """Returns freshly made splits train, val and test; they do not depend on `workers`.

        Args:
            workers: threads; None for one per core.
            data_dir: a folder of source files, for tasks on real data; None for the hub.

        Raises:
            ValueError: the data cannot be made, with what to do.
        """
        raise NotImplementedError

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        """Returns where real data come from; {} for generated data.

        Args:
            data_dir: the user's folder; None for the hub.
            hashes: files are read for their SHA-256; otherwise there are only names and sizes, at no cost.

        Returns:
            {"hub": name} or {"files": {name: {"bytes", "sha256"}}}, and what else tells one source from another.

        Raises:
            ValueError: the folder does not hold the task's files.
        """
        return {}

    def splits(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> "dict[str, Dataset]":
        """Returns the splits from the cache, making them first if need be; see `lra.data.load`."""
        from lra.data import load

        return load(self, cache_dir, workers, data_dir=data_dir)

    def reference_lines(self, splits: "Mapping[str, Dataset]") -> dict[str, float]:
        """Returns test accuracies of rules that need no network; by default that of the most frequent label."""
        import numpy as np

        train, test = asked(self, splits["train"]), asked(self, splits["test"])
        return {"majority": float(np.mean(test == np.bincount(train).argmax()))}

    def strata(self, split: "Dataset") -> "dict[str, np.ndarray]":
        """Returns further numbers of each row by which the report groups accuracies, such as the depth of a tree."""
        return {}

    def picture(self, splits: "Mapping[str, Dataset]", path: Path) -> None:
        """Writes a PNG of examples.

        Raises:
            ValueError: the task has nothing to show.
        """
        raise ValueError(f"task {self.name!r} has no picture; those with images have")


def check_caps(task: Task, most: Mapping[str, int | None]) -> None:
    """Refuses caps n_train, n_val, n_test below 1, or above the rows there are where that is known.

    Raises:
        ValueError: the cap, its value and what is allowed.
    """
    for split, limit in most.items():
        n = getattr(task, f"n_{split}")
        allowed = "at least 1, or null for all" if limit is None else f"from 1 to {limit}, or null for all {limit}"
        check(n is None or 1 <= n <= (n if limit is None else limit), f"n_{split}", n, allowed)


def asked(task: Task, split: "Dataset") -> "np.ndarray":
    """Every label of a split, (n,): one a row, or those of the positions that have one."""
    if not task.dense:
        return column(split, "label")
    labels = flat_column(split, "labels")
    return labels[labels != IGNORED]


def column(split: "Dataset", name: str) -> "np.ndarray":
    """A column of numbers as int64, (rows,)."""
    import numpy as np

    return split.select_columns([name]).with_format("arrow")[:].column(name).to_numpy().astype(np.int64)


def flat_column(split: "Dataset", name: str) -> "np.ndarray":
    """A column of lists, end to end, in its own integer type."""
    import numpy as np

    return np.concatenate([part.flatten().to_numpy(zero_copy_only=False) for part in chunks(split, name)])


def chunks(split: "Dataset", name: str) -> "Iterator[pa.Array]":
    """A column as the Arrow arrays it consists of: all in one would be too long for Arrow's 32-bit offsets.

    There is at least one, which may be empty.
    """
    import pyarrow as pa

    table = split.select_columns([name]).with_format("arrow")[:]
    parts = table.column(name).chunks
    yield from parts or [pa.array([], table.column(name).type)]
