"""Attention against the formula written out; the common properties are in test_contract.py."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import Attention
from linrnn.layers.positions import NoPE, Positions, ReRoPE, RoPE
from linrnn.layers.rotary import rotate


def naive(layer: Attention, x: Tensor) -> Tensor:
    """Softmax attention over one sequence x (T, D), pair by pair of tokens, with complex rotations."""
    T, D = x.shape
    H, K = layer.n_heads, D // layer.n_heads
    q, k, v = ((x @ W.T).view(T, H, K) for W in layer.qkv.weight.chunk(3))
    rope = isinstance(layer.positions, RoPE)
    frequency = layer.positions.base ** (-2 * torch.arange(K // 2, dtype=x.dtype) / K) if rope else 0

    def turned(z: Tensor, t: int) -> Tensor:
        return torch.complex(z[: K // 2], z[K // 2 :]) * torch.exp(1j * t * torch.as_tensor(frequency))

    o = torch.zeros(T, H, K, dtype=x.dtype)
    for h in range(H):
        for t in range(T):
            seen = range(t + 1) if layer.causal else range(T)
            logits = [(turned(q[t, h], t) * turned(k[j, h], j).conj()).real.sum() / math.sqrt(K) for j in seen]
            weights = torch.stack(logits).softmax(0)
            o[t, h] = sum(w * v[j, h] for w, j in zip(weights, seen, strict=True))
    return o.view(T, D) @ layer.out.weight.T


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("positions", [RoPE(), RoPE(base=50.0), NoPE()])
def test_equals_the_formula(bidirectional: bool, positions: Positions) -> None:
    layer = Attention(16, n_heads=2, positions=positions, bidirectional=bidirectional).double()
    x = torch.randn(7, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[None])[0][0], naive(layer, x), rtol=1e-10, atol=1e-10)


def test_rotation_keeps_norms_and_depends_on_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 1, 16, dtype=torch.float64)

    def score(m: int, n: int) -> Tensor:
        return (rotate(q, torch.tensor([[m]]), 10000.0) * rotate(k, torch.tensor([[n]]), 10000.0)).sum()

    torch.testing.assert_close(score(5, 2), score(1005, 1002), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(score(5, 2), score(5, 3))
    torch.testing.assert_close(rotate(q, torch.tensor([[77]]), 10000.0).norm(), q.norm())
    torch.testing.assert_close(rotate(q, torch.tensor([[0]]), 10000.0), q)


def test_without_positions_the_order_does_not_matter() -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    order = torch.randperm(9)
    for positions in ("nope", "rope"):
        layer = Attention(16, positions=positions, bidirectional=True).double()
        assert torch.allclose(layer(x)[0][:, order], layer(x[:, order])[0]) == (positions == "nope")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_plain_calls_make_no_mask(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer = Attention(16, bidirectional=bidirectional)
    layer(torch.randn(2, 9, 16))
    layer(torch.randn(2, 9, 16), mask=torch.ones(2, 9, dtype=torch.bool))
    assert calls[0]["attn_mask"] is None
    assert calls[0]["is_causal"] is calls[1]["is_causal"] is not bidirectional
    mask = calls[1]["attn_mask"]
    assert mask.numel() == 2 * 9 if bidirectional else mask is None  # padding alone: a row of keys, or none


def test_cache_holds_each_token_once() -> None:
    layer = Attention(32)
    _, state = layer(torch.randn(2, 9, 32))
    _, state = layer.step(torch.randn(2, 32), state)
    assert state.k.shape == state.v.shape == (2, 10, 2, 16)
    assert state.position.tolist() == [10, 10]
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[1, 3] = True
    _, state = layer(torch.randn(2, 4, 32), state, reset=reset)
    assert state.position.tolist() == [14, 1]


def test_dropout_in_training_only() -> None:
    layer, x = Attention(16, dropout=0.5), torch.randn(2, 9, 16)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("d_model", range(16, 1025, 16))
def test_default_heads(d_model: int) -> None:
    layer = Attention(d_model)
    assert 16 <= layer.d_head <= 64 and layer.d_head % 2 == 0
    assert layer.n_heads * layer.d_head == d_model
    assert layer.n_heads >= min(4, d_model // 16)


def test_width_of_the_heads() -> None:
    assert Attention(48, d_head=12).n_heads == 4
    layer = Attention(48, n_heads=5, d_head=6, out_bias=True)
    assert layer(torch.randn(2, 0, 48))[0].shape == (2, 0, 48)
    assert (layer.out.in_features, layer.out.out_features, layer.out.bias.shape) == (30, 48, (48,))


def test_causal_false_is_bidirectional() -> None:
    x = torch.randn(2, 9, 16)
    one, other = Attention(16, causal=False), Attention(16, bidirectional=True)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x)[0], other(x)[0])
    for causal, bidirectional in ((True, True), (False, False)):  # one that looks ahead is enough
        assert not Attention(16, causal=causal, bidirectional=bidirectional).causal


@pytest.mark.parametrize(
    ("d_model", "kwargs", "message"),
    [
        (16, {"n_heads": 0}, "n_heads: expected an integer >= 1, got 0"),
        (16, {"n_heads": 3}, "n_heads: expected a divisor of d_model = 16, got 3"),
        (15, {"n_heads": 5}, "n_heads: rotary positions turn an even number of channels, got 3"),
        (16, {"d_head": 3}, "d_head: expected a divisor of d_model = 16, got 3"),
        (16, {"n_heads": 2, "d_head": 0}, "d_head: expected an integer >= 1, got 0"),
        (17, {}, "n_heads: no even head width .* divides d_model = 17"),
        (16, {"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1\.0"),
        (16, {"dropout": "a"}, r"dropout: expected a number in \[0, 1\), got 'a'"),
    ],
)
def test_bad_values(d_model: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(d_model, **kwargs)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_query_sees_a_key(bidirectional: bool) -> None:
    layer = Attention(16, bidirectional=bidirectional)
    x, mask = torch.randn(3, 9, 16), torch.rand(3, 9) < 0.5
    mask[2] = False
    reset = torch.rand(3, 9) < 0.3
    for state in [None] if bidirectional else [None, layer.init_state(3), layer(x, mask=mask)[1]]:
        for r in (None, reset):
            assert layer(x, state, reset=r, mask=mask)[0].isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "one", "other"),
    [
        ({"half_causal": True}, "half_causal", "causal"),
        ({"half_causal": True, "causal": False, "n_heads": 4, "n_kv_heads": 1}, "half_causal", "n_kv_heads=1"),
        ({"sink": 2}, "sink", "window=None"),
        ({"sink": 2, "window": 3, "bidirectional": True}, "sink", "bidirectional"),
        ({"positions": ReRoPE(4), "window": 3}, "ReRoPE", "window"),
        ({"positions": ReRoPE(4), "causal": False}, "ReRoPE", "bidirectional"),
        ({"scale": "logn", "qk_norm": "cos"}, "scale", 'qk_norm="cos"'),
    ],
)
def test_options_that_exclude_each_other(kwargs: dict[str, Any], one: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"{one}.*{other}"):
        Attention(16, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_kv_heads": 0}, "n_kv_heads: expected an integer >= 1, got 0"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads = 4, got 3"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"window": 2.0}, r"window: expected an integer >= 1, got 2\.0"),
        ({"window": 2, "sink": -1}, "sink: expected an integer >= 0, got -1"),
        ({"scale": 0.0}, r"scale: expected a number > 0, got 0\.0"),
        ({"scale": "log"}, "scale: expected a number, 'logn', LogN, 'gradient' or None, got 'log'"),
        ({"qk_norm": "rms"}, "qk_norm: expected one of 'qk', 'key', 'cos', None, got 'rms'"),
        ({"positions": 10000.0}, r"positions: expected RoPE, .* got 10000\.0"),
        ({"n_heads": 16, "positions": "rope"}, "n_heads: rotary positions turn an even number of channels, got 1"),
        ({"n_heads": 16, "positions": ReRoPE(3)}, "n_heads: ReRoPE needs an even head width, got .* 1"),
    ],
)
def test_bad_options(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, **kwargs)


def test_the_code_of_the_docs_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    assert names["y_t"].shape == (2, 512) and names["state"].k.shape == (2, 1023, 2, 64)


@pytest.mark.parametrize("T", [1, 5])
def test_padding_leaves_the_state_as_it_was(T: int) -> None:
    layer = Attention(16, n_heads=2, window=4, sink=3, qk_bias=True).double()
    with torch.no_grad():
        layer.qk_bias.normal_()
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        for state in (layer.init_state(2), layer(x[:, :2])[1], layer(x)[1]):
            _, after = layer(x[:, :T], state, mask=torch.zeros(2, T, dtype=torch.bool))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, state, strict=True))


def test_states_of_other_attentions_are_refused() -> None:
    layer, x = Attention(16, n_heads=2), torch.randn(2, 3, 16)
    state = layer(x)[1]
    with pytest.raises(ValueError, match="state: expected k, v of one length, got \\[3, 2\\]"):
        layer(x, state._replace(v=state.v[:, 1:]))
    other = Attention(16, n_heads=2, window=4, sink=1)
    with pytest.raises(ValueError, match=r"state\.sink_k: expected None"):
        layer(x, other(x)[1])
