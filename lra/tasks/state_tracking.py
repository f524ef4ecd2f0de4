"""State tracking: the state of a small automaton at every token, trained on short sequences and tested on longer ones.

Composition of permutations (Merrill et al. 2024, arXiv:2404.08819): for five or more elements it is complete for NC1,
out of reach of linear recurrences with diagonal transitions and of attention of fixed depth. Parity, the composition of
two elements, is out of reach of diagonal recurrences without negative eigenvalues (Grazzi et al. 2024,
arXiv:2411.12537). These tasks show expressivity, not memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from math import factorial
from typing import TYPE_CHECKING, ClassVar, Literal

from lra.checks import check
from lra.tasks.base import IGNORED
from lra.tasks.controls import FIRST, Control, Rows, check_lengths, label_accuracy, padded

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

WINDOW = 8  # tokens that the reference rule remembers


@dataclass(frozen=True, kw_only=True)
class StateTracking(Control):
    """Base of both tasks: `labels` holds the state behind each token; the state before the first one is 0."""

    min_train_length: int = 40
    """Fewest tokens of training and validation sequences."""
    max_train_length: int = 256
    """Most tokens of training and validation sequences; lengths are drawn uniformly."""
    test_lengths: tuple[int, ...] = (40, 64, 128, 256, 512, 1024)
    """Lengths of test sequences."""
    pooling: str = "none"
    """None: there is a label at every token."""

    dense: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        check(self.min_train_length >= 1, "min_train_length", self.min_train_length, "at least 1")
        least = self.min_train_length
        longest = self.max_train_length
        check(longest >= least, "max_train_length", longest, f"at least min_train_length = {least}")
        check_lengths("test_lengths", self.test_lengths, 1)

    def transitions(self) -> np.ndarray:
        """The automaton: (states, symbols), the state that follows a state and a symbol."""
        raise NotImplementedError

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.min_train_length, self.max_train_length

    @property
    def tested_lengths(self) -> tuple[int, ...]:
        return self.test_lengths

    def draw(self, rng: np.random.Generator, length: np.ndarray) -> Rows:
        import numpy as np

        table = self.transitions()
        symbols = rng.integers(0, self.symbols, (len(length), int(length.max())), dtype=np.uint16)
        labels = np.empty(symbols.shape, np.int16)
        state = np.zeros(len(symbols), np.int32)
        for t in range(symbols.shape[1]):
            state = labels[:, t] = table[state, symbols[:, t]]
        return Rows(symbols + np.uint16(FIRST), labels, length, {})

    def reference_lines(self, splits: Mapping[str, Dataset]) -> dict[str, float]:
        """Adds the rule that starts over 8 tokens back: right in the beginning, by chance later on."""
        import numpy as np

        table = self.transitions()
        symbols, labels = padded(splits["test"], "input_ids", FIRST) - FIRST, padded(splits["test"], "labels", IGNORED)
        state = np.zeros(symbols.shape, np.int64)
        for lag in reversed(range(min(WINDOW, symbols.shape[1]))):
            state[:, lag:] = table[state[:, lag:], symbols[:, : symbols.shape[1] - lag]]
        recent = label_accuracy(state, labels)
        return {**super().reference_lines(splits), f"state of the last {WINDOW} tokens": recent}


@dataclass(frozen=True, kw_only=True)
class Permutations(StateTracking):
    """Composition of permutations: token x_t turns the arrangement p into p o x_t, (p o x)(i) = p(x(i)).

    Ids: 0 padding, 1 mask, then the generators in lexicographic order. Labels: the rank of p among all n!
    permutations in lexicographic order; the identity, with which a sequence starts, is 0.
    """

    n: int = 5
    """Elements that are permuted; 5 is the smallest number whose group is not solvable."""
    generators: Literal["all", "transpositions", "adjacent", "two"] = "all"
    """Permutations that occur as tokens: all n!; those that swap two elements; that swap neighbours; one swap and one
    cycle of all elements."""

    name: ClassVar[str] = "permutations"
    summary: ClassVar[str] = "the running product of permutations, also at longer lengths"

    def check(self) -> None:
        super().check()
        check(2 <= self.n <= 6, "n", self.n, "2 to 6")

    @property
    def symbols(self) -> int:
        return len(self.generator_list())

    @property
    def n_classes(self) -> int:
        return factorial(self.n)

    def generator_list(self) -> tuple[tuple[int, ...], ...]:
        """The permutations that tokens stand for, as (x(0), ..., x(n - 1)), in the order of their ids."""
        return _generators(self.n, self.generators)

    def transitions(self) -> np.ndarray:
        import numpy as np

        elements = np.array(list(permutations(range(self.n))))
        weight = self.n ** np.arange(self.n)
        rank = np.zeros(self.n**self.n, np.int32)
        rank[elements @ weight] = np.arange(len(elements))
        return rank[elements[:, np.array(self.generator_list())] @ weight]


@lru_cache
def _generators(n: int, kind: str) -> tuple[tuple[int, ...], ...]:
    def moved(p: tuple[int, ...]) -> list[int]:
        return [i for i in range(n) if p[i] != i]

    every = tuple(permutations(range(n)))
    if kind == "all":
        return every
    if kind == "two":
        return tuple(sorted({(1, 0, *range(2, n)), (*range(1, n), 0)}))
    swaps = tuple(p for p in every if len(moved(p)) == 2)
    return swaps if kind == "transpositions" else tuple(p for p in swaps if moved(p)[1] - moved(p)[0] == 1)


@dataclass(frozen=True, kw_only=True)
class Parity(StateTracking):
    """Running parity of bits, or the running sum of digits modulo `modulus`.

    Ids: 0 padding, 1 mask, then the digits from 0.
    """

    modulus: int = 2
    """Digits are 0 to modulus - 1, and so are the labels; 2 is parity."""

    name: ClassVar[str] = "parity"
    summary: ClassVar[str] = "the running parity of bits, also at longer lengths"

    def check(self) -> None:
        super().check()
        check(2 <= self.modulus <= 250, "modulus", self.modulus, "2 to 250")

    @property
    def symbols(self) -> int:
        return self.modulus

    @property
    def n_classes(self) -> int:
        return self.modulus

    def transitions(self) -> np.ndarray:
        import numpy as np

        digit = np.arange(self.modulus, dtype=np.int32)
        return (digit[:, None] + digit) % self.modulus
