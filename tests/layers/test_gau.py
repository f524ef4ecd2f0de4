"""The gated attention unit against its formulas and FLASH-pytorch; the common properties are in test_contract.py."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import GAU, GAUState
from linrnn.layers import gau as module
from linrnn.models.optim import param_groups

from .packed import documents, packed_rows, run_in_pieces

D = 16
VARIANTS: list[dict[str, Any]] = [
    {"attention": "relu2"},
    {"attention": "softmax_plus"},
    {"attention": "relu2", "d_key": 5, "d_value": 7, "rope_base": None},
    {"attention": "softmax_plus", "d_key": 6, "d_value": 40, "rope_base": 50.0},
]
each_variant = pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
each_way = pytest.mark.parametrize("bidirectional", [False, True])


def make(**kwargs: Any) -> GAU:
    """A layer whose queries and keys differ, with scores of both signs."""
    layer = GAU(D, **kwargs).double()
    with torch.no_grad():
        layer.kappa.normal_(std=2)
        layer.mu.normal_()
    return layer


def parts(layer: GAU, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v (T, e) and complex q, k (T, s or s / 2), turned, of one document x (T, D)."""
    s, e = layer.d_key, layer.d_value
    u, v, z = (h * h.sigmoid() for h in (x @ layer.uvz_proj.weight.T).split((e, e, s), -1))
    q, k = (layer.kappa[i] * z + layer.mu[i] for i in (0, 1))
    if layer.rope_base is None:
        return u, v, q + 0j, k + 0j
    θ = layer.rope_base ** (-torch.arange(s // 2, dtype=x.dtype) / (s // 2))
    turn = torch.exp(1j * torch.arange(len(x))[:, None] * θ)
    return u, v, torch.complex(*q.chunk(2, -1)) * turn, torch.complex(*k.chunk(2, -1)) * turn


def naive(layer: GAU, x: Tensor) -> Tensor:
    """One document x (T, D), token by token."""
    u, v, q, k = parts(layer, x)
    o = []
    for t in range(len(x)):
        n = t + 1 if layer.causal else len(x)
        scores = (k[:n] @ q[t].conj()).real / math.sqrt(layer.d_key)
        if layer.attention == "relu2":
            weights = scores.clamp(min=0) ** 2 / n
        else:
            weights = (math.log(max(n, 16)) / math.log(512) * scores).softmax(0)
        o.append(weights @ v[:n])
    return (u * torch.stack(o)) @ layer.out.weight.T


@each_way
@each_variant
@pytest.mark.parametrize("queries", [4, 256])
def test_equals_the_formulas(
    kwargs: dict[str, Any], bidirectional: bool, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERIES", queries)
    monkeypatch.setattr(module, "LONG", queries)  # blocks whose scores are computed again
    layer = make(**kwargs, bidirectional=bidirectional)
    x = torch.randn(2, 23, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], torch.stack([naive(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    if not bidirectional:
        first, state = layer(x[:, :9])
        rest, _ = layer(x[:, 9:], state)
        torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-10, atol=1e-10)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((out**2).sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)


@each_way
@each_variant
@pytest.mark.parametrize("padded", [False, True])
def test_documents_in_rows_and_pieces(kwargs: dict[str, Any], bidirectional: bool, padded: bool) -> None:
    """Packed, padded anywhere, and cut anywhere: positions and n are those of the document alone."""
    layer = make(**kwargs, bidirectional=bidirectional)
    T, starts = 40, [[0, 9, 10, 22], [0, 5, 36, 39]]
    x, reset, mask = packed_rows(starts, T, D, 0.8 if padded else None)
    with torch.no_grad():
        expected = torch.cat([naive(layer, x[row, real]) for row, real in documents(starts, mask)])
        for lengths in [[T]] if bidirectional else [[T], [1] * T, [12, 0, 1, 27]]:
            y = run_in_pieces(layer, x, reset, mask if padded else None, lengths)
            torch.testing.assert_close(y[mask], expected, rtol=1e-10, atol=1e-10)


def test_without_a_gate_it_is_attention() -> None:
    """U = 1, from x_1 = 1 times the number at which SiLU is 1; among 512 tokens softmax_plus is softmax."""
    layer = GAU(D, attention="softmax_plus", bidirectional=True, rope_base=None).double()
    x = torch.randn(1, 512, D, dtype=torch.float64)
    x[..., 0] = one = 1.0
    for _ in range(50):
        one = 1 + math.exp(-one)
    with torch.no_grad():
        layer.kappa.normal_(std=2)
        layer.uvz_proj.weight[: layer.d_value] = 0
        layer.uvz_proj.weight[: layer.d_value, 0] = one
        _, v, z = F.silu(layer.uvz_proj(x)).split(layer.sizes, -1)
        q, k = z * layer.kappa[0], z * layer.kappa[1]
        expected = layer.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_with_one_token_in_sight_it_is_a_gated_feed_forward_network() -> None:
    """A = I where the softmax has one token: each by itself in its document."""
    for attention in ("softmax_plus", "relu2"):
        layer = make(attention=attention)
        x = torch.randn(2, 7, D, dtype=torch.float64)
        y, _ = layer(x, reset=torch.ones(2, 7, dtype=torch.bool))
        u, v, z = F.silu(layer.uvz_proj(x)).split(layer.sizes, -1)
        q, k = (layer.kappa[i] * z + layer.mu[i] for i in (0, 1))
        a = 1 if attention == "softmax_plus" else (q * k).sum(-1, keepdim=True).relu() ** 2 / layer.d_key
        torch.testing.assert_close(y, layer.out(u * a * v), rtol=1e-10, atol=1e-10)


@each_way
def test_agrees_with_flash_pytorch(bidirectional: bool) -> None:
    """Its A is relu²(Q K^T / n), of n tokens whatever a row sees: queries make up for that."""
    flash_pytorch = pytest.importorskip("flash_pytorch")
    T = 37
    options: dict[str, Any] = {"add_residual": False, "norm_klass": lambda _: torch.nn.Identity()}
    theirs = flash_pytorch.GAU(dim=D, query_key_dim=8, causal=not bidirectional, **options).double()
    layer = GAU(D, d_key=8, rope_base=None, bidirectional=bidirectional).double()
    with torch.no_grad():
        theirs.rel_pos_bias.relative_attention_bias.weight.zero_()
        for linear in (theirs.to_hidden[0], theirs.to_qk[0], theirs.to_out[0]):
            linear.bias.zero_()
        V, U = theirs.to_hidden[0].weight.chunk(2)
        layer.uvz_proj.weight.copy_(torch.cat((U, V, theirs.to_qk[0].weight)))
        layer.out.weight.copy_(theirs.to_out[0].weight)
        layer.kappa.normal_(std=20)
        theirs.offsetscale.gamma.copy_(layer.kappa)
        theirs.offsetscale.beta.copy_(layer.mu.normal_())
        x = torch.randn(2, T, D, dtype=torch.float64)
        original = layer.scale
        layer.scale = lambda n: original(n) * (8 * n).sqrt() / T  # type: ignore[method-assign]
        torch.testing.assert_close(layer(x)[0], theirs(x), rtol=1e-8, atol=1e-8)


def test_the_state_is_every_token() -> None:
    layer = GAU(D, d_key=4, d_value=5)
    _, state = layer(torch.randn(2, 9, D))
    _, state = layer.step(torch.randn(2, D), state)
    assert isinstance(state, GAUState)
    assert state.k.shape == (2, 10, 4) and state.v.shape == (2, 10, 5)
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[1, 3] = True
    _, state = layer(torch.randn(2, 4, D), state, reset=reset)
    assert state.length.tolist() == [14, 1]
    assert layer.state_size is None


@each_way
@pytest.mark.parametrize("d_model", [64, 768])
def test_the_output_begins_small(d_model: int, bidirectional: bool) -> None:
    """kexue.fm 8934 expects s ν⁶ / n, with ν² = 0.356; scores that share a mean add to that (equations.md 2.9)."""
    layer = GAU(d_model, bidirectional=bidirectional)
    with torch.no_grad():
        y = layer(torch.randn(1, 512, d_model))[0][:, -1 if not bidirectional else slice(None)]
    assert 0.002 < y.square().mean().sqrt() < 0.1


@each_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_variant
def test_low_precision(kwargs: dict[str, Any], dtype: torch.dtype, bidirectional: bool) -> None:
    """Bound and reasons are those of the contract test, which runs the default alone, without flags."""
    layer = GAU(D, **kwargs, bidirectional=bidirectional).to(dtype)
    exact = copy.deepcopy(layer).double()
    x, mask, reset = torch.randn(2, 300, D).to(dtype), torch.rand(2, 300) < 0.9, torch.rand(2, 300) < 0.02
    with torch.no_grad():
        for flags in ({}, {"mask": mask}, {"mask": mask, "reset": reset}):
            y, state = layer(x, **flags)
            wanted = exact(x.double(), **flags)[0]
            error = (y.double() - wanted)[mask].square().mean() / wanted[mask].square().mean()
            assert y.dtype == dtype and error.sqrt() < 10 * torch.finfo(dtype).eps / 2
        with torch.autocast("cpu", dtype):
            assert layer.float()(x.float(), **flags)[0].isfinite().all()
            if not bidirectional:  # a state can go back in
                _, state = layer(x.float(), layer(x.float())[1])
                assert layer(x.float(), state, **flags)[0].isfinite().all()


@each_way
def test_compiles_softmax_plus(bidirectional: bool) -> None:
    layer = GAU(D, attention="softmax_plus", bidirectional=bidirectional)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, flags = torch.randn(2, 6, D), torch.arange(6) < torch.tensor([[6], [4]])
    torch._dynamo.reset()
    with torch.no_grad():
        state = None if bidirectional else layer(torch.randn(2, 5, D))[1]
        expected, _ = layer(x, state, reset=flags, mask=flags)
        torch.testing.assert_close(compiled(x, state, reset=flags, mask=flags)[0], expected)


def test_initialisation_and_defaults() -> None:
    layer = GAU(512)
    assert (layer.d_value, layer.d_key) == (1024, 128)
    assert [GAU(d).d_key for d in (16, 48, 112, 256, 2048)] == [16, 16, 28, 64, 128]
    assert (layer.kappa == 1).all() and not layer.mu.any()
    assert abs(layer.uvz_proj.weight.std().item() * 512**0.5 - 1) < 0.01
    decaying = [p for group in param_groups(layer, 1e-3, 0.1) if group["weight_decay"] for p in group["params"]]
    assert {id(p) for p in decaying} == {id(p) for p in (layer.uvz_proj.weight, layer.out.weight)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_value": 0}, "d_value: expected an integer >= 1, got 0"),
        ({"d_key": -2}, "d_key: expected an integer >= 1, got -2"),
        ({"d_key": 7}, "d_key: rotary positions need an even one, got 7; or set rope_base=None"),
        ({"attention": "relu"}, "attention: expected one of 'relu2', 'softmax_plus', got 'relu'"),
        ({"rope_base": 0.0}, r"rope_base: expected a number > 0 or None, got 0\.0"),
        ({"rope_base": "x"}, "rope_base: expected a number > 0 or None, got 'x'"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GAU(D, **kwargs)


@pytest.mark.parametrize("attention", ["relu2", "softmax_plus"])
def test_torch_func_where_scores_are_computed_again(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linrnn.layers.gau.LONG", 256)
    monkeypatch.setattr("linrnn.layers.softmax_attention.BLOCK", 1)
    layer, x = GAU(D, attention=attention).double(), torch.randn(1, 257, D, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return layer(x)[0].square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected, rtol=1e-9, atol=1e-9)
