"""FLASH against the paper's formulas, document by document; the common properties are in test_contract.py."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import FLASH, GAU, FLASHState
from linrnn.models.optim import param_groups

from .packed import documents, packed_rows, run_in_pieces

D = 16
VARIANTS: list[dict[str, Any]] = [
    {"chunk_size": 4},
    {"chunk_size": 5, "d_key": 6, "d_value": 10},
    {"chunk_size": 3, "rope_base": None, "d_key": 5},
    {"chunk_size": 1},
    {"chunk_size": 256},
]
each_variant = pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
each_way = pytest.mark.parametrize("bidirectional", [False, True])


def make(**kwargs: Any) -> FLASH:
    """A layer whose four maps differ, and whose scores have both signs."""
    layer = FLASH(D, **kwargs).double()
    with torch.no_grad():
        layer.kappa.normal_(std=2)
        layer.mu.normal_()
    return layer


def naive(layer: FLASH, x: Tensor) -> Tensor:
    """One document x (T, D), pair by pair of tokens."""
    T, c, s, e = len(x), layer.chunk_size, layer.d_key, layer.d_value
    u, v, z = (h * h.sigmoid() for h in (x @ layer.uvz_proj.weight.T).split((e, e, s), -1))

    def turned(i: int, t: int) -> Tensor:
        row = layer.kappa[i] * z[t] + layer.mu[i]
        if layer.rope_base is None:
            return torch.complex(row, torch.zeros_like(row))
        θ = layer.rope_base ** (-torch.arange(s // 2, dtype=x.dtype) / (s // 2))
        return torch.complex(*row.chunk(2)) * torch.exp(1j * t * θ)

    o = []
    for t in range(T):
        chunk = t // c
        inside = range(chunk * c, t + 1 if layer.causal else min((chunk + 1) * c, T))
        outside = range(chunk * c) if layer.causal else range(T)
        quadratic = sum(
            ((turned(0, t) * turned(1, j).conj()).real.sum() / s**0.5).clamp(min=0) ** 2 * v[j] for j in inside
        )
        linear = sum(((turned(2, t) * turned(3, j).conj()).real.sum() * v[j] for j in outside), torch.zeros_like(v[0]))
        o.append(quadratic / len(inside) + linear / max(len(outside), 1))
    return (u * torch.stack(o)) @ layer.out.weight.T


@each_way
@each_variant
def test_equals_the_formulas(kwargs: dict[str, Any], bidirectional: bool) -> None:
    layer = make(**kwargs, bidirectional=bidirectional)
    x = torch.randn(2, 14, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], torch.stack([naive(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((out**2).sum(), sources, allow_unused=True) for out in (y, expected))
    for our, their, source in zip(ours, theirs, sources, strict=True):
        their = torch.zeros_like(source) if their is None else their  # one chunk alone reads no q'
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)


@each_way
@each_variant
@pytest.mark.parametrize("padded", [False, True])
def test_documents_in_rows_and_pieces(kwargs: dict[str, Any], bidirectional: bool, padded: bool) -> None:
    """Packed, padded anywhere, and cut anywhere: chunks, positions and counts are those of the document alone."""
    layer = make(**kwargs, bidirectional=bidirectional)
    T, starts = 34, [[0, 9, 10, 22], [0, 5, 30, 33]]
    x, reset, mask = packed_rows(starts, T, D, 0.8 if padded else None)
    x.requires_grad_()
    their = torch.cat([layer(x[row, real][None])[0][0] for row, real in documents(starts, mask)])
    (their_grad,) = torch.autograd.grad((their**2).sum(), x)

    for lengths in [[T]] if bidirectional else [[T], [1] * T, [12, 0, 1, 21]]:
        our = run_in_pieces(layer, x, reset, mask if padded else None, lengths)[mask]
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)
        (our_grad,) = torch.autograd.grad((our**2).sum(), x)
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("state_of", [0, 3, 7, 8, 9, 19])
def test_states_of_pieces(state_of: int) -> None:
    """Of whichever pieces, also their gradients: the contract test has no chunk that ends."""
    layer, T = make(chunk_size=4), 25
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    _, state = layer(torch.randn(2, state_of, D, dtype=torch.float64))
    state = FLASHState(*(leaf.detach().requires_grad_() for leaf in state))
    weights = [torch.randn_like(leaf) for leaf in state]
    results = []
    for lengths in ([T], [1] * T, [3, 9, 13], [0, 16, 9]):
        final, ys = state, []
        for piece in x.split(lengths, 1):
            y, final = layer(piece, final)
            ys.append(y)
        y = torch.cat(ys, 1)
        loss = (y**2).sum() + sum((w * leaf).sum() for w, leaf in zip(weights, final, strict=True))
        results.append([y, *final, *torch.autograd.grad(loss, (x, *state[:3], *layer.parameters()))])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_up_to_a_chunk_it_is_gau() -> None:
    layer, gau = make(chunk_size=9), GAU(D).double()
    gau.load_state_dict({name: p[:2] if name in ("kappa", "mu") else p for name, p in layer.state_dict().items()})
    x = torch.randn(2, 12, D, dtype=torch.float64)
    y, expected = layer(x)[0], gau(x)[0]
    torch.testing.assert_close(y[:, :9], expected[:, :9], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y[:, 9:], expected[:, 9:])


def test_the_state_is_two_sums_and_the_open_chunk() -> None:
    layer = FLASH(D, chunk_size=8, d_key=4, d_value=5)
    state = layer.init_state(2)
    sizes = []
    for length in (3, 5, 7, 30):
        _, state = layer(torch.randn(2, length, D), state)
        assert isinstance(state, FLASHState)
        sizes.append((state.chunks[0].item(), state.length[0].item()))
        assert (state.k[0].abs().sum(1) > 0).sum() == state.length[0]
        assert state.S[:, 1].any() == (state.length[0] > 0)
    assert sizes == [(0, 3), (1, 0), (1, 7), (5, 5)]
    assert layer.state_size == 2 * 4 * 5 + 7 * (4 + 5) + 2


@each_way
def test_agrees_with_flash_pytorch(bidirectional: bool) -> None:
    """Its quadratic part is relu²(Q K^T / c), the causal linear one is divided by c alone: maps make up for that.

    Both ways, in whole chunks, it is the same then; causal the linear part is, but for a factor of g - 1.
    """
    flash_pytorch = pytest.importorskip("flash_pytorch")
    T, c, s = 20, 5, 8
    options: dict[str, Any] = {"group_size": c, "query_key_dim": s, "norm_klass": lambda _: torch.nn.Identity()}
    theirs = flash_pytorch.FLASH(dim=D, causal=not bidirectional, **options).double()
    layer = FLASH(D, d_key=s, chunk_size=c, rope_base=None, bidirectional=bidirectional).double()
    with torch.no_grad():
        theirs.rel_pos_bias.relative_attention_bias.weight.zero_()
        for linear in (theirs.to_hidden[0], theirs.to_qk[0], theirs.to_out):
            linear.bias.zero_()
        V, U = theirs.to_hidden[0].weight.chunk(2)
        layer.uvz_proj.weight.copy_(torch.cat((U, V, theirs.to_qk[0].weight)))
        layer.out.weight.copy_(theirs.to_out.weight)
        layer.kappa.normal_(std=3)
        layer.mu.normal_()
        order = [0, 2, 1, 3]  # theirs are q, q', k, k'
        theirs.qk_offset_scale.gamma.copy_(layer.kappa[order])
        theirs.qk_offset_scale.beta.copy_(layer.mu[order])
        x = torch.randn(2, T, D, dtype=torch.float64)
        if bidirectional:
            # relu²(q k / √s) / c = relu²(√(c / s) q k / c)
            for p in (theirs.qk_offset_scale.gamma, theirs.qk_offset_scale.beta):
                p[0] *= (c / s) ** 0.5
            torch.testing.assert_close(layer(x)[0], theirs(x) - x, rtol=1e-9, atol=1e-9)
            return
        for p in (layer.kappa, layer.mu):
            p[0] = 0  # the linear part alone
        theirs.qk_offset_scale.gamma[0] = theirs.qk_offset_scale.beta[0] = 0
        before = (torch.arange(T) // c).clamp(min=1)[None, :, None]
        torch.testing.assert_close(layer(x)[0] * before, theirs(x) - x, rtol=1e-9, atol=1e-9)


@each_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_variant
def test_low_precision(kwargs: dict[str, Any], dtype: torch.dtype, bidirectional: bool) -> None:
    """Bound and reasons are those of the contract test, which runs the default alone, without flags."""
    layer = FLASH(D, **kwargs, bidirectional=bidirectional).to(dtype)
    exact = copy.deepcopy(layer).double()
    x, mask, reset = torch.randn(2, 60, D).to(dtype), torch.rand(2, 60) < 0.9, torch.rand(2, 60) < 0.02
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
def test_compiles(bidirectional: bool) -> None:
    """What the contract test does not reach: more than one chunk."""
    layer = FLASH(D, chunk_size=4, bidirectional=bidirectional)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, flags = torch.randn(2, 14, D), torch.arange(14) < torch.tensor([[14], [4]])
    torch._dynamo.reset()
    with torch.no_grad():
        state = None if bidirectional else layer(torch.randn(2, 5, D))[1]
        expected, _ = layer(x, state, reset=~flags, mask=flags)
        torch.testing.assert_close(compiled(x, state, reset=~flags, mask=flags)[0], expected)


def test_initialisation_and_defaults() -> None:
    layer = FLASH(512)
    assert (layer.d_value, layer.d_key, layer.chunk_size) == (1024, 128, 256)
    assert (layer.kappa[:2] == 1).all() and (layer.kappa[2:] == 128**-0.25).all() and not layer.mu.any()
    decaying = [p for group in param_groups(layer, 1e-3, 0.1) if group["weight_decay"] for p in group["params"]]
    assert {id(p) for p in decaying} == {id(p) for p in (layer.uvz_proj.weight, layer.out.weight)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
        ({"d_value": 0}, "d_value: expected an integer >= 1, got 0"),
        ({"d_key": 7}, "d_key: rotary positions need an even one, got 7; or set rope_base=None"),
        ({"rope_base": -1.0}, r"rope_base: expected a number > 0 or None, got -1\.0"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FLASH(D, **kwargs)
