"""ListOps, the variant of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006), generated on the spot.

A sequence is a tree of MIN, MAX, MED (integer part of the median) and SM (sum modulo 10) on digits, and the label is
its value: `[MAX 2 9 [MIN 4 7 X 0 X` is 9. As in the loaders of the Long Range Arena the parentheses of the text form
are dropped and "]" is written "X". No end token is added: the last "X" closes the root and so marks the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lra.checks import check
from lra.tasks.base import Ids, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from lra.tasks.listops_trees import Trees

TOKENS = ("<pad>", "<mask>", "X", "[MIN", "[MAX", "[MED", "[SM", *"0123456789")
_IDS = {token: i for i, token in enumerate(TOKENS)}


@dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """ListOps trees of the Long Range Arena; the defaults are the benchmark's.

    Each split is a `datasets.Dataset` with the columns input_ids (uint8 token ids), label (0 to 9), length (tokens),
    operator (token id of the root) and depth (of the deepest operator, the root's being 1).
    """

    n_train: int = 96_000
    """Training trees."""
    n_val: int = 2_000
    """Validation trees."""
    n_test: int = 2_000
    """Test trees."""
    max_depth: int = 10
    """Greatest depth of a node; the root has depth 1, and nodes at this depth are digits."""
    max_args: int = 10
    """Most arguments of an operator."""
    min_args: int = 2
    """Fewest arguments of an operator."""
    min_length: int = 500
    """Trees are longer than this, in tokens."""
    max_tree_length: int = 2_000
    """Trees are shorter than this, in tokens."""
    p_operator: float = 0.25
    """Probability that a node above the greatest depth is an operator."""
    mask_rate: float = 0.10
    """Share of positions hidden in masked pretraining (Amos et al. 2024, arXiv:2310.02980)."""

    name: ClassVar[str] = "listops"
    summary: ClassVar[str] = "value of a nested expression of MIN, MAX, MED, SM on digits"
    benchmark_rows: ClassVar[dict[str, int]] = {"train": 96_000, "val": 2_000, "test": 2_000}
    n_classes: ClassVar[int] = 10
    causal_pooling: ClassVar[str] = "last"
    inputs: ClassVar[Ids] = Ids(len(TOKENS), pad_id=_IDS["<pad>"], mask_id=_IDS["<mask>"])

    def check(self) -> None:
        least_of = {"n_train": 1, "n_val": 1, "n_test": 1, "max_depth": 2, "min_args": 1, "min_length": 1}
        for name, least in least_of.items():
            check(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        if self.max_args < self.min_args:
            raise ValueError(f"max_args must be at least min_args={self.min_args}, got {self.max_args}")
        check(0.0 <= self.p_operator <= 1.0, "p_operator", self.p_operator, "in [0, 1]")
        shortest = max(self.min_length + 1, self.min_args + 2)
        if self.max_tree_length <= shortest:
            raise ValueError(
                f"max_tree_length must be greater than {shortest}, got {self.max_tree_length}: trees are longer than "
                f"min_length={self.min_length} and hold an operator of at least min_args={self.min_args} arguments"
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_args * longest, self.max_tree_length)
        if longest <= self.min_length:
            raise ValueError(
                f"min_length={self.min_length} is out of reach: with max_depth={self.max_depth} and max_args="
                f"{self.max_args} a tree has at most {longest} tokens; lower min_length or raise max_depth or max_args"
            )

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.max_tree_length - 1

    @property
    def rows(self) -> dict[str, int]:
        return {"train": self.n_train, "val": self.n_val, "test": self.n_test}

    def generate(self, workers: int | None = None, data_dir: Path | None = None) -> dict[str, Dataset]:
        """Returns freshly drawn splits train, val and test, in memory; they do not depend on `workers`.

        Raises:
            ValueError: fewer distinct trees than asked for exist.
        """
        import numpy as np
        from tqdm.auto import tqdm

        from lra.tasks.listops_trees import Trees, draw_distinct, shuffle

        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        sizes = self.rows
        parts = []
        with tqdm(total=sum(sizes.values()), desc="ListOps trees", unit="tree", disable=None, leave=False) as progress:
            for part in draw_distinct(self, sum(sizes.values()), workers or os.cpu_count() or 1):
                parts.append(part)
                progress.update(len(part.length))
        trees = shuffle(self, Trees.concatenate(parts))

        stop = np.cumsum(list(sizes.values()))
        return {
            split: _dataset(trees.take(np.arange(end - size, end)))
            for (split, size), end in zip(sizes.items(), stop, strict=True)
        }

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Returns the test accuracies of rules that need no learning; see `lra.tasks.listops_reference`."""
        from lra.tasks.listops_reference import reference_lines

        return reference_lines(splits["train"], splits["test"])

    def strata(self, split: Dataset) -> dict[str, np.ndarray]:
        """Groups trees by how deep one must look: see `lra.tasks.listops_reference.depth_needed`."""
        from lra.tasks.listops_reference import depth_needed

        return {"depth to evaluate": depth_needed(split)}

    @staticmethod
    def encode(text: str) -> list[int]:
        """Maps the text form, with or without parentheses, to token ids."""
        words = ["X" if word == "]" else word for word in text.split() if word not in ("(", ")")]
        if unknown := [word for word in words if word not in _IDS]:
            raise ValueError(f"unknown token {unknown[0]!r} in text; the tokens are: ( ) ] {' '.join(TOKENS)}")
        return [_IDS[word] for word in words]

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        """Maps token ids to text, e.g. `[MAX 2 9 X`."""
        for i in ids:
            if not 0 <= i < len(TOKENS):
                raise ValueError(f"ids must lie in 0..{len(TOKENS) - 1}, got {i}")
        return " ".join(TOKENS[i] for i in ids)


def _dataset(trees: Trees) -> Dataset:
    import numpy as np
    import pyarrow as pa

    from lra.tasks.in_memory import in_memory

    start = np.concatenate([[0], np.cumsum(trees.length)]).astype(np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(start), pa.array(trees.tokens)),
        "label": pa.array(trees.label),
        "length": pa.array(trees.length),
        "operator": pa.array(trees.operator),
        "depth": pa.array(trees.depth),
    }
    return in_memory(pa.table(columns))
