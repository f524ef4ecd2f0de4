"""HGRN against its equations; the common properties of real channels are in test_contract.py."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers import HGRN, HGRNState, LowerBounds
from linrnn.models.optim import param_groups

D, T = 16, 37


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    return x @ module.weight.T + module.bias


def gates(layer: HGRN, x: Tensor, γ: Tensor | float) -> tuple[Tensor, Tensor]:
    """λ e^{iθ} and (1 - λ) c, as the paper writes them, (B, T, N)."""
    λ = γ + (1 - γ) * torch.sigmoid(linear(layer.lambda_proj, x))
    c = linear(layer.input_proj, x)
    c = c * torch.sigmoid(c)
    if layer.theta is None:
        return λ, (1 - λ) * c
    return λ * torch.exp(1j * layer.theta), (1 - λ) * torch.complex(c[..., ::2], c[..., 1::2])


def recurrence(a: Tensor, u: Tensor) -> Tensor:
    h, hs = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = a[:, t] * h + u[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def naive(layer: HGRN, x: Tensor, γ: Tensor | float) -> Tensor:
    a, u = gates(layer, x, γ)
    h = recurrence(a, u)
    if not layer.causal:
        h = h + recurrence(a.flip(1), u.flip(1)).flip(1)
    h = torch.cat((h.real, h.imag), -1) if h.is_complex() else h
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    g = linear(layer.gate, x)
    return linear(layer.out_proj, (h * layer.norm.weight + layer.norm.bias) * g * torch.sigmoid(g))


KINDS = [
    {},
    {"complex": True},
    {"bidirectional": True},
    {"complex": True, "bidirectional": True},
    {"d_state": 6, "lower_bound": 0.75, "complex": True},
    {"d_state": 6, "lower_bound": 0.75},
]
each_kind = pytest.mark.parametrize("kwargs", KINDS, ids=str)


def make(**kwargs: Any) -> HGRN:
    """A layer in float64 whose norm is not the one it starts with."""
    layer = HGRN(D, **kwargs).double()
    with torch.no_grad():
        for parameter in layer.norm.parameters():
            parameter.normal_()
    return layer


def assert_same(ours: Tensor, theirs: Tensor, sources: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    pairs = zip(*(torch.autograd.grad(out.square().sum(), sources) for out in (ours, theirs)), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)


@each_kind
def test_equals_the_recurrence(kwargs: dict[str, Any]) -> None:
    layer = make(**kwargs)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    assert_same(layer(x)[0], naive(layer, x, kwargs.get("lower_bound", 0.0)), [x, *layer.parameters()])


@each_kind
def test_packed_and_padded(kwargs: dict[str, Any]) -> None:
    layer = make(**kwargs)
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, T) < 0.7
    reset = torch.arange(T)[None] == 20
    expected = torch.cat(
        [layer(part[real][None])[0] for part, real in ((x[:, :20], mask[:, :20]), (x[:, 20:], mask[:, 20:]))], 1
    )
    assert_same(layer(x, reset=reset, mask=mask)[0][mask], expected[0], [x, *layer.parameters()])


@pytest.mark.parametrize("complex", [False, True])
def test_pieces_and_steps(complex: bool) -> None:
    layer = make(complex=complex, lower_bound=0.5)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    y, final = layer(x)
    first, state = layer(x[:, :20])
    ys = [first]
    for x_t in x[:, 20:].unbind(1):
        y_t, state = layer.step(x_t, state)
        ys.append(y_t[:, None])
    assert_same(torch.cat(ys, 1), y, [x, *layer.parameters()])
    torch.testing.assert_close(state.h, final.h, rtol=1e-9, atol=1e-9)
    assert state.h.is_complex() == complex
    assert layer.state_size == (2 * D if complex else D)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_wide(complex: bool, dtype: torch.dtype) -> None:
    layer = HGRN(D, complex=complex, lower_bound=0.99).to(dtype)
    y, state = layer(torch.randn(2, T, D, dtype=dtype))
    assert y.dtype == dtype
    assert state.h.dtype == (torch.complex64 if complex else torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(2, T, D, dtype=dtype), HGRNState(state.h.detach())
    torch.testing.assert_close(compiled(x, state)[0], layer(x, state)[0])


def test_real_channels_are_complex_ones_that_do_not_turn() -> None:
    real, turning = make(lower_bound=0.5), make(lower_bound=0.5, complex=True)
    with torch.no_grad():
        turning.theta.zero_()
        for name in ("lambda_proj", "input_proj"):
            ours, theirs = getattr(real, name), getattr(turning, name)
            for kind in ("weight", "bias"):
                source, target = getattr(ours, kind), getattr(theirs, kind)
                target.zero_()[:: len(target) // len(source)] = source
    x = torch.randn(2, T, D, dtype=torch.float64)
    h = turning(x)[1].h
    torch.testing.assert_close(h.real, real(x)[1].h, rtol=1e-12, atol=1e-12)
    assert not h.imag.any()


def test_the_gate_keeps_its_digits_near_one() -> None:
    layer = HGRN(D, lower_bound=1 - 1e-6)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 1000, D)
    ours, theirs = layer(x)[1].h.double(), exact(x.double())[1].h
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_lower_bounds_are_the_cumulative_softmax() -> None:
    bounds = LowerBounds(4, D).double()
    torch.testing.assert_close(bounds()[:, 0], torch.tensor([0, 0.25, 0.5, 0.75], dtype=torch.float64))
    nn.init.normal_(bounds.gamma)
    P = F.softmax(bounds.gamma, 0)
    for k in range(4):
        torch.testing.assert_close(bounds()[k], P[:k].sum(0), rtol=1e-12, atol=1e-12)
    assert LowerBounds(2, 3).bfloat16()().dtype == torch.float32


@pytest.mark.parametrize("complex", [False, True])
def test_a_stack_learns_its_lower_bounds(complex: bool) -> None:
    bounds = LowerBounds(3, D)
    nn.init.normal_(bounds.gamma)
    kwargs: dict[str, Any] = {"lower_bound": bounds, "complex": complex}
    stack = nn.ModuleList(HGRN(D, layer_index=k, **kwargs) for k in range(3)).double()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    P, y, expected = F.softmax(bounds.gamma, 0), x, x
    for k, layer in enumerate(stack):
        assert isinstance(layer, HGRN)
        y, expected = layer(y)[0], naive(layer, expected, P[:k].sum(0))
    assert_same(y, expected, [x, *stack.parameters()])

    own = sum(p.numel() for p in HGRN(D, complex=complex).parameters())
    copied = copy.deepcopy(stack)
    assert sum(p.numel() for p in copied.parameters()) == 3 * own + 3 * D  # shared, also in a copy
    copied.load_state_dict(stack.state_dict())
    (group,) = [g for g in param_groups(stack, 1e-3, 0.1) if any(p is bounds.gamma for p in g["params"])]
    assert group["weight_decay"] == 0


def test_initialisation_of_the_phases() -> None:
    layer = HGRN(D, d_state=4, complex=True)
    assert layer.theta is not None
    torch.testing.assert_close(layer.theta.detach(), torch.tensor([1, 1e-2, 1e-4, 1e-6]))


def test_sizes() -> None:
    assert sum(p.numel() for p in HGRN(D).parameters()) == 4 * D * D + 6 * D
    assert sum(p.numel() for p in HGRN(D, complex=True).parameters()) == 7 * D * D + 11 * D


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"lower_bound": 1.0}, r"lower_bound: expected a number in \[0, 1\) or LowerBounds, got 1.0"),
        ({"lower_bound": -0.1}, "lower_bound: .* got -0.1"),
        ({"lower_bound": math.nan}, "lower_bound: .* got nan"),
        ({"lower_bound": 0.5, "layer_index": 1}, "layer_index: expected 0 where lower_bound is a number, got 1"),
        ({"lower_bound": LowerBounds(2, 8)}, "lower_bound: expected bounds of d_state = 16 channels, got 8"),
        (
            {"lower_bound": LowerBounds(2, D), "layer_index": 2},
            "layer_index: expected an integer from 0 to .* = 1, got 2",
        ),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HGRN(D, **kwargs)


def test_bad_bounds() -> None:
    with pytest.raises(ValueError, match="n_layers: expected an integer >= 1, got 0"):
        LowerBounds(0, D)
    with pytest.raises(ValueError, match="d_state: expected an integer >= 1, got 0"):
        LowerBounds(2, 0)
    real, turning = HGRN(D), HGRN(D, complex=True)
    with pytest.raises(ValueError, match=r"state.h: expected torch.complex64, got torch.float32"):
        turning(torch.zeros(2, 3, D), HGRNState(real.init_state(2).h))
