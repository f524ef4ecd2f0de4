"""Every option of attention against its formula, written with the distance of each pair of tokens."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import Attention, build
from linrnn.layers.attention_scale import LogN
from linrnn.layers.online_softmax import absorb, read_out, softmax_sum
from linrnn.layers.positions import ALiBi, Interpolation, ReRoPE, RoPE

D = 24
HALF = {"n_heads": 4, "half_causal": True, "bidirectional": True}
# name: (arguments, the logits' factor by the number of keys a query sees)
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Any]]] = {
    "grouped queries": ({"n_heads": 4, "n_kv_heads": 2}, lambda n: 6**-0.5),
    "one key head": ({"n_heads": 4, "n_kv_heads": 1, "positions": "alibi"}, lambda n: 6**-0.5),
    "narrow heads": ({"n_heads": 4, "d_head": 4, "n_kv_heads": 2, "out_bias": True}, lambda n: 4**-0.5),
    "interpolation": ({"n_heads": 3, "positions": RoPE(scaling=Interpolation(4))}, lambda n: 8**-0.5),
    "alibi": ({"n_heads": 3, "positions": "alibi"}, lambda n: 8**-0.5),
    "nope": ({"n_heads": 3, "positions": "nope"}, lambda n: 8**-0.5),
    "scale": ({"n_heads": 2, "scale": 0.7}, lambda n: 0.7),
    "log n": ({"n_heads": 2, "scale": "logn"}, lambda n: n.log() / math.log(512) * 12**-0.5),
    "log n, retrofitted": (
        {"n_heads": 2, "scale": LogN(4, retrofit=True), "window": 9},
        lambda n: (n.log() / math.log(4)).clamp(min=1) * 12**-0.5,
    ),
    "gradient": ({"n_heads": 2, "scale": "gradient"}, lambda n: 0.84 * n.log().sqrt() * 12**-0.5),
    "qk norm and bias": ({"n_heads": 2, "qk_norm": "qk", "qk_bias": True}, lambda n: 12**-0.5),
    "key norm": ({"n_heads": 2, "qk_norm": "key"}, lambda n: 1.0),
    "cosines": ({"n_heads": 2, "qk_norm": "cos"}, lambda n: 4 * n.log()),
    "cosines, gradient": ({"n_heads": 2, "qk_norm": "cos", "scale": "gradient", "window": 5}, lambda n: 3.5 * n.log()),
    "window": ({"n_heads": 4, "n_kv_heads": 2, "window": 5}, lambda n: 6**-0.5),
    "window of one": ({"n_heads": 2, "window": 1}, lambda n: 12**-0.5),
    "window, alibi": ({"n_heads": 3, "window": 4, "positions": ALiBi()}, lambda n: 8**-0.5),
    "sink": ({"n_heads": 2, "window": 4, "sink": 2}, lambda n: 12**-0.5),
    "window of one, sink": ({"n_heads": 2, "window": 1, "sink": 3}, lambda n: 12**-0.5),
    "wide sink": (
        {"n_heads": 3, "window": 2, "sink": 5, "positions": "alibi", "scale": "gradient"},
        lambda n: 0.84 * n.log().sqrt() * 8**-0.5,
    ),
    "rerope": ({"n_heads": 4, "n_kv_heads": 2, "positions": ReRoPE(4)}, lambda n: 6**-0.5),
    "leaky rerope": ({"n_heads": 2, "positions": ReRoPE(4, leak=3.0), "scale": 0.4}, lambda n: 0.4),
    "half causal": (HALF, lambda n: 6**-0.5),
    "half causal, window": (HALF | {"n_kv_heads": 2, "window": 3}, lambda n: 6**-0.5),
    "half causal, alibi": (HALF | {"positions": "alibi"}, lambda n: 6**-0.5),
    "half causal, log n": (HALF | {"scale": "logn", "n_kv_heads": 2}, lambda n: n.log() / math.log(512) * 6**-0.5),
    "half causal, gradient": (HALF | {"scale": "gradient", "window": 4}, lambda n: 0.84 * n.log().sqrt() * 6**-0.5),
    "half causal, cosines": (HALF | {"qk_norm": "cos", "positions": "alibi"}, lambda n: 4 * n.log()),
}
STEPPABLE = [name for name in VARIANTS if "half" not in name]
EITHER = [name for name in STEPPABLE if "sink" not in name and "rerope" not in name]
WAYS = [(name, False) for name in VARIANTS] + [(name, True) for name in EITHER]
each_way = pytest.mark.parametrize(("name", "bidirectional"), WAYS)


def make(name: str, bidirectional: bool = False, dtype: torch.dtype = torch.float64) -> Attention:
    kwargs = VARIANTS[name][0] | ({"bidirectional": True} if bidirectional else {})
    layer = build("attention", D, **kwargs)
    assert isinstance(layer, Attention)
    for p in layer.parameters():  # biases and gains have values of their own
        p.data += 0.3 * torch.randn_like(p)
    return layer.to(dtype)


def naive(layer: Attention, x: Tensor, name: str) -> Tensor:
    """Maps one document x (T, D) to y (T, D)."""
    T, (H, G) = len(x), (layer.n_heads, layer.n_heads // layer.n_kv_heads)
    K = layer.d_head
    q, k, v = (x @ layer.qkv.weight.T).view(T, -1, K).split((H, H // G, H // G), 1)
    if layer.qk_bias is not None:
        q, k = q + layer.qk_bias[:H], k + layer.qk_bias[H:]
    if layer.qk_norm == "qk":
        q = q / (q.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.k_norm.weight
    if layer.qk_norm in ("key", "cos"):
        k = k / k.norm(dim=-1, keepdim=True)
    if layer.qk_norm == "cos":
        q = q / q.norm(dim=-1, keepdim=True)
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)

    d = torch.arange(T)[:, None] - torch.arange(T)
    seen = torch.ones(H, T, T, dtype=torch.bool)
    if layer.half_causal:
        seen[: H // 2] &= d >= 0
        seen[H // 2 :] &= d <= 0
    elif layer.causal:
        seen &= d >= 0
    if layer.window is not None:
        seen &= (d.abs() < layer.window) | (torch.arange(T) < layer.sink)
    positions, turn = layer.positions, d.double()
    if isinstance(positions, ReRoPE):
        w = positions.window
        turn = torch.where(d < w, turn, w + (0.0 if positions.leak is None else 1 / positions.leak) * (turn - w))
    elif isinstance(positions, RoPE):
        turn = turn / (positions.scaling.factor if isinstance(positions.scaling, Interpolation) else 1)
    else:
        turn = turn * 0
    θ = 10000.0 ** (-2 * torch.arange(K // 2, dtype=x.dtype) / K)
    qc, kc = (torch.complex(u[..., : K // 2], u[..., K // 2 :]) for u in (q, k))
    logits = torch.einsum("ihk,jhk,ijk->hij", qc, kc.conj(), torch.exp(1j * turn[..., None] * θ)).real
    factor = VARIANTS[name][1](seen.sum(-1).double())  # (H, T)
    logits = logits * (factor[..., None] if isinstance(factor, Tensor) else factor)
    if isinstance(positions, ALiBi):
        slopes = [2**-4, 2**-8, 2**-2] if H == 3 else [2**-2, 2**-4, 2**-6, 2**-8]
        logits = logits - torch.tensor(slopes)[:, None, None] * d.abs()
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    y = torch.einsum("hij,jhk->ihk", p, v).reshape(T, H * K) @ layer.out.weight.T
    return y if layer.out.bias is None else y + layer.out.bias


def documents(reset: Tensor, mask: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields the row and the columns of each document's real tokens."""
    for row in range(len(mask)):
        number = reset[row].cumsum(0)
        for i in range(int(number[-1]) + 1):
            columns = ((number == i) & mask[row]).nonzero()[:, 0]
            if len(columns):
                yield row, columns


def by_formula(layer: Attention, x: Tensor, reset: Tensor, mask: Tensor, name: str) -> Tensor:
    y = torch.zeros_like(x)
    for row, columns in documents(reset, mask):
        y = y.index_put((torch.tensor(row), columns), naive(layer, x[row, columns], name))
    return y


def in_pieces(layer: Attention, x: Tensor, reset: Tensor | None, mask: Tensor | None, lengths: list[int]) -> Tensor:
    ys, state, a = [], None, 0
    for n in lengths:
        flags = {k: None if f is None else f[:, a : a + n] for k, f in (("reset", reset), ("mask", mask))}
        y, state = layer(x[:, a : a + n], state, **flags)
        ys.append(y)
        a += n
    return torch.cat(ys, 1)


def gradients(layer: Attention, y: Tensor, x: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]))


def flags(B: int, T: int) -> tuple[Tensor, Tensor]:
    mask = torch.rand(B, T) < torch.linspace(1, 0.5, B)[:, None]
    return torch.rand(B, T) < 0.15, mask


@each_way
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_formula(name: str, bidirectional: bool, packed: bool) -> None:
    layer, x = make(name, bidirectional), torch.randn(3, 21, D, dtype=torch.float64, requires_grad=True)
    reset, mask = flags(3, 21) if packed else (torch.zeros(3, 21).bool(), torch.ones(3, 21).bool())
    expected = by_formula(layer, x, reset, mask, name)
    grads = gradients(layer, expected, x)
    runs = [lambda: layer(x, reset=reset, mask=mask)[0] if packed else layer(x)[0]]
    if layer.causal:
        given = (reset, mask) if packed else (None, None)
        runs.append(lambda: in_pieces(layer, x, *given, [4, 0, 1, 9, 7]))
        runs.append(lambda: in_pieces(layer, x, *given, [1] * 21))
    for run in runs[:2]:
        y = torch.where(mask[..., None], run(), 0)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(gradients(layer, y, x), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # the append-only cache
        for run in runs[1:]:
            torch.testing.assert_close(torch.where(mask[..., None], run(), 0), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"scale": "logn"}, {"scale": "gradient", "window": 4}, {"qk_norm": "cos"}], ids=str
)
def test_half_causal_heads_are_causal_ones(options: dict[str, Any]) -> None:
    """The first half is that of the causal layer with the same weights, the other that of the flipped sequence."""
    half = Attention(16, n_heads=2, bidirectional=True, half_causal=True, positions=None, **options).double()
    causal = Attention(16, n_heads=2, positions=None, **options).double()
    causal.load_state_dict(half.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for layer in (half, causal):
        layer.out.weight.data.copy_(torch.eye(16))
    with torch.no_grad():
        y, past, future = half(x)[0], causal(x)[0], causal(x.flip(1))[0].flip(1)
    torch.testing.assert_close(y[..., :8], past[..., :8], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[..., 8:], future[..., 8:], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's fused attention under vmap
@pytest.mark.parametrize("kwargs", [{"window": 16}, {"positions": "alibi"}, {"dropout": 0.5}], ids=str)
def test_torch_func_over_blocks(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func knows no hooks of saved tensors, with which a block would be computed again."""
    monkeypatch.setattr("linrnn.layers.softmax_attention.BLOCK", 1)
    layer, x = Attention(32, n_heads=2, **kwargs).double(), torch.randn(2, 17, 32, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return layer(x)[0].square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-10, atol=1e-10)
    if not layer.dropout:
        each = torch.func.vmap(torch.func.grad(lambda row: layer(row[None])[0].square().sum()))(x)
        torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_of_blocks_is_drawn_again(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass drops what the forward pass has dropped: the gradient is that of finite differences."""
    monkeypatch.setattr("linrnn.layers.softmax_attention.BLOCK", 1)
    layer = Attention(16, n_heads=2, dropout=0.5, bidirectional=bidirectional).double()
    x, way = torch.randn(2, 2, 40, 16, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return layer(x)[0].square().sum()

    slope = (torch.autograd.grad(loss(x.requires_grad_()), x)[0] * way).sum()
    with torch.no_grad():
        differences = (loss(x + 1e-5 * way) - loss(x - 1e-5 * way)) / 2e-5
    torch.testing.assert_close(slope, differences, rtol=1e-6, atol=1e-6)


@each_way
@pytest.mark.parametrize("kind", ["mask", "reset"])
def test_one_of_the_flags(name: str, bidirectional: bool, kind: str) -> None:
    layer, x = make(name, bidirectional), torch.randn(2, 15, D, dtype=torch.float64)
    reset, mask = flags(2, 15)
    reset, mask = (reset, torch.ones_like(mask)) if kind == "reset" else (torch.zeros_like(reset), mask)
    given = {kind: reset if kind == "reset" else mask}
    with torch.no_grad():
        expected = by_formula(layer, x, reset, mask, name)
        torch.testing.assert_close(layer(x, **given)[0][mask], expected[mask], rtol=1e-10, atol=1e-10)


@each_way
def test_blocks_of_queries(name: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(name, bidirectional), torch.randn(2, 63, D, dtype=torch.float64, requires_grad=True)
    reset, mask = flags(2, 63)
    results = []
    for block in (2**23, 1):  # as many as 63 tokens, or the 16 that a block has at least
        monkeypatch.setattr("linrnn.layers.softmax_attention.BLOCK", block)
        for given in ({}, {"reset": reset, "mask": mask}):
            y = layer(x, **given)[0]
            results.append([y, *gradients(layer, y, x)])
    for whole, blocks in zip(results[:2], results[2:], strict=True):
        for ours, theirs in zip(blocks, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", STEPPABLE)
def test_streamed_blocks_equal_forward(name: str) -> None:
    layer, x = make(name), torch.randn(2, 17, D, dtype=torch.float64)
    position = torch.arange(17)
    with torch.no_grad():
        q, k, v = layer.project(x, position[None])
        total = softmax_sum(q, layer.d_head)
        for keys in position.split((5, 1, 3, 8)):
            logits = layer.scores(q, k[:, keys], position, keys)
            total = absorb(total, logits.masked_fill(~layer.visible(position, keys), -torch.inf), v[:, keys])
        torch.testing.assert_close(layer.merge(read_out(total)), layer(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in STEPPABLE if "window" in VARIANTS[name][0]])
def test_state_of_a_window_has_a_fixed_size(name: str) -> None:
    layer = make(name, dtype=torch.float32)
    rows = layer.window - 1 + layer.sink
    assert layer.state_size == 2 * rows * layer.n_kv_heads * layer.d_head + 1
    state = layer.init_state(2)
    shapes = [None if leaf is None else leaf.shape for leaf in state]
    with torch.no_grad():
        for T in (1, 2, 1, 63, 1, 1, 1, 200, 1):
            _, state = layer(torch.randn(2, T, D), state)
            assert [None if leaf is None else leaf.shape for leaf in state] == shapes
            for leaf in (state.k, state.v):
                assert leaf.untyped_storage().nbytes() <= max(2 * leaf.nbytes, 4096)


@pytest.mark.parametrize("name", [name for name in STEPPABLE if "window" in VARIANTS[name][0]])
@pytest.mark.parametrize("T", [3, 21])
def test_state_of_a_window_is_what_was_seen(name: str, T: int) -> None:
    """However the calls were cut: also where a document has fewer tokens than the window or the sinks."""
    layer, x = make(name), torch.randn(4, T, D, dtype=torch.float64)
    both = dict(zip(("reset", "mask"), flags(4, T), strict=True))
    for kinds in ({"reset"}, {"mask"}, {"reset", "mask"}):
        given = {kind: both[kind] for kind in kinds}
        with torch.no_grad():
            whole, pieces = layer(x, **given)[1], layer.init_state(4)
            for t in range(T):
                pieces = layer(x[:, t : t + 1], pieces, **{k: f[:, t : t + 1] for k, f in given.items()})[1]
        for ours, theirs in zip(pieces, whole, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["wide sink", "leaky rerope", "half causal, alibi", "cosines", "qk norm and bias"])
def test_gradcheck(name: str) -> None:
    layer, x = make(name), torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask)[0][mask], x, fast_mode=True)


@pytest.mark.parametrize(
    "name", ["wide sink", *(pytest.param(n, marks=pytest.mark.slow) for n in ("leaky rerope", "half causal, window"))]
)
def test_traces_without_breaks(name: str) -> None:
    layer, x = make(name, dtype=torch.float32), torch.randn(2, 6, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask, state = torch.arange(6) < torch.tensor([[6], [4]]), None
    if layer.causal:
        with torch.no_grad():
            state = layer(x)[1]
    y, expected = compiled(x, state, mask=mask)[0][mask], layer(x, state, mask=mask)[0][mask]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


# the bound of test_contract.py: about ten roundings, each by half an eps
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["alibi", "sink", "leaky rerope", "half causal", "cosines", "qk norm and bias"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    layer = make(name, dtype=dtype)
    x = torch.randn(1, 600, D).to(dtype)
    with torch.no_grad():
        y, exact = layer(x)[0], copy.deepcopy(layer).double()(x.double())[0]
    assert y.dtype == dtype
    assert ((y - exact).norm() / exact.norm()).item() < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["sink", "leaky rerope", "cosines", "qk norm and bias"])
def test_autocast(name: str) -> None:
    layer, x = make(name, dtype=torch.float32), torch.randn(2, 20, D)
    expected = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x[:, :12])
        ys = [y]
        for t in range(12, 20):
            y_t, state = layer.step(x[:, t], state)
            ys.append(y_t[:, None])
    y = torch.cat(ys, 1)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert ((y - expected).norm() / expected.norm()).item() < 10 * 2**-8


def test_half_causal_cannot_step() -> None:
    layer = make("half causal")
    assert layer(torch.randn(1, 5, D, dtype=torch.float64))[1] is None
    with pytest.raises(ValueError, match="step: a bidirectional layer"):
        layer.step(torch.randn(1, D, dtype=torch.float64), None)
