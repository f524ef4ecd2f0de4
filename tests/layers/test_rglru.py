"""RG-LRU against transformers' and against its equations; the common properties are in test_contract.py."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import RGLRU, RGLRUState
from linrnn.layers.rglru import bounded_sqrt

D, T = 16, 37


def coefficients(layer: RGLRU, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """a and sqrt(1 - a²) (i ⊙ x) of the paper, (B, T, D); `first` (B, T) flags the first token of each document."""

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(x @ torch.block_diag(*weight) + bias.flatten())

    r = gate(layer.recurrent_gate_weight, layer.recurrent_gate_bias)
    i = gate(layer.input_gate_weight, layer.input_gate_bias)
    a = torch.sigmoid(-layer.recurrent_param) ** (8 * r)
    a = torch.where(first[..., None], 0, a)
    return a, (1 - a**2).sqrt() * i * x


def naive(layer: RGLRU, x: Tensor, first: Tensor) -> Tensor:
    a, u = coefficients(layer, x, first)
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + u[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def document_starts(*starts: int) -> Tensor:
    first = torch.zeros(2, T, dtype=torch.bool)
    first[0, [0, *starts]] = True
    first[1, 0] = True
    return first


def randomized(layer: RGLRU) -> RGLRU:
    """The layer with biases that are not zero."""
    with torch.no_grad():
        for bias in (layer.input_gate_bias, layer.recurrent_gate_bias):
            bias.normal_()
    return layer


@pytest.mark.parametrize("n_heads", [1, 4, 16])
def test_equals_the_recurrence(n_heads: int) -> None:
    layer = randomized(RGLRU(D, n_heads=n_heads).double())
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    first = document_starts(5, 30, 31)
    y, state = layer(x, reset=first)
    expected = naive(layer, x, first)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.h, expected[:, -1], rtol=1e-10, atol=1e-10)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    oracle = RecurrentGemmaRglru(transformers.RecurrentGemmaConfig(hidden_size=D, num_attention_heads=4))
    layer = randomized(RGLRU(D, n_heads=4))
    oracle.load_state_dict(layer.state_dict())  # one set of names and shapes
    x = torch.randn(2, T, D, requires_grad=True)

    first = document_starts(5, 30, 31)
    time = torch.arange(T).expand(2, T)
    position = time - torch.where(first, time, 0).cummax(1).values
    y, state = layer(x, reset=first)
    expected = oracle(x, position)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.h, oracle.recurrent_states, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [x, *oracle.parameters()])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)

    # token by token, and a zero state in the middle of a document, whose next token is shrunk
    given = None
    for start, state in ((0, None), (7, RGLRUState(torch.zeros(2, D), torch.ones(2)))):
        oracle.recurrent_states, given = None, state
        for t in range(10):
            with torch.no_grad():
                expected = oracle(x[:, t : t + 1], torch.full((2, 1), start + t))[:, 0]
                y_t, given = layer.step(x[:, t], given)
            torch.testing.assert_close(y_t, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_square_root_is_that_of_recurrentgemma() -> None:
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    x = torch.cat((torch.zeros(1), torch.logspace(-40, 0, 500))).double().requires_grad_()
    y, expected = bounded_sqrt(x), modeling.SqrtBoundDerivative.apply(x)
    torch.testing.assert_close(y, expected, rtol=1e-15, atol=0)
    ours, theirs = (torch.autograd.grad(out.sum(), x, create_graph=True)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert ours.max() == 1000
    second, expected = (torch.autograd.grad(out.sum(), x)[0] for out in (ours, theirs))
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=0)


def test_square_root_under_transforms() -> None:
    x = torch.tensor([0.0, 1e-20, 1e-7, 3e-7, 0.5, 1.0], dtype=torch.float64)
    slope = torch.tensor([1000, 1000, 1000, 0.5 * 3e-7**-0.5, 0.5**0.5, 0.5], dtype=torch.float64)
    _, tangent = torch.func.jvp(bounded_sqrt, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(bounded_sqrt))(x), slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [2, 63, 1000])
def test_recurrence_equals_accelerated_scan(length: int) -> None:
    ref = pytest.importorskip("accelerated_scan.ref")
    layer = randomized(RGLRU(D).double())
    x, first = torch.randn(2, length, D, dtype=torch.float64), torch.arange(length).expand(2, -1) == 0
    with torch.no_grad():
        a, u = (s.mT.contiguous() for s in coefficients(layer, x, first))  # (B, D, T)
        torch.testing.assert_close(layer(x)[0], ref.scan(a, u).mT, rtol=1e-9, atol=1e-10)


def test_first_token_is_not_shrunk() -> None:
    layer = RGLRU(D).double()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    alone = torch.sigmoid(x @ torch.block_diag(*layer.input_gate_weight)) * x
    y, state = layer(x, mask=torch.tensor([[False, True, True], [False, False, False]]))
    torch.testing.assert_close(y[0, 1], alone[0, 1])
    assert state.begun.tolist() == [1, 0]
    y_t, state = layer.step(x[:, 0], state)
    torch.testing.assert_close(y_t[1], alone[1, 0])
    assert not torch.allclose(y_t[0], alone[0, 0])
    assert state.begun.tolist() == [1, 1]


def test_padding_after_a_reset_leaves_the_zero_state() -> None:
    layer, x = RGLRU(D), torch.randn(2, 3, D)
    time = torch.arange(3).expand(2, 3)
    _, state = layer(x, reset=time == 1, mask=time == 0)
    assert not state.h.any() and not state.begun.any()


def test_states_before_the_beginning_count_for_nothing() -> None:
    layer, x = RGLRU(D), torch.randn(2, 3, D)
    state = RGLRUState(torch.full((2, D), 1e3), torch.zeros(2))
    torch.testing.assert_close(layer(x, state)[0], layer(x)[0])


def test_long_memories_are_exact_in_float32() -> None:
    layer = RGLRU(D, r_min=1 - 1e-9, r_max=1 - 1e-9)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(1, 1000, D)
    y, expected = layer(x)[0], exact(x.double())[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    change = (expected - expected[:, :1]).abs().max()
    assert 1e-5 < change
    torch.testing.assert_close(
        (y - y[:, :1]).double(), expected - expected[:, :1], rtol=1e-2, atol=1e-2 * change.item()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-300.0, -20.0, 20.0, 300.0])
@pytest.mark.parametrize("name", ["recurrent_param", "recurrent_gate_bias", "input_gate_bias"])
def test_stable_whatever_the_parameters(name: str, value: float, dtype: torch.dtype) -> None:
    layer = RGLRU(D).to(dtype)
    with torch.no_grad():
        getattr(layer, name).fill_(value)
    y, state = layer(torch.randn(2, 63, D, dtype=dtype))
    y.float().square().mean().backward()
    assert y.isfinite().all() and state.h.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("r_min", "r_max"), [(0.9, 0.999), (0.5, 0.5), (1 - 1e-9, 1 - 1e-10)])
def test_initialisation(r_min: float, r_max: float) -> None:
    layer = RGLRU(4000, n_heads=100, r_min=r_min, r_max=r_max)
    decay = torch.exp(-8 * torch.nn.functional.softplus(layer.recurrent_param.double()))
    share = (1 - decay).sort().values / (1 - r_min)
    expected = torch.linspace((1 - r_max) / (1 - r_min), 1, 4000, dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.05)
    for weight in (layer.input_gate_weight, layer.recurrent_gate_weight):
        torch.testing.assert_close(weight.std().item(), 40**-0.5, rtol=0.01, atol=0)
    assert layer.optim_hints().keys() == {"recurrent_param", "input_gate_bias", "recurrent_gate_bias"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_heads": 3}, "n_heads: expected a divisor of 16, got 3"),
        ({"n_heads": 0}, "n_heads: expected an integer >= 1, got 0"),
        ({"d_model": 5}, "n_heads: a width of 5 is no 4 or more heads"),
        ({"r_min": 0.0}, "r_min, r_max: expected 0 < r_min <= r_max < 1, got 0.0, 0.999"),
        ({"r_min": 0.9, "r_max": 0.8}, "r_min, r_max: .* got 0.9, 0.8"),
        ({"r_max": 1.0}, "r_min, r_max: .* got 0.9, 1.0"),
        ({"r_max": math.nan}, "r_min, r_max: .* got 0.9, nan"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RGLRU(**{"d_model": D, **kwargs})
