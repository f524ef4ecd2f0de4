"""Delayed XOR: what windows of its sequences tell about the label, by counting."""

from collections import Counter

import numpy as np
import pytest

from lra.tasks import build_task


def information(words, labels):
    """Mutual information of words and fair bits in nats, by counting, and the degrees of freedom of its error."""
    joint, total = Counter(zip(words, labels, strict=True)), Counter(words)
    n, ones = len(words), Counter(labels)
    value = sum(c / n * np.log(c * n / (total[w] * ones[y])) for (w, y), c in joint.items())
    return value, len(total) - 1


@pytest.mark.parametrize("local", [False, True])
def test_no_window_shorter_than_the_distance_tells_the_label(local):
    D, L = 6, 16
    task = build_task("delayed_xor", n_train=10_000, n_val=1, n_test=1, length=L, distance=D, local=local)
    split = task.generate()["train"]
    rows, labels = split[:]["input_ids"], split[:]["label"]
    told = []
    for width in (2, 4):  # all places; wider windows have too many contents to count
        for start in range(L - width + 1):
            told.append(information([tuple(ids[start : start + width]) for ids in rows], labels))
    for mark in (0, 1):  # and D tokens around either mark, noise left out
        for shift in range(D):
            at = [[t for t, token in enumerate(ids) if token >= 4][mark] - shift for ids in rows]
            windows = [
                tuple(x if x >= 4 else 0 for x in ids[max(t, 0) : t + D]) for t, ids in zip(at, rows, strict=True)
            ]
            told.append(information(windows, labels))
    # twice n times the information of independent variables is chi-squared
    excess = [2 * len(rows) * value - freedom - 6 * (2 * freedom) ** 0.5 - 18 for value, freedom in told]
    assert (max(excess) > 1000) if local else (max(excess) < 0)
    # the whole of it is in D + 1 tokens
    whole = [tuple(token for token in ids if token >= 4) for ids in rows]
    assert information(whole, labels)[0] == pytest.approx(np.log(2), rel=1e-3)


def test_the_twin_has_the_same_noise():
    options = {"n_train": 50, "n_val": 1, "n_test": 1, "length": 63, "distance": 20}
    far, near = (build_task("delayed_xor", **options, local=local).generate()["train"] for local in (False, True))
    for a, b in zip(far, near, strict=True):
        bits = [[(token - 2) % 2 for token in row["input_ids"]] for row in (a, b)]
        assert bits[0] == bits[1]
        assert next(t for t, x in enumerate(a["input_ids"]) if x >= 4) == next(
            t for t, x in enumerate(b["input_ids"]) if x >= 4
        )
