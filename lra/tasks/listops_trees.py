"""ListOps trees, drawn in blocks of whole levels (the distribution of Long Range Arena, arXiv:2011.04006).

A tree is drawn from the root down: a node above the depth cap is an operator with probability p, else a uniform digit;
an operator is uniform in MIN, MAX, MED, SM and has a uniform number of arguments. Trees outside the length bounds are
drawn again, duplicates dropped. Lengths depend on shapes alone, so shapes are drawn and rejected first, for a block of
trees at once and level by level; operators and digits are filled in afterwards, and the distribution is unchanged.

Block b depends on (seed, b) only, through PCG64 and integer arithmetic, so the trees do not depend on the number of
workers nor on the NumPy version.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lra.tasks.draws import permutation

if TYPE_CHECKING:
    from lra.tasks.listops import ListOps

CLOSE, OPERATOR, DIGIT = 2, 3, 7  # token ids: "X", the first of four operators, the first of ten digits
MIN, MAX, MED, SM = range(4)

_BLOCK_TREES, _BLOCK_NODES = 1 << 12, 1 << 20  # at most so many trees, and about so many nodes, are drawn at once
_DRY_BLOCKS = 64  # so many blocks in a row without one new tree end the search


class Trees(NamedTuple):
    """Trees one after the other: tokens (sum of lengths,) uint8, and per tree length, value, root operator, depth."""

    tokens: np.ndarray
    length: np.ndarray
    label: np.ndarray
    operator: np.ndarray
    depth: np.ndarray

    def take(self, index: np.ndarray) -> Trees:
        """Returns the trees at `index`, in that order."""
        start = np.cumsum(self.length) - self.length
        rows = [self.tokens[s : s + n] for s, n in zip(start[index], self.length[index], strict=True)]
        tokens = np.concatenate(rows) if rows else self.tokens[:0]
        return Trees(tokens, *(column[index] for column in self[1:]))

    @staticmethod
    def concatenate(parts: list[Trees]) -> Trees:
        return Trees(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class _Level(NamedTuple):
    """The operators at one depth, ordered by tree and position: arity (n,), and which arguments are operators."""

    arity: np.ndarray
    is_operator: np.ndarray  # (sum of arity,)


class _Draw:
    """Uniform draws from raw PCG64 bits, whose stream NumPy promises to keep; `Generator` methods may change."""

    def __init__(self, *key: int):
        self.bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, bound: int, size: int) -> np.ndarray:
        """Integers in [0, bound), (size,) int64."""
        return ((self.bits.random_raw(size) >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    def chance(self, p: float, size: int) -> np.ndarray:
        """True with probability p, (size,) bool."""
        return (self.bits.random_raw(size) >> np.uint64(32)) < np.uint64(round(p * 2**32))


def draw_block(task: ListOps, block: int) -> Trees:
    """Returns the accepted trees of one block, duplicates included."""
    draw = _Draw(task.seed, 0, block)
    n = min(max(_BLOCK_NODES // task.max_tree_length, 1), _BLOCK_TREES)
    levels, depth = _draw_shapes(task, draw, n)
    return _fill(draw, levels, depth)


def draw_distinct(task: ListOps, n: int, workers: int) -> Iterator[Trees]:
    """Yields `n` distinct trees in the fixed order of the blocks, a block at a time.

    Raises:
        ValueError: there are not enough distinct trees of this size.
    """
    seen: set[bytes] = set()
    dry = 0
    for trees in _blocks(task, workers):
        stop = np.cumsum(trees.length)
        new = []
        for i, (s, e) in enumerate(zip(stop - trees.length, stop, strict=True)):
            digest = blake2b(trees.tokens[s:e].data, digest_size=16).digest()
            if digest not in seen and len(seen) < n:
                seen.add(digest)
                new.append(i)
        dry = 0 if new else dry + 1
        if dry == _DRY_BLOCKS:
            raise ValueError(
                f"n_train + n_val + n_test = {n}, but only {len(seen)} distinct trees were found with max_depth="
                f"{task.max_depth}, max_args={task.max_args} and {task.min_length} < length < {task.max_tree_length}: "
                "ask for fewer trees, or raise max_depth, max_args or max_tree_length"
            )
        if new:
            yield trees.take(np.array(new))
        if len(seen) == n:
            return


def shuffle(task: ListOps, trees: Trees) -> Trees:
    """Returns the trees in a random order: where duplicates are common, those drawn late are longer than the rest."""
    return trees.take(permutation(len(trees.length), task.seed, 1))


def _blocks(task: ListOps, workers: int) -> Iterator[Trees]:
    """Yields blocks 0, 1, 2, ... without end, from `workers` threads: NumPy works outside the interpreter lock."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Trees]] = deque()
        try:
            for block in itertools.count():
                pending.append(pool.submit(draw_block, task, block))
                if len(pending) > workers:
                    yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _draw_shapes(task: ListOps, draw: _Draw, n: int) -> tuple[list[_Level], np.ndarray]:
    """Draws n shapes whose root is an operator; returns the levels and the depth (m,) of the m accepted ones."""
    length = np.full(n, 2)  # an operator counts twice: itself and its closing token
    depth = np.zeros(n, dtype=np.int64)
    tree = np.arange(n)  # the tree of each operator at this depth
    drawn = []
    for d in range(1, task.max_depth):
        depth[tree] = d
        arity = task.min_args + draw.below(task.max_args - task.min_args + 1, tree.size)
        parent = np.repeat(tree, arity)
        p = task.p_operator if d + 1 < task.max_depth else 0.0
        is_operator = draw.chance(p, parent.size)
        drawn.append((tree, arity, is_operator))

        tree = parent[is_operator]
        length += np.bincount(parent, minlength=n) + np.bincount(tree, minlength=n)
        tree = tree[length[tree] < task.max_tree_length]  # a tree that is too long already grows no further

    keep = (task.min_length < length) & (length < task.max_tree_length)
    levels = []
    for tree, arity, is_operator in drawn:
        kept = keep[tree]
        levels.append(_Level(arity[kept], is_operator[np.repeat(kept, arity)]))
    return levels, depth[keep]


def _fill(draw: _Draw, levels: list[_Level], depth: np.ndarray) -> Trees:
    """Draws operators and digits for the shapes and writes every tree as tokens in prefix order."""
    size = value = np.zeros(0, dtype=np.int64)  # of each operator one level below
    filled = []
    for arity, is_operator in reversed(levels):
        operator = draw.below(4, arity.size)
        argument = draw.below(10, is_operator.size)
        argument[is_operator] = value
        argument_size = np.ones_like(argument)
        argument_size[is_operator] = size

        value = _apply(operator, argument, arity)
        size = 2 + _segments(np.add, argument_size, arity)
        filled.append((arity, is_operator, operator, argument, argument_size, size))

    length, label = size, value
    tokens = np.empty(length.sum(), dtype=np.uint8)
    place = np.cumsum(length) - length  # of each operator's first token
    for arity, is_operator, operator, argument, argument_size, size in reversed(filled):
        tokens[place] = OPERATOR + operator
        tokens[place + size - 1] = CLOSE
        before = np.cumsum(argument_size) - argument_size
        first = np.cumsum(arity) - arity
        argument_place = before + np.repeat(place + 1 - before[first], arity)
        tokens[argument_place[~is_operator]] = DIGIT + argument[~is_operator]
        place = argument_place[is_operator]
    root_operator = tokens[np.cumsum(length) - length]
    return Trees(tokens, length.astype(np.int32), label.astype(np.uint8), root_operator, depth.astype(np.uint8))


def _segments(ufunc: np.ufunc, x: np.ndarray, arity: np.ndarray) -> np.ndarray:
    """Reduces consecutive segments of x of the given lengths (each at least 1)."""
    return ufunc.reduceat(x, np.cumsum(arity) - arity) if arity.size else x[:0]


def _apply(operator: np.ndarray, argument: np.ndarray, arity: np.ndarray) -> np.ndarray:
    """Values of operators (n,) on digits (sum of arity,), consecutive segments of which are the arguments."""
    value = np.empty_like(operator)
    for o, ufunc in ((MIN, np.minimum), (MAX, np.maximum), (SM, np.add)):
        mine = operator == o
        value[mine] = _segments(ufunc, argument[np.repeat(mine, arity)], arity[mine]) % 10

    mine = operator == MED
    n = arity[mine]
    row = np.repeat(np.arange(n.size), n)
    count = np.bincount(10 * row + argument[np.repeat(mine, arity)], minlength=10 * n.size).reshape(-1, 10)
    below = np.cumsum(count, axis=1)  # arguments <= digit
    lower = (below <= (n[:, None] - 1) // 2).sum(axis=1)
    upper = (below <= n[:, None] // 2).sum(axis=1)
    value[mine] = (lower + upper) // 2  # the integer part of the median
    return value
