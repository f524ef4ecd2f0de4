"""LinearAttention against attention matrices written out; the common properties are in test_contract.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.decode.state import leaves
from linrnn.layers import LinearAttention
from linrnn.layers.feature_maps import FEATURE_MAPS, find_map, taylor
from linrnn.layers.kernel_attention import Features, causal, noncausal

MAPS = [(name, rope) for name, kind in FEATURE_MAPS.items() for rope in ((False, True) if kind.rotates else (False,))]
each_map = pytest.mark.parametrize(("name", "rope"), MAPS)
D, T = 16, 33


def make(name: str, rope: bool = False, **kwargs: Any) -> LinearAttention:
    return LinearAttention(D, n_heads=2, feature_map=name, rope=rope, **kwargs).double()


def visible(causal: bool, reset: Tensor, mask: Tensor) -> Tensor:
    """Which tokens see which, (B, T, T)."""
    document = reset.cumsum(1)
    seen = (document[:, :, None] == document[:, None]) & mask[:, None]
    return seen.tril() if causal else seen


def products(q: Tensor, k: Tensor, position: Tensor | None) -> Tensor:
    """q · k of every pair, (B, H, T, T), rotated as complex numbers if there are positions (B, T)."""
    if position is None:
        return torch.einsum("bihf,bjhf->bhij", q, k)
    half = q.shape[-1] // 2
    θ = 10000.0 ** (-torch.arange(half, dtype=q.dtype) / half)
    phase = torch.exp(1j * position[..., None, None] * θ)
    q_c, k_c = (torch.complex(*x.chunk(2, -1)) * phase for x in (q, k))
    return torch.einsum("bihf,bjhf->bhij", q_c, k_c.conj()).real


def weights(name: str, q: Tensor, k: Tensor, seen: Tensor, position: Tensor | None) -> Tensor:
    """The attention matrix A (B, H, T, T) of a feature map, from queries and keys (B, T, H, K)."""
    K, seen = q.shape[-1], seen[:, None]
    if name == "softmax":
        far = torch.where(seen[..., None], k.transpose(1, 2)[:, :, None], -1e9)  # (B, H, i, j, K)
        return torch.einsum("bihf,bhijf->bhij", q.softmax(-1), far.softmax(3)) * seen
    if name == "identity":
        return products(q, k, position) * seen / math.sqrt(K)
    if name == "elu":
        q, k = F.elu(q) + 1, F.elu(k) + 1
        above, below = products(q, k, position), products(q, k, None)
    elif name == "exp":
        above = below = products(q.exp(), k.exp(), None)
    elif name == "cosine":
        above = below = 1 + products(F.normalize(q, dim=-1), F.normalize(k, dim=-1), position)
    else:
        s = products(q, k, None) / math.sqrt(K)
        above = below = 1 + s + s.square() / 2
    return above * seen / (below * seen).sum(-1, keepdim=True)


def naive(layer: LinearAttention, x: Tensor, reset: Tensor, mask: Tensor) -> Tensor:
    width = layer.n_heads * layer.d_key
    q, k, v = (s.unflatten(-1, (layer.n_heads, -1)) for s in layer.qkv(x).split((width, width, D), -1))
    position = mask.cumsum(1) if layer.rope_base is not None else None
    A = weights(layer.feature_map, q, k, visible(layer.causal, reset, mask), position)
    o = torch.einsum("bhij,bjhv->bihv", A, v)
    if layer.feature_map == "identity":
        o = F.rms_norm(o, o.shape[-1:], layer.norm.weight, eps=1e-5)
    return layer.out(o.flatten(2))


@each_map
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_attention_matrix(name: str, rope: bool, bidirectional: bool, packed: bool) -> None:
    layer = make(name, rope, bidirectional=bidirectional)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, T) < 0.8
    mask[:, 0] = True
    reset = (torch.rand(2, T) < 0.1) & packed
    mask |= reset
    y, _ = layer(x, reset=reset if packed else None, mask=mask)
    results = []
    for out in (y, naive(layer, x, reset, mask)):
        loss = (out * torch.linspace(-1, 1, D, dtype=out.dtype))[mask].square().sum()
        results.append([out[mask], *torch.autograd.grad(loss, [x, *layer.parameters()])])
    tolerance = 1e-4 if name == "cosine" else 1e-9  # its denominator has an eps
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@each_map
def test_pieces_and_steps_equal_the_whole(name: str, rope: bool) -> None:
    layer = make(name, rope)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    results = []
    for lengths in ([T], [7, 0, 20, 6], [1] * T):
        ys, state = [], None
        for piece in x.split(lengths, 1):
            y, state = layer(piece, state)
            ys.append(y)
        found = [torch.cat(ys, 1), *leaves(state)]
        loss = sum((part * torch.linspace(-1, 1, part.shape[-1], dtype=part.dtype)).sum() for part in found)
        results.append([*found, *torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@each_map
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, rope: bool, dtype: torch.dtype) -> None:
    layer = make(name, rope).to(dtype)
    x = torch.randn(2, 1000, D).to(dtype)
    with torch.no_grad():
        y = layer(x)[0].double()
        expected = layer.double()(x.double())[0]
    assert (y - expected).norm() < 5 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_sums_that_float16_does_not_hold(bidirectional: bool) -> None:
    layer = make("elu", rope=True, bidirectional=bidirectional).half()
    x = 20 * torch.randn(2, 1000, D).half()  # φ(q) · z is about a million
    with torch.no_grad():
        y = layer(x)[0].double()
        expected = layer.double()(x.double())[0]
    assert (y - expected).norm() < 5 * torch.finfo(torch.float16).eps * expected.norm()


@pytest.mark.parametrize(("name", "bidirectional"), [("softmax", False), ("softmax", True), ("cosine", False)])
def test_traces_without_breaks(name: str, bidirectional: bool) -> None:
    layer = make(name, rope=name == "cosine", bidirectional=bidirectional)
    x, flags = torch.randn(2, 6, D, dtype=torch.float64), torch.arange(6) < torch.tensor([[6], [4]])
    torch._dynamo.reset()
    y, _ = torch.compile(layer, fullgraph=True, backend="eager")(x, reset=~flags, mask=flags)
    torch.testing.assert_close(y, layer(x, reset=~flags, mask=flags)[0])


def some_features(name: str) -> tuple[Features, Tensor]:
    q, k, v = torch.randn(3, 2, T, 2, 6, dtype=torch.float64)
    kind = find_map(name)
    return Features(kind.apply(q), kind.apply(k)), v


@pytest.mark.parametrize("name", [name for name, kind in FEATURE_MAPS.items() if kind.normalize])
@pytest.mark.parametrize("run", [lambda *args: causal(*args)[0], noncausal])
def test_rows_of_the_attention_matrix_sum_to_one(name: str, run: Any) -> None:
    features, v = some_features(name)
    torch.testing.assert_close(run(find_map(name), features, torch.ones_like(v)), torch.ones_like(v), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("run", [lambda *args, **kwargs: causal(*args, **kwargs)[0], noncausal])
def test_padding_may_hold_anything(name: str, run: Any) -> None:
    kind, ((q, k), v) = find_map(name), some_features(name)
    real = torch.rand(T) < 0.7
    o = run(kind, Features(q, k), v, mask=real.expand(2, T))[:, real]
    torch.testing.assert_close(o, run(kind, Features(q[:, real], k[:, real]), v[:, real]))


@pytest.mark.parametrize("name", ["elu", "exp", "taylor"])
def test_the_scale_of_query_features_changes_nothing(name: str) -> None:
    kind, ((q, k), v) = find_map(name), some_features(name)
    scaled = Features(q + 50 if kind.logs else 50 * q, k)
    torch.testing.assert_close(causal(kind, scaled, v)[0], causal(kind, Features(q, k), v)[0])
    torch.testing.assert_close(noncausal(kind, scaled, v), noncausal(kind, Features(q, k), v))


def test_identity_is_a_cumulative_sum() -> None:
    (q, k), v = some_features("identity")
    S = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    o, (last, *_) = causal(find_map("identity"), Features(q, k), v)
    torch.testing.assert_close(o, torch.einsum("bthk,bthkv->bthv", q, S))
    torch.testing.assert_close(last, S[:, -1])


@pytest.mark.parametrize("name", ["exp", "softmax"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_exponentials_of_any_size(name: str, bidirectional: bool) -> None:
    q, k, v = torch.randn(3, 2, T, 2, 6)
    k = 60 * k  # exp(60 * 3) is more than float32 holds
    seen = visible(not bidirectional, torch.zeros(2, T, dtype=torch.bool), torch.ones(2, T, dtype=torch.bool))
    far = torch.where(seen[:, None, :, :, None], k.double().transpose(1, 2)[:, :, None], -torch.inf)  # (B, H, i, j, K)
    if name == "exp":
        A = (q.double().transpose(1, 2)[:, :, :, None] + far).flatten(3).softmax(3).view(far.shape).sum(-1)
    else:
        A = torch.einsum("bihf,bhijf->bhij", q.double().softmax(-1), far.softmax(3))
    expected = torch.einsum("bhij,bjhv->bihv", A, v.double())
    kind = find_map(name)
    o = noncausal(kind, Features(q, k), v) if bidirectional else causal(kind, Features(q, k), v)[0]
    # an exponent of 200 is rounded to 2e-5, by which its exponential is wrong
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)


def test_taylor_is_positive() -> None:
    q, k = 10 * torch.randn(2, 100, 6)
    assert (taylor(q) @ taylor(k).T).min() > 0.49


def test_opposite_directions_under_cosine_are_finite() -> None:
    layer = make("cosine")
    x = torch.zeros(1, 5, D, dtype=torch.float64, requires_grad=True)  # a direction of nothing, too
    y, _ = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    k = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    cosine = find_map("cosine")
    assert causal(cosine, Features(cosine.apply(-k), cosine.apply(k)), k)[0].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_map": "relu"}, "feature_map: expected one of elu, exp, .* got 'relu'"),
        ({"feature_map": "exp", "rope": True}, "rope: expected False with 'exp'; .* 'elu', 'cosine', 'identity'"),
        ({"rope": True, "d_key": 3}, "d_key: rotary positions need an even key width, got 3"),
        ({"rope_base": 0}, "rope_base: expected a number > 0, got 0"),
        ({"d_key": 0}, "d_key: expected an integer >= 1, got 0"),
        ({"n_heads": 3}, "n_heads: expected a divisor of 16, got 3"),
        ({"d_model": 10}, "n_heads: a width of 10 is no 4 or more heads of 4, 8, ... 64; give n_heads"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttention(**{"d_model": D, **kwargs})
