"""Retrieval of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006): does one of two papers cite the other?

The pairs are made of the ACL Anthology Network's papers. Their texts may not be passed on, so nobody offers them but
the authors, in a file of several gigabytes; `lra.tasks.retrieval_imdb` is a task of the same shape for everybody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lra.checks import check
from lra.tasks.base import SPLITS, Ids, Split, Task, check_caps
from lra.tasks.vocabularies import INPUTS, Encoding

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from lra.tasks.text_encoding import Tokens

_BLOCK = 4096  # pairs encoded at once


class Pairs(NamedTuple):
    """n pairs of texts: the tokens of each side, the label (n,), and the further integer columns of the split."""

    first: Tokens
    second: Tokens
    label: np.ndarray
    more: dict[str, np.ndarray]

    def dataset(self) -> Dataset:
        """Returns the columns input_ids, input_ids_2, label and the further ones."""
        import numpy as np
        import pyarrow as pa

        from lra.tasks.in_memory import in_memory

        columns = {"input_ids": self.first.column(), "input_ids_2": self.second.column()}
        columns["label"] = pa.array(self.label.astype(np.uint8))
        columns |= {name: pa.array(values) for name, values in self.more.items()}
        return in_memory(pa.table(columns))


@dataclass(frozen=True, kw_only=True)
class TextPairs(Task):
    """Base of the tasks that ask something of two texts, which the network reads one apart from the other.

    A cap takes the first rows, which are in the shuffled order of the seed.
    """

    encoding: Encoding = "bytes"
    """bytes: of UTF-8, as in the Long Range Arena; characters: those of the Text task, with an end token."""
    max_tokens: int = 4000
    """Most tokens of a text; the rest is cut off."""
    n_train: int | None = None
    """Training pairs; null for all."""
    n_val: int | None = None
    """Validation pairs; null for all."""
    n_test: int | None = None
    """Test pairs; null for all."""

    two_inputs: ClassVar[bool] = True
    n_classes: ClassVar[int] = 2

    def check(self) -> None:
        check(self.max_tokens >= 2, "max_tokens", self.max_tokens, "at least 2")
        check_caps(self, dict.fromkeys(SPLITS))

    @property
    def max_length(self) -> int:
        return self.max_tokens

    @property
    def inputs(self) -> Ids:
        return INPUTS[self.encoding]


@dataclass(frozen=True, kw_only=True)
class Retrieval(TextPairs):
    """Pairs of papers of the ACL Anthology Network, from the files of the Long Range Arena in a folder of the user's.

    The splits, which are the benchmark's, have the columns input_ids and input_ids_2 (uint8 tokens), label (1: one
    cites the other), index (of the line in its file, from 0) and origin (0: train, 1: eval, 2: test). S4's loaders
    read characters with a vocabulary of printable ASCII alone; the one here holds it.

    A file with another number of lines than the benchmark's, such as one cut off between two lines, is refused unless
    its split has a cap.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "do two papers cite each other? (AAN; Retrieval of the Long Range Arena, from your files)"
    folders: ClassVar[tuple[str, ...]] = ("tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
    benchmark_rows: ClassVar[dict[str, int]] = {"train": 147_086, "val": 18_090, "test": 17_437}

    @property
    def rows(self) -> dict[str, int]:
        return {split: getattr(self, f"n_{split}") or n for split, n in self.benchmark_rows.items()}

    def files(self, data_dir: Path | None) -> dict[Split, Path]:
        """Returns the file of each split.

        Raises:
            ValueError: no folder is given, or they are not in it.
        """
        from lra.tasks.sources import SourceError, search_folders

        names: dict[Split, str] = {s: f"new_aan_pairs.{'eval' if s == 'val' else s}.tsv" for s in SPLITS}
        if data_dir is not None:
            for folder in search_folders(self, data_dir):
                if all((folder / name).is_file() for name in names.values()):
                    return {split: folder / name for split, name in names.items()}
        lacking = "it needs --data-dir DIR" if data_dir is None else f"{data_dir} lacks some of them"
        raise SourceError(
            f"task 'retrieval' reads {', '.join(names.values())}, and {lacking}: they are in the folder tsv_data of "
            "lra_release.gz, to which the README of google-research/long-range-arena links; their texts may not be "
            "passed on, so there is no other source. A task of the same shape without them is retrieval_imdb"
        )

    def generate(self, workers: int | None, data_dir: Path | None) -> dict[str, Dataset]:
        """Returns the splits; see the base.

        Raises:
            ValueError: a file is missing, a line is not label, two ids and two texts, or there are not those asked for.
        """
        files = self.files(data_dir)
        return {split: self._read(split, path, i).dataset() for i, (split, path) in enumerate(files.items())}

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        from lra.tasks.sources import describe_files

        return describe_files(list(self.files(data_dir).values()), hashes)

    def _read(self, split: Split, path: Path, origin: int) -> Pairs:
        import numpy as np

        from lra.tasks.draws import permutation
        from lra.tasks.sources import count_rows
        from lra.tasks.text_encoding import Tokens, encode

        lines = _lines(path)
        labels: list[int] = []
        sides: tuple[list[Tokens], list[Tokens]] = ([], [])
        while block := list(islice(lines, _BLOCK)):
            block_labels, *texts = zip(*block, strict=True)
            labels.extend(block_labels)
            for side, texts_of_side in zip(sides, texts, strict=True):
                side.append(encode(texts_of_side, self.encoding, self.max_tokens))
        n = count_rows(self, {split: len(labels)}, self.benchmark_rows)[split]
        index = permutation(len(labels), self.seed, origin)[:n]
        first, second = (Tokens.concatenate(side).take(index) for side in sides)
        more: dict[str, np.ndarray] = {
            "index": index.astype(np.int32),
            "origin": np.full(len(index), origin, np.uint8),
        }
        return Pairs(first, second, np.array(labels)[index], more)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields label and texts of each line: label, two ids and two texts, tab-separated; quotes mean nothing.

    Raises:
        ValueError: another number of fields, a label that is neither 0 nor 1, or no UTF-8; the line is named.
    """
    from tqdm.auto import tqdm

    from lra.tasks.sources import SourceError

    size = os.path.getsize(path)
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False) as progress,
    ):
        for number, line in enumerate(file, start=1):
            progress.update(len(line))
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5:
                raise SourceError(
                    f"line {number} of {path} must hold 5 fields (label, two ids, two texts) between tabs; it holds "
                    f"{len(fields)}: the file is another one, or truncated"
                )
            label, _, _, *texts = fields
            if label not in (b"0.0", b"1.0", b"0", b"1"):
                raise SourceError(f"the label of line {number} of {path} must be 0.0 or 1.0; it is {label[:20]!r}")
            try:
                first, second = (text.decode() for text in texts)
            except UnicodeDecodeError as error:
                raise SourceError(f"line {number} of {path} is not UTF-8 ({error.reason})") from error
            yield int(label[:1]), first, second
