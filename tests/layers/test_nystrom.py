"""Nyström attention against the paper's formulas, softmax attention, transformers and nystrom-attention.

The common properties are in test_contract.py.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import Nystrom

from .packed import documents, packed_rows

D = 16
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_landmarks": 3},
    {"n_landmarks": 4, "n_heads": 2, "conv_width": 3},
    {"n_landmarks": 1, "conv_width": None, "n_iterations": 2},
]
each_variant = pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "default")


def make(**kwargs: Any) -> Nystrom:
    """A layer whose attention is far from uniform."""
    layer = Nystrom(D, **kwargs).double()
    with torch.no_grad():
        layer.qkv.weight[: 2 * D] *= 2
    return layer


def naive(layer: Nystrom, x: Tensor) -> Tensor:
    """One document x (T, D), head by head."""
    T, H = len(x), layer.n_heads
    m = min(layer.n_landmarks, T)
    K = D // H
    outs = []
    for h in range(H):
        q, k, v = (x @ layer.qkv.weight[i * D + h * K : i * D + (h + 1) * K].T for i in range(3))
        segments = [[t for t in range(T) if t * m // T == i] for i in range(m)]
        q_m, k_m = (torch.stack([z[segment].mean(0) for segment in segments]) for z in (q, k))
        left, A, right = ((a @ b.T / K**0.5).softmax(-1) for a, b in ((q, k_m), (q_m, k_m), (q_m, k)))
        Z = A.T / (A.abs().sum(0).max() * A.abs().sum(1).max())
        eye = torch.eye(m, dtype=x.dtype)
        for _ in range(layer.n_iterations):
            Z = Z @ (13 * eye - A @ Z @ (15 * eye - A @ Z @ (7 * eye - A @ Z))) / 4
        o = left @ Z @ right @ v
        if layer.conv is not None:
            W = layer.conv.shape[1]
            for t in range(T):
                near = [(j, t + j - W // 2) for j in range(W) if 0 <= t + j - W // 2 < T]
                o = o.index_add(0, torch.tensor([t]), sum(layer.conv[h, j] * v[s] for j, s in near)[None])
        outs.append(o)
    return torch.cat(outs, -1) @ layer.out.weight.T


@each_variant
@pytest.mark.parametrize("T", [1, 2, 12, 23])
def test_equals_the_formulas(kwargs: dict[str, Any], T: int) -> None:
    layer = make(**kwargs)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], torch.stack([naive(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((out**2).sum(), sources, materialize_grads=True) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


@each_variant
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_documents_in_rows(
    kwargs: dict[str, Any], padded: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and padded anywhere: landmarks are means of tokens of one document, as many as the document alone has."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    layer = make(**kwargs)
    starts = [[0, 9, 10, 22], [0, 5, 36, 39]]
    x, reset, mask = packed_rows(starts, 40, D, 0.8 if padded else None)
    x.requires_grad_()
    our = layer(x, reset=reset, mask=mask if padded else None)[0][mask]
    their = torch.cat([naive(layer, x[row, real]) for row, real in documents(starts, mask)])
    torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)
    our_grad, their_grad = (torch.autograd.grad((out**2).sum(), x)[0] for out in (our, their))
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-6)


def test_with_a_landmark_for_each_token_it_is_softmax_attention() -> None:
    x = torch.randn(2, 30, D, dtype=torch.float64)
    errors = []
    for n_iterations in (2, 6, 12, 24):
        torch.manual_seed(1)
        layer = Nystrom(D, n_landmarks=30, n_iterations=n_iterations, conv_width=None).double()
        q, k, v = (t.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        expected = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        errors.append(((layer(x)[0] - expected).abs().max() / expected.abs().max()).item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-8


def test_agrees_with_transformers() -> None:
    """With the norm of each head's own matrix, as in the paper; theirs by default is the largest of the whole batch."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = transformers.NystromformerConfig(
        hidden_size=D,
        num_attention_heads=2,
        num_landmarks=8,
        segment_means_seq_len=48,
        conv_kernel_size=5,
        attention_probs_dropout_prob=0.0,
    )
    theirs = NystromformerSelfAttention(config).eval().double()
    theirs.init_option = "exact"
    layer = Nystrom(D, n_heads=2, n_landmarks=8, conv_width=5).double()
    with torch.no_grad():
        for linear in (theirs.query, theirs.key, theirs.value):
            linear.bias.zero_()
            linear.weight *= 8  # far from uniform
        layer.qkv.weight.copy_(torch.cat([linear.weight for linear in (theirs.query, theirs.key, theirs.value)]))
        layer.conv.copy_(theirs.conv.weight.view(2, 5))
        layer.out.weight.copy_(torch.eye(D))
        x = torch.randn(3, 48, D, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[0], theirs(x)[0], rtol=1e-8, atol=1e-8)


def test_agrees_with_nystrom_attention() -> None:
    """One sequence and one head, since its norm too is that of the whole batch."""
    nystrom_attention = pytest.importorskip("nystrom_attention")
    theirs = nystrom_attention.NystromAttention(
        D, dim_head=D, heads=1, num_landmarks=8, residual_conv_kernel=7
    ).double()
    layer = Nystrom(D, n_heads=1, n_landmarks=8, conv_width=7).double()
    with torch.no_grad():
        layer.qkv.weight.copy_(theirs.to_qkv.weight)
        layer.out.weight.copy_(theirs.to_out[0].weight)
        theirs.to_out[0].bias.zero_()
        layer.conv.copy_(theirs.res_conv.weight.view(1, 7))
        x = torch.randn(1, 48, D, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[0], theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Z magnifies what is rounded: beside weights, projections and output nothing is, to the unit roundoff each."""
    layer = Nystrom(D, n_landmarks=16, conv_width=None).to(dtype)
    exact = copy.deepcopy(layer).double()
    x, mask, reset = torch.randn(2, 300, D).to(dtype), torch.rand(2, 300) < 0.9, torch.rand(2, 300) < 0.02
    with torch.no_grad():
        for flags in ({}, {"mask": mask}, {"mask": mask, "reset": reset}):
            y, wanted = layer(x, **flags)[0], exact(x.double(), **flags)[0]
            error = (y.double() - wanted)[mask].square().mean() / wanted[mask].square().mean()
            assert y.dtype == dtype and error.sqrt() < torch.finfo(dtype).eps


def test_other_rows_and_heads_change_nothing() -> None:
    layer = make(n_landmarks=4)
    x = torch.randn(3, 20, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0][1:2], layer(x[1:2])[0], rtol=1e-10, atol=1e-10)


def test_packed_rows_have_as_many_landmarks_as_their_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        sizes.append((q.shape[2], k.shape[2]))
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer, reset = Nystrom(D, n_landmarks=4), torch.zeros(2, 30, dtype=torch.bool)
    reset[0, [10, 13]] = True  # documents of 10, 3 and 17 tokens
    layer(torch.randn(2, 30, D))
    layer(torch.randn(2, 30, D), reset=reset)
    assert sizes == [(4, 30), (30, 4), (11, 30), (30, 11)]


def test_it_has_no_causal_form() -> None:
    for kwargs in ({"causal": True}, {"bidirectional": False}):
        with pytest.raises(
            ValueError, match=r"causal, bidirectional: expected False and True, got .*: a landmark is a mean"
        ):
            Nystrom(D, **kwargs)
    layer = Nystrom(D)
    assert layer.state_size is None
    with pytest.raises(ValueError, match="step: a bidirectional layer"):
        layer.step(torch.zeros(2, D), None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_heads": 3}, "n_heads: expected a divisor of 16, got 3"),
        ({"n_landmarks": 0}, "n_landmarks: expected an integer >= 1, got 0"),
        ({"n_iterations": 0}, "n_iterations: expected an integer >= 1, got 0"),
        ({"conv_width": 32}, "conv_width: expected an odd number, as a centred filter has, got 32"),
        ({"conv_width": 0}, "conv_width: expected an integer >= 1, got 0"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nystrom(D, **kwargs)
