"""MEGA against the paper's formulas, document by document; the common properties are in test_contract.py."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import Mega, MegaState
from linrnn.layers.relative_bias import RotaryBias, SimpleBias
from linrnn.models.optim import param_groups

from .packed import documents, packed_rows, run_in_pieces

D = 16
VARIANTS: list[dict[str, Any]] = [
    {"chunk_size": None},
    {"chunk_size": None, "attention_fn": "laplace", "rel_pos_bias": "simple", "max_positions": 120},
    {"chunk_size": None, "attention_fn": "relu2", "d_value": 24, "d_key": 6},
    {"chunk_size": 4},
    {"chunk_size": 5, "rel_pos_bias": "simple", "d_state": 3},
    {"chunk_size": 4, "attention_fn": "laplace"},
    {"chunk_size": 1},
]
each_variant = pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
each_way = pytest.mark.parametrize("bidirectional", [False, True])


def make(**kwargs: Any) -> Mega:
    """A layer whose attention and biases matter: at its initialisation all scores are nearly equal."""
    layer = Mega(D, **kwargs).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) / max(1, p.shape[-1] if p.shape[-1] >= D else 1) ** 0.5)
        layer.kappa.normal_(std=3)
    return layer


def naive_bias(layer: Mega, i: int, j: int) -> Tensor:
    bias = layer.bias
    if isinstance(bias, SimpleBias):
        return bias.bias[i - j if layer.causal else bias.max_positions - 1 + i - j]
    half = layer.d_key // 2
    a, b = (torch.complex(p[:half], p[half:]) for p in (bias.a, bias.b))
    θ = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return (a * torch.exp(1j * i * θ) * (b * torch.exp(1j * j * θ)).conj()).real.sum()


def naive(layer: Mega, x: Tensor) -> Tensor:
    """One document x (T, D), pair by pair of tokens."""
    T, C = len(x), layer.chunk_size or len(x)

    def silu(u: Tensor) -> Tensor:
        return u * u.sigmoid()

    average, _ = layer.ema(x[None])  # against its own equations in test_ema.py
    W = zip(layer.mx_proj.weight.split(layer.sizes), layer.mx_proj.bias.split(layer.sizes), strict=True)
    φ, z, γ, candidate = (silu(average[0]) @ w.T + b for w, b in W)
    q, k = (silu(z) * κ + μ for κ, μ in zip(layer.kappa, layer.mu, strict=True))
    v = silu(x @ layer.v_proj.weight.T + layer.v_proj.bias)
    o = []
    for i in range(T):
        first = i // C * C
        seen = range(first, i + 1 if layer.causal else min(first + C, T))
        τ = math.sqrt(layer.d_key) if layer.attention_fn == "softmax" else len(seen)
        s = torch.stack([q[i] @ k[j] / τ + naive_bias(layer, i, j) for j in seen])
        if layer.attention_fn == "softmax":
            weights = s.exp() / s.exp().sum()
        elif layer.attention_fn == "laplace":
            μ, σ = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
            weights = 0.5 * (1 + torch.erf((s - μ) / (σ * math.sqrt(2))))
        else:
            weights = s.clamp(min=0) ** 2
        o.append(weights @ v[first : seen.stop])
    φ, h = φ.sigmoid(), silu(candidate + (silu(γ) * torch.stack(o)) @ layer.h_proj.weight.T)
    return φ * h + (1 - φ) * x


@each_way
@each_variant
def test_equals_the_formulas(kwargs: dict[str, Any], bidirectional: bool) -> None:
    layer = make(**kwargs, bidirectional=bidirectional)
    x = torch.randn(2, 11, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], torch.stack([naive(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    if not bidirectional:
        first, state = layer(x[:, :3])
        rest, _ = layer(x[:, 3:], state)
        torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-10, atol=1e-10)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((out**2).sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)


@each_way
@each_variant
@pytest.mark.parametrize("padded", [False, True])
def test_documents_in_rows_and_pieces(kwargs: dict[str, Any], bidirectional: bool, padded: bool) -> None:
    """Packed, padded anywhere, and cut anywhere: chunks, positions and counts are those of the document alone."""
    layer = make(**kwargs, bidirectional=bidirectional)
    T, starts = 27, [[0, 9, 10, 22], [0, 5, 23, 26]]
    x, reset, mask = packed_rows(starts, T, D, 0.7 if padded else None)
    x.requires_grad_()
    their = torch.cat([naive(layer, x[row, real]) for row, real in documents(starts, mask)])
    (their_grad,) = torch.autograd.grad((their**2).sum(), x)

    for lengths in [[T]] if bidirectional else [[T], [1] * T, [12, 0, 1, 14]]:
        our = run_in_pieces(layer, x, reset, mask if padded else None, lengths)[mask]
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)
        (our_grad,) = torch.autograd.grad((our**2).sum(), x)
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-8, atol=1e-8)


def test_the_state_of_chunks_is_the_open_chunk() -> None:
    layer = Mega(D, chunk_size=8, d_key=4, d_value=5)
    state = layer.init_state(2)
    sizes = []
    for length in (3, 5, 7, 30):
        _, state = layer(torch.randn(2, length, D), state)
        assert isinstance(state, MegaState)
        sizes.append(state.length.tolist())
        assert (state.k[0].abs().sum(1) > 0).sum() == state.length[0]
    assert sizes == [[3, 3], [0, 0], [7, 7], [5, 5]]
    assert state.k.shape == (2, 7, 4) and state.v.shape == (2, 7, 5)
    assert layer.state_size == D * 16 + 7 * (4 + 5) + 1


def test_the_state_of_full_attention_is_every_token() -> None:
    layer = Mega(D, chunk_size=None)
    _, state = layer(torch.randn(2, 9, D))
    _, state = layer.step(torch.randn(2, D), state)
    assert state.k.shape == (2, 10, 16) and state.v.shape == (2, 10, D)
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[1, 3] = True
    _, state = layer(torch.randn(2, 4, D), state, reset=reset)
    assert state.length.tolist() == [14, 1]
    assert layer.state_size is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_variant
def test_low_precision(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Bound and reasons are those of the contract test, which runs the default alone."""
    layer = Mega(D, **kwargs).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 60, D).to(dtype)
    with torch.no_grad():
        y, state = layer(x)
        error = y.double() - exact(x.double())[0]
        assert error.square().mean().sqrt() < 10 * torch.finfo(dtype).eps / 2
        assert layer(x, state)[0].dtype == dtype  # a state can go back in
        with torch.autocast("cpu", dtype):
            y, state = layer.float()(x.float())
            assert layer(x.float(), state)[0].isfinite().all()


@each_way
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_compiles(chunk_size: int | None, bidirectional: bool) -> None:
    """What the contract test does not reach: full attention, and more than one chunk."""
    layer = Mega(D, chunk_size=chunk_size, attention_fn="laplace", bidirectional=bidirectional)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, flags = torch.randn(2, 6, D), torch.arange(6) < torch.tensor([[6], [4]])
    torch._dynamo.reset()
    with torch.no_grad():
        state = None if bidirectional else layer(torch.randn(2, 5, D))[1]
        expected, _ = layer(x, state, reset=flags, mask=flags)
        torch.testing.assert_close(compiled(x, state, reset=flags, mask=flags)[0], expected)


def test_initialisation() -> None:
    layer = Mega(256)
    for p in (layer.v_proj.weight, layer.mx_proj.weight, layer.h_proj.weight, layer.kappa):
        assert abs(p.std().item() - 0.02) < 0.004
    assert not layer.mu.any() and not layer.mx_proj.bias.any()
    assert isinstance(layer.bias, RotaryBias)
    decaying = [p for group in param_groups(layer, 1e-3, 0.1) if group["weight_decay"] for p in group["params"]]
    assert {id(p) for p in decaying} == {
        id(p) for p in (layer.v_proj.weight, layer.mx_proj.weight, layer.h_proj.weight)
    }


@each_way
def test_simple_bias_has_a_limit(bidirectional: bool) -> None:
    layer = Mega(D, chunk_size=None, rel_pos_bias="simple", max_positions=9, bidirectional=bidirectional)
    state = layer(torch.randn(2, 9, D))[1]
    with pytest.raises(ValueError, match=r"max_positions: expected at least the 10 tokens .*, got 9; .*rotary"):
        layer(torch.randn(2, 10, D)) if bidirectional else layer.step(torch.randn(2, D), state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_key": 0}, "d_key: expected an integer >= 1, got 0"),
        ({"d_key": 7}, "d_key: a rotary bias needs an even one, got 7"),
        ({"d_value": -1}, "d_value: expected an integer >= 1, got -1"),
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
        ({"attention_fn": "relu"}, "attention_fn: expected one of 'softmax', 'laplace', 'relu2', got 'relu'"),
        ({"rel_pos_bias": None}, "rel_pos_bias: expected one of 'rotary', 'simple', got None"),
        (
            {"rel_pos_bias": "simple", "chunk_size": None},
            "max_positions: expected an integer .* got None with 'simple'",
        ),
        ({"max_positions": 9}, "max_positions: .* otherwise None, got 9 with 'rotary' and 128"),
        (
            {"rel_pos_bias": "simple", "chunk_size": None, "max_positions": 0},
            "max_positions: expected an integer >= 1, got 0",
        ),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mega(D, **kwargs)
