"""States of every layer, put together and taken apart: each sequence goes on as if it were alone."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn import layers
from linrnn.decode import state as states
from linrnn.decode.state_types import growing, known
from linrnn.layers import RecurrentLayer
from linrnn.models import SequenceBackbone

D = 16
CAUSAL = [n for n in layers.available() if "bidirectional: bool = True" not in str(inspect.signature(layers.LAYERS[n]))]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("attention", {"positions": "alibi"}),
    ("attention", {"n_heads": 2, "n_kv_heads": 1, "window": 4, "sink": 2}),
    ("gau", {"attention": "softmax_plus"}),
    ("linear_attention", {"feature_map": "elu"}),
    ("mega", {"chunk_size": None}),
    ("mega", {"chunk_size": None, "attention_fn": "laplace", "rel_pos_bias": "simple", "max_positions": 80}),
]
MAKERS: dict[str, Callable[[], RecurrentLayer]] = {
    **{name: lambda name=name: layers.build(name, D) for name in CAUSAL},
    **{f"{name} {kwargs}": lambda n=name, k=kwargs: layers.build(n, D, **k) for name, kwargs in VARIANTS},
    "hybrid": lambda: SequenceBackbone(["lru", "attention", "mamba", "gau"], D, 4),
    "channel_mix": lambda: SequenceBackbone(["attention", "rwkv4"], D, 2, ffn="channel_mix"),
}
LENGTHS, ROWS = (5, 63, 1, 0), (2, 1, 1, 1)  # of the batches put together
each = pytest.mark.parametrize("name", MAKERS)


def make(name: str) -> RecurrentLayer:
    return MAKERS[name]().double().eval()


def after(layer: RecurrentLayer, rows: int, length: int) -> Any:
    """A state of some sequences, also of none at all of their tokens."""
    return layer(torch.randn(rows, length, D, dtype=torch.float64), layer.init_state(rows))[1]


def go_on(layer: RecurrentLayer, x: Tensor, state: Any) -> Tensor:
    """Reads x (B, T, D) in one call, then its tokens once more one by one: (B, 2 T, D)."""
    y, state = layer(x, state)
    ys = [y]
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        ys.append(y_t[:, None])
    return torch.cat(ys, 1)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def all_equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states.leaves(ours), states.leaves(theirs), strict=True))


@each
@torch.no_grad()
def test_batches_of_unequal_length_go_on_as_one(name: str) -> None:
    layer = make(name)
    parts = [after(layer, rows, length) for rows, length in zip(ROWS, LENGTHS, strict=True)]
    before = [states.clone(part) for part in parts]
    x = torch.randn(sum(ROWS), 3, D, dtype=torch.float64)
    alone = torch.cat([go_on(layer, piece, part) for piece, part in zip(x.split(ROWS), parts, strict=True)])
    whole = states.concatenate(parts)
    assert states.batch_size(whole) == sum(ROWS)
    kept = states.clone(whole)
    assert_equal(go_on(layer, x, whole), alone)

    # the long sequence leaves, and takes its columns with it
    rows = [4, 0, 3]
    some = states.select(whole, rows)
    trimmed = states.trim(some, layer)
    assert_equal(go_on(layer, x[rows], some), alone[rows])
    assert_equal(go_on(layer, x[rows], trimmed), alone[rows])
    if layer.state_size is None:
        assert states.nbytes(trimmed) < states.nbytes(some) / 5
    else:
        assert all_equal(trimmed, some)

    # another takes its place, and a longer one another place
    for pool, part, at in ((trimmed, parts[1], [1]), (whole, parts[0], [-1, 2])):
        index = torch.tensor(at)
        mixed = states.put(pool, at, part)
        x_pool, x_part = x[: states.batch_size(pool)], x[: len(at)]
        expected = go_on(layer, x_pool, pool).index_copy(0, index % len(x_pool), go_on(layer, x_part, part))
        x_pool = x_pool.index_copy(0, index % len(x_pool), x_part)
        assert_equal(go_on(layer, x_pool, mixed), expected)

    # and nobody's state has changed
    assert all_equal(whole, kept)
    assert all(all_equal(part, old) for part, old in zip(parts, before, strict=True))


@each
@torch.no_grad()
def test_files(name: str, tmp_path: Path) -> None:
    layer = make(name)
    state = after(layer, 2, 5)
    states.save(state, tmp_path / "state", model=layer)
    loaded = states.load(tmp_path / "state", model=layer)
    assert type(loaded) is type(state) and all_equal(loaded, state)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    assert torch.equal(go_on(layer, x, loaded), go_on(layer, x, state))


@pytest.mark.parametrize("name", ["lru", "attention", "gau", "mega {'chunk_size': None}"])
def test_gradients_flow_through_what_is_put_together(name: str) -> None:
    layer, x = make(name), torch.randn(2, 3, D, dtype=torch.float64)
    parts = [after(layer, 1, 4), after(layer, 1, 2)]
    alone = torch.cat([go_on(layer, row, part) for row, part in zip(x.split(1), parts, strict=True)])
    whole = go_on(layer, x, states.put(states.concatenate(parts), [1], parts[1]))
    parameters = list(layer.parameters())
    expected, given = (torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (alone, whole))
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_growing_fields_are_those_of_the_layers() -> None:
    seen = set()
    for name, maker in MAKERS.items():
        layer = maker()
        if isinstance(layer, SequenceBackbone):
            continue
        spec = {field for field, (shape, _) in layer.state_spec().items() if None in shape}
        assert known()[layer.state_type.__name__] is layer.state_type, name
        assert all(shape.index(None) == 0 for shape, _ in layer.state_spec().values() if None in shape)
        if spec:
            fields = growing(layer.init_state(1))
            assert fields is not None and set(fields.columns) == spec and layer.state_spec()[fields.length][0] == ()
            seen.add(layer.state_type)
    assert seen == {layers.AttentionState, layers.GAUState, layers.MegaState}
