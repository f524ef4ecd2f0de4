"""What ListOps accuracies mean: test accuracies of rules that look at the root and a few levels below it.

A classifier that reads only the root operator, or evaluates only one or two levels, scores far above chance on ListOps.
These lines say how much of a tree an accuracy can stand for; they do not prove that a model follows the rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lra.tasks.base import column
from lra.tasks.listops_trees import CLOSE, DIGIT, MAX, MED, MIN, OPERATOR

if TYPE_CHECKING:
    from datasets import Dataset


def reference_lines(train: Dataset, test: Dataset) -> dict[str, float]:
    """Returns the accuracy on `test` of rules fitted on `train`, in order of what they look at.

    majority: the most frequent label. root operator: the most frequent label of the root's operator. root operator and
    digits: the root's operator applied to those of its arguments that are digits. exact to depth k: the tree evaluated
    down to depth k (the root's is 1), and for each operator below the most frequent label of that operator at the root.
    """
    majority, guess = typical_values(train)
    label = column(test, "label")
    rows = test.with_format(None)[:]["input_ids"]
    predictions = {
        "majority": np.full(len(label), majority),
        "root operator": [truncated_value(row, 0, guess) for row in rows],
        "root operator and digits": [truncated_value(row, 1, guess, digits_only=True) for row in rows],
        **{f"exact to depth {k}": [truncated_value(row, k, guess) for row in rows] for k in (1, 2, 3)},
    }
    return {name: float(np.mean(np.asarray(value) == label)) for name, value in predictions.items()}


def typical_values(split: Dataset) -> tuple[int, list[int]]:
    """Returns the most frequent label, and that of each operator at the root (the first for one that no root has)."""
    count = np.zeros((4, 10), dtype=np.int64)
    np.add.at(count, (column(split, "operator") - OPERATOR, column(split, "label")), 1)
    majority = int(count.sum(axis=0).argmax())
    return majority, [int(row.argmax()) if row.any() else majority for row in count]


def depth_needed(split: Dataset) -> np.ndarray:
    """Returns for each tree the least k such that evaluating it down to depth k or deeper gives its value, (rows,).

    What lies below is replaced as in `reference_lines`, with the typical values of this split.
    """
    _, guess = typical_values(split)
    label, depth = column(split, "label"), column(split, "depth")
    needed = []
    for ids, value, deepest in zip(split.with_format(None)[:]["input_ids"], label, depth, strict=True):
        k = int(deepest)  # exact
        while k > 0 and truncated_value(ids, k - 1, guess) == value:
            k -= 1
        needed.append(k)
    return np.asarray(needed, dtype=np.int64)


def truncated_value(ids: list[int], depth: int, guess: list[int], *, digits_only: bool = False) -> int:
    """Returns the value of a tree whose operators deeper than `depth` are replaced by `guess[operator]`.

    Args:
        ids: the token ids of one tree.
        depth: operators at depths 1 (the root) to `depth` are evaluated.
        guess: one value per operator, in the order of the token ids.
        digits_only: leave the replaced operators out of the arguments instead.
    """
    arguments: list[list[int]] = []  # of each open operator; its first entry is the operator
    value = -1
    for token in ids:
        if token >= DIGIT:
            arguments[-1].append(token - DIGIT)
        elif token != CLOSE:
            arguments.append([token - OPERATOR])
        else:
            operator, *digits = arguments.pop()
            replaced = len(arguments) >= depth or not digits
            value = guess[operator] if replaced else _evaluate(operator, digits)
            if arguments and not (replaced and digits_only):
                arguments[-1].append(value)
    return value


def _evaluate(operator: int, digits: list[int]) -> int:
    if operator == MIN:
        return min(digits)
    if operator == MAX:
        return max(digits)
    if operator == MED:
        digits = sorted(digits)
        return (digits[(len(digits) - 1) // 2] + digits[len(digits) // 2]) // 2
    return sum(digits) % 10
