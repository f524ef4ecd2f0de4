"""States of every kind, cloned, picked, moved and counted."""

from typing import Any

import pytest
import torch

from linrnn.decode import state as states
from linrnn.layers import LRUState
from linrnn.models import SequenceBackbone


def some_state() -> tuple[SequenceBackbone, Any]:
    backbone = SequenceBackbone(["lru", "slru", "attention"], 16, 3)
    with torch.no_grad():
        return backbone, backbone(torch.randn(3, 5, 16))[1]


def test_nbytes() -> None:
    _, state = some_state()
    # LRU: 16 complex numbers; SLRU: 32 reals; attention: keys and values of 5 tokens, and a position
    assert states.nbytes(state) == 3 * (16 * 8 + 32 * 4 + 2 * 5 * 16 * 4 + 8)
    assert states.nbytes({"a": [None, torch.zeros(2)]}) == 8


def test_clone_shares_nothing() -> None:
    _, state = some_state()
    copy = states.clone(state)
    for ours, theirs in zip(states.leaves(copy), states.leaves(state), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert [type(part) for part in copy] == [type(part) for part in state]


@pytest.mark.parametrize("rows", [[2, 0, 0], torch.tensor([1]), [], torch.tensor([True, False, True]), [-1]])
def test_select_continues_those_sequences(rows: Any) -> None:
    backbone, state = some_state()
    index = torch.as_tensor(rows) if len(rows) else torch.tensor([], dtype=torch.int64)
    x = torch.randn(3, 16)
    with torch.no_grad():
        y, _ = backbone.step(x, state)
        picked, _ = backbone.step(x[index], states.select(state, rows))
    torch.testing.assert_close(picked, y[index])


def test_bad_rows() -> None:
    _, state = some_state()
    with pytest.raises(TypeError, match="rows: expected integers or bools, got list"):
        states.select(state, [0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"rows: expected one dimension, got shape \(1, 1\)"):
        states.select(state, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows: expected one bool for each of 3 sequences, got 2"):
        states.select(state, torch.tensor([True, False]))
    with pytest.raises(IndexError):
        states.select(state, [3])


def test_to() -> None:
    backbone, state = some_state()
    wide = states.to(state, dtype=torch.float64)
    x = torch.randn(3, 16)
    with torch.no_grad():
        y, _ = backbone.step(x, state)
        y_wide, _ = backbone.double().step(x.double(), wide)
    torch.testing.assert_close(y.double(), y_wide, rtol=1e-4, atol=1e-5)
    meta = states.to(state, "meta")
    assert all(leaf.is_meta for leaf in states.leaves(meta))
    assert [leaf.dtype for leaf in states.leaves(meta)] == [leaf.dtype for leaf in states.leaves(state)]
    with pytest.raises(ValueError, match=r"dtype: expected a real floating point dtype, got torch\.complex64"):
        states.to(state, dtype=torch.complex64)


def test_structures() -> None:
    state = {"a": (LRUState(torch.ones(2)), None), "b": [torch.zeros(3)]}
    doubled = states.map_leaves(lambda t: 2 * t, state)
    assert isinstance(doubled["a"][0], LRUState) and doubled["a"][1] is None and isinstance(doubled["b"], list)
    assert torch.equal(doubled["a"][0].h, torch.full((2,), 2.0))
    for broken in (3, (torch.ones(1), "h")):
        with pytest.raises(TypeError, match="state: expected tensors in tuples, lists or dicts"):
            states.clone(broken)
        with pytest.raises(TypeError, match="state: expected tensors in tuples, lists or dicts"):
            states.nbytes(broken)
