"""Two halves of a one-way layer, one each way, against the two run by hand: for every layer without such an option."""

from typing import Any

import pytest
import torch
from torch import Tensor

import linrnn
from linrnn import layers
from linrnn.layers import Bidirectional
from linrnn.models.optim import param_groups

D = 32  # halves of 16, which every layer takes
ONE_WAY = [name for name in layers.available() if "bidirectional" not in layers.options(name)]
each_layer = pytest.mark.parametrize("name", ONE_WAY)


def make(name: str, **kwargs: Any) -> Bidirectional:
    return Bidirectional(name, D, **kwargs).double()


def by_hand(layer: Bidirectional, x: Tensor) -> Tensor:
    """One document (1, T, D) without padding: the backward half token by token, from the last to the first."""
    T, half = x.shape[1], D // 2
    ys, zs, forwards, backwards = [], [], None, None
    for t in range(T):
        y, forwards = layer.forwards(x[:, t : t + 1, :half], forwards)
        z, backwards = layer.backwards(x[:, T - 1 - t : T - t, half:], backwards)
        ys, zs = [*ys, y], [z, *zs]
    return torch.cat((torch.cat(ys, 1), torch.cat(zs, 1)), -1) @ layer.out.weight.T


def with_gradients(layer: Bidirectional, y: Tensor, x: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    sources = [x, *layer.parameters()]
    grads = torch.autograd.grad((weights * y).sum(), sources, allow_unused=True)
    return [y, *(torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True))]


def assert_same(layer: Bidirectional, ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    pairs = zip(with_gradients(layer, ours, x), with_gradients(layer, theirs, x), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


@each_layer
def test_equals_the_two_halves_by_hand(name: str) -> None:
    """With padding left, right and within, NaN there, and packed documents that begin or end with it."""
    layer, T = make(name), 13
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, [3, 4, 12]], mask[1, [0, 1, 5]] = False, False
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, 5] = True  # row 1: by a padded token
    x = torch.where(mask[..., None], torch.randn(2, T, D, dtype=torch.float64), torch.nan).requires_grad_()
    y, state = layer(x, mask=mask, reset=reset)
    assert state is None
    expected = torch.cat(
        [
            by_hand(layer, x[row, span][mask[row, span]][None])[0]
            for row in range(2)
            for span in (slice(0, 5), slice(5, T))
        ]
    )
    assert_same(layer, y[mask], expected, x)


@each_layer
@pytest.mark.parametrize("T", [0, 1, 7])
def test_without_flags(name: str, T: int) -> None:
    layer = make(name)
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    assert y.shape == x.shape
    if T:
        assert_same(layer, y, by_hand(layer, x), x)


@each_layer
def test_sees_both_sides(name: str) -> None:
    layer, T = make(name), 9
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0][:, 4].sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_carries_nothing() -> None:
    layer, x = make("mamba"), torch.zeros(2, 5, D, dtype=torch.float64)
    assert layer.state_size is None and not layer.causal
    with pytest.raises(ValueError, match="step: a bidirectional layer"):
        layer.step(x[:, 0], None)
    with pytest.raises(RuntimeError, match="init_state: a bidirectional layer"):
        layer.init_state(2)
    with pytest.raises(ValueError, match="state: a bidirectional layer takes none"):
        layer(x, (x,))
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, time, 32\)"):
        layer(x[..., :16])


def test_hints_and_costs_are_those_of_the_halves() -> None:
    layer, half = Bidirectional("mamba", D), layers.build("mamba", D // 2)
    groups = param_groups(layer, 1e-3, 0.1)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(layer.forwards.A_log), id(layer.backwards.A_log)} <= undecayed
    assert linrnn.flops(layer, 63) == 2 * linrnn.flops(half, 63) + 63 * D * D


def test_traces_without_breaks() -> None:
    layer, x = Bidirectional("gla", D), torch.randn(2, 6, D)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=mask, reset=mask)[0], layer(x, mask=mask, reset=mask)[0])


@pytest.mark.parametrize(
    ("name", "d_model", "kwargs", "message"),
    [
        ("gru", 32, {}, "name: no layer is called 'gru'"),
        ("mamba", 0, {}, "d_model: expected an integer >= 1, got 0"),
        ("mamba", 33, {}, "d_model: expected an even number, 'mamba' has half of it each way, got 33"),
        (
            "gla",
            16,
            {},
            "each direction of 'gla' has half of d_model = 16: n_heads: a width of 8 is no 4 or more heads",
        ),
        ("gla", 32, {"n_heads": 3}, "each direction of 'gla' has half of d_model = 32: .*divisor of 16"),
        ("mamba", 32, {"d_stat": 3}, "each direction of 'mamba' .*d_stat: unknown to 'mamba'"),
        ("nystrom", 32, {}, "name: expected a layer that runs forward, 'nystrom' looks both ways by itself"),
        ("lru", 32, {"bidirectional": True}, "name: expected a layer that runs forward, 'lru' looks both ways"),
    ],
)
def test_bad_arguments(name: str, d_model: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bidirectional(name, d_model, **kwargs)
