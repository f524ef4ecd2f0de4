"""States of every kind, cloned, picked, moved and counted."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from linrnn import layers
from linrnn.decode import state as states
from linrnn.decode import state_types
from linrnn.layers import LRUState
from linrnn.models import LanguageModel, SequenceBackbone


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
    for rows in ([3], [0, -4]):
        with pytest.raises(IndexError, match="rows: expected integers from -3 to 2, got"):
            states.select(state, rows)
    for wrong in (2, ["a"], [[0], [1, 2]]):
        with pytest.raises(TypeError, match="rows: expected integers or bools, got"):
            states.select(state, wrong)  # type: ignore[arg-type]


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


def test_batch_size() -> None:
    _, state = some_state()
    assert states.batch_size(state) == 3
    with pytest.raises(ValueError, match=r"state: expected .* of one batch size, got \[1, 3\] sequences in one"):
        states.batch_size((state, torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"state: expected tensors .* of one batch size, got none"):
        states.batch_size((None, ()))


def test_put_in_place_into_views() -> None:
    pool = tuple(torch.zeros(3, 4).split(2, 1))
    states.put(pool, [1], (torch.ones(1, 2), torch.ones(1, 2)), in_place=True)
    assert [part.sum(1).tolist() for part in pool] == [[0, 2, 0]] * 2


def test_put_in_place_into_what_inference_mode_made() -> None:
    with torch.inference_mode():
        pool = {"a": torch.zeros(3, 2)}
        states.put(pool, [1], {"a": torch.ones(1, 2)}, in_place=True)
    with pytest.raises(ValueError, match=r"in_place: a pool made in torch\.inference_mode is written to there only"):
        states.put(pool, [0], {"a": torch.ones(1, 2)}, in_place=True)
    assert pool["a"].sum(1).tolist() == [0, 2, 0]


@torch.no_grad()
def test_put_in_place_writes_to_the_pool_alone() -> None:
    backbone, part = some_state()
    pool = backbone(torch.randn(4, 9, 16), None)[1]
    kept, expected = states.clone(pool), states.put(pool, [3, 0, 1], part)
    assert all(torch.equal(a, b) for a, b in zip(states.leaves(pool), states.leaves(kept), strict=True))
    source = states.clone(part)
    result = states.put(pool, torch.tensor([True, True, False, True]), states.select(part, [1, 2, 0]), in_place=True)
    for ours, theirs, given in zip(*map(states.leaves, (result, expected, pool)), strict=True):
        assert torch.equal(ours, theirs) and ours is given
    assert all(torch.equal(a, b) for a, b in zip(states.leaves(part), states.leaves(source), strict=True))
    # a longer one does not fit, and then nothing has been written, also not before it was found
    longer, kept = backbone(torch.randn(3, 10, 16))[1], states.clone(pool)
    with pytest.raises(ValueError, match=r"pool\[2\].k: in place the pool keeps its 9 columns, got 10 of part"):
        states.put(pool, [3, 0, 1], longer, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(states.leaves(pool), states.leaves(kept), strict=True))


@torch.no_grad()
def test_a_buffer_shared_with_older_states_is_left_alone() -> None:
    """Steps append to one buffer: what is put together from a snapshot does not see what came later, nor change it."""
    backbone, snapshot = some_state()
    state, kept = snapshot, states.clone(snapshot)
    for x_t in torch.randn(4, 3, 16):
        _, state = backbone.step(x_t, state)
    later = states.clone(state)
    whole = states.put(states.concatenate([snapshot, state]), [0], states.select(state, [2]))
    for x_t in torch.randn(4, 6, 16):
        _, whole = backbone.step(x_t, whole)
    for ours, theirs in ((snapshot, kept), (state, later)):
        assert all(torch.equal(a, b) for a, b in zip(states.leaves(ours), states.leaves(theirs), strict=True))


@torch.no_grad()
def test_an_empty_cache_has_no_precision() -> None:
    layer = layers.build("attention", 16)
    with torch.autocast("cpu", torch.bfloat16):
        state = layer(torch.randn(2, 5, 16))[1]
        assert state.k.dtype == torch.bfloat16
        pool = states.put(layer.init_state(3), [2, 0], state)
        assert pool.k.dtype == torch.bfloat16 and pool.k.shape[:2] == (3, 5)
        x = torch.randn(3, 2, 16)
        torch.testing.assert_close(layer(x, pool)[0][[2, 0]], layer(x[[2, 0]], state)[0], rtol=2e-2, atol=2e-2)
        assert states.concatenate([state, layer.init_state(1)]).k.dtype == torch.bfloat16


def test_states_of_different_models_are_not_put_together() -> None:
    _, state = some_state()
    wide = states.to(state, dtype=torch.float64)
    small = SequenceBackbone(["lru", "slru", "attention"], 32, 3).init_state(1)
    for other, error, message in (
        (state[:2], TypeError, r"states\[1\]: expected tuple of 3 as in states\[0\], got tuple of 2: another model's"),
        ((state[1], *state[1:]), TypeError, r"states\[1\]\[0\]: expected LRUState as in .*, got SLRUState"),
        ((state[0]._replace(h=None), *state[1:]), TypeError, r"states\[1\]\[0\].h: expected a tensor .*, got None"),
        ((*state[:2], None), TypeError, r"states\[1\]\[2\]: expected AttentionState .*, got None"),
        (wide, ValueError, r"\[0\].h: expected one dtype in all states, got torch.complex64 and torch.complex128"),
        ((*state[:2], wide[2]), ValueError, r"\[2\].k: expected one dtype in all states, got torch.float32 and"),
        (small, ValueError, r"\[0\].h: expected one shape behind the batch in all states, got \(16,\) and \(32,\)"),
        (states.to(state, "meta"), ValueError, r"\[0\].h: expected one device in all states, got cpu and meta"),
    ):
        with pytest.raises(error, match=message):
            states.concatenate([state, other])
        with pytest.raises(error, match=message.replace(r"states\[1\]", "part").replace(r"states\[0\]", "pool")):
            states.put(state, list(range(states.batch_size(other))), other)
    with pytest.raises(TypeError, match=r"states\[1\]: expected a dict of \['a'\] as in .* got a dict of \['b'\]"):
        states.concatenate([{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    with pytest.raises(ValueError, match="states: expected at least one, got none"):
        states.concatenate([])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 1], ValueError, "rows: expected one for each of the 3 sequences of part, got 2"),
        ([True, False, True], ValueError, "rows: expected one for each of the 3 sequences of part, got 2"),
        ([0, 1, -3], ValueError, r"rows: expected different ones, got \[0, 1, 0\]"),
        ([0, 1, 3], IndexError, "rows: expected integers from -3 to 2, got 3"),
        ([0.0, 1.0, 2.0], TypeError, "rows: expected integers or bools, got list"),
    ],
)
def test_bad_rows_of_a_pool(rows: Any, error: type[Exception], message: str) -> None:
    _, state = some_state()
    with pytest.raises(error, match=message):
        states.put(state, rows, state)


@torch.no_grad()
def test_trim_takes_any_model() -> None:
    model = LanguageModel(11, mixer=["attention", "lru"], d_model=16, n_layers=2)
    ids = torch.randint(11, (2, 9))
    mask = torch.tensor([[True] * 9, [False] * 6 + [True] * 3])
    state = states.select(model(ids, mask=mask)[1], [1])
    trimmed = states.trim(state, model)
    assert trimmed[0].k.shape[1] == 3 and state[0].k.shape[1] == 9
    expected, given = (model.step(ids[:1, 0], s)[0] for s in (state, trimmed))
    torch.testing.assert_close(given, expected)
    assert states.trim(trimmed, model)[0].k is trimmed[0].k  # nothing to do, nothing copied
    with pytest.raises(TypeError, match="model: expected a layer, SequenceBackbone or LanguageModel, got Linear"):
        states.trim(state, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="state: expected a tuple of 2"):
        states.trim(state[:1], model)
    window = layers.build("attention", 16, window=8)
    state = window(torch.randn(2, 3, 16))[1]
    assert states.trim(state, window) is state and state.k.shape[1] == 7


def test_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "states.md").read_text(), re.S)
    namespace: dict[str, Any] = {}
    registered = state_types.known()
    try:
        for block in blocks:
            exec(compile(block, "states.md", "exec"), namespace)
    finally:
        torch.set_grad_enabled(True)
        for name in state_types.known().keys() - registered.keys():
            state_types._GROWING.pop(state_types._REGISTERED.pop(name))
    assert "with other weights" in capsys.readouterr().out
