"""Text of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006): is a film review of IMDB kind or not?

The data are those of Maas et al. 2011, "Learning word vectors for sentiment analysis". They have no validation split,
and published accuracies are, as a rule, the best test accuracy of a run; here a tenth of the training reviews is set
apart, drawn by the seed, and none of its texts occurs among the others. Whole texts are compared, so that the split
does not depend on `max_tokens`: what is left of two texts may be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lra.checks import check
from lra.tasks.base import SPLITS, Ids, Task, check_caps
from lra.tasks.vocabularies import INPUTS, Encoding

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

COLUMNS = {"text": "text", "label": "label"}


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Sentiment of IMDB's reviews, byte by byte or character by character.

    The splits have the columns input_ids (uint8 tokens), label (0: negative, 1: positive), index (of the row in the
    source split) and origin (0: the source's training reviews, 1: its test reviews). Rows are in the shuffled order of
    the seed, since the source lists all negative reviews first; a cap takes the first rows. Case and `<br />` are kept.

    Some 120 of the 25,000 test reviews stand among the training reviews as well. They are left there, as everywhere: a
    network, and its pretraining too, has read half a percent of the test texts.
    """

    encoding: Encoding = "bytes"
    """bytes: of UTF-8, as in the Long Range Arena; characters: 131 of them, with an end token, as in S4's loaders."""
    max_tokens: int = 4096
    """Most tokens of a review; the rest is cut off. (The Long Range Arena: 1,000 in its base configuration, the best of
    1,000 to 4,000 in the paper; S4 and later: 4,096.)"""
    n_train: int | None = None
    """Training reviews; null for all, 22,500."""
    n_val: int | None = None
    """Validation reviews; null for all, 2,500."""
    n_test: int | None = None
    """Test reviews; null for all, 25,000."""

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "sentiment of IMDB reviews as bytes or characters (Text of the Long Range Arena)"
    hub: ClassVar[str | None] = "stanfordnlp/imdb"
    folders: ClassVar[tuple[str, ...]] = ("imdb",)
    n_classes: ClassVar[int] = 2
    benchmark_rows: ClassVar[dict[str, int]] = {"train": 22_500, "val": 2_500, "test": 25_000}

    def check(self) -> None:
        check(self.max_tokens >= 2, "max_tokens", self.max_tokens, "at least 2")
        check_caps(self, self.benchmark_rows)

    @property
    def max_length(self) -> int:
        return self.max_tokens

    @property
    def inputs(self) -> Ids:
        return INPUTS[self.encoding]

    @property
    def rows(self) -> dict[str, int]:
        return {split: getattr(self, f"n_{split}") or most for split, most in self.benchmark_rows.items()}

    def generate(self, workers: int | None, data_dir: Path | None) -> dict[str, Dataset]:
        """Returns the splits; see the base. It takes seconds, and one thread.

        Raises:
            ValueError: the source cannot be read, or holds not the reviews asked for.
        """
        import numpy as np
        import pyarrow as pa

        from lra.tasks.draws import permutation
        from lra.tasks.in_memory import in_memory
        from lra.tasks.sources import count_rows, read_source
        from lra.tasks.text_encoding import encode

        source = {split: reviews_of(rows, split) for split, rows in read_source(self, data_dir, COLUMNS).items()}
        order = _hold_out(source["train"][0], self.seed)
        order["test"] = permutation(len(source["test"][0]), self.seed, 1)
        n = count_rows(self, {split: len(order[split]) for split in SPLITS}, self.benchmark_rows)
        splits: dict[str, Dataset] = {}
        for split in SPLITS:
            index = order[split][: n[split]]
            origin = int(split == "test")
            texts, labels = source["test" if origin else "train"]
            columns = {
                "input_ids": encode([texts[i] for i in index], self.encoding, self.max_tokens).column(),
                "label": pa.array(labels[index].astype(np.uint8)),
                "index": pa.array(index.astype(np.int32)),
                "origin": pa.array(np.full(len(index), origin, np.uint8)),
            }
            splits[split] = in_memory(pa.table(columns))
        return splits

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        from lra.tasks.sources import describe_source

        return describe_source(self, data_dir, hashes)


def reviews_of(rows: Dataset, split: str) -> tuple[list[str], np.ndarray]:
    """Returns texts and labels of a split of the source.

    Raises:
        ValueError: a label is neither 0 nor 1; its row is named.
    """
    import numpy as np

    from lra.tasks.base import column

    labels = column(rows, "label")
    wrong = np.flatnonzero((labels < 0) | (labels > 1))
    if len(wrong):
        raise ValueError(f"labels must be 0 or 1; that of row {wrong[0]} of the {split} reviews is {labels[wrong[0]]}")
    return rows[:]["text"], labels


def _hold_out(texts: list[str], seed: int) -> dict[str, np.ndarray]:
    """Draws the rows for validation, a tenth, among those whose text occurs once: no text is on both sides."""
    from collections import Counter

    import numpy as np

    from lra.tasks.draws import permutation

    times = Counter(texts)
    order = permutation(len(texts), seed, 0)
    once = np.fromiter((times[texts[i]] == 1 for i in order), bool, len(order))
    held = once & (np.cumsum(once) <= len(texts) // 10)
    return {"train": order[~held], "val": order[held]}
