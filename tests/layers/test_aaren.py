"""Aaren: against torch's attention asked by one query for every prefix, and what its parameters mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers import Aaren
from linrnn.layers.heads import split_heads

D, H = 32, 4


def torch_attention(layer: Aaren, x: Tensor) -> Tensor:
    """nn.MultiheadAttention with the layer's weights, where every token asks the same."""
    theirs = nn.MultiheadAttention(D, H, bias=False, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((torch.eye(D), layer.key.weight, layer.value.weight)))
        theirs.out_proj.weight.copy_(layer.out.weight)
    T = x.shape[1]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return theirs(layer.query.flatten().expand_as(x), x, x, attn_mask=later, need_weights=False)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("T", [1, 63, 300])
def test_is_attention_of_one_query(T: int, dtype: torch.dtype, tolerance: float) -> None:
    layer = Aaren(D, n_heads=H).to(dtype)
    x = torch.randn(2, T, D, dtype=dtype)
    torch.testing.assert_close(layer(x)[0], torch_attention(layer, x), rtol=tolerance, atol=tolerance)


def test_steps_are_attention_over_a_growing_cache() -> None:
    layer, x = Aaren(D, n_heads=H).double(), torch.randn(2, 20, D, dtype=torch.float64)
    k, v = (split_heads(linear(x), H).transpose(1, 2) for linear in (layer.key, layer.value))  # (B, H, T, K)
    state, q = layer.init_state(2), layer.query[:, None].expand(2, H, 1, D // H)
    for t in range(20):
        y, state = layer.step(x[:, t], state)
        o = F.scaled_dot_product_attention(q, k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(y, layer.out(o.transpose(1, 2).flatten(1)), rtol=1e-12, atol=1e-12)


def test_the_order_of_the_past_does_not_matter() -> None:
    layer, x = Aaren(D).double(), torch.randn(1, 40, D, dtype=torch.float64)
    y, state = layer(x)
    shuffled, after = layer(x[:, torch.randperm(40)])
    torch.testing.assert_close(shuffled[:, -1], y[:, -1])
    torch.testing.assert_close(after, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_inputs_pick_the_largest_logit(dtype: torch.dtype) -> None:
    """Logits of thousands: the mean is the value of the best token so far, and gradients are finite."""
    layer = Aaren(D, n_heads=H).to(dtype)
    x = (1e3 * torch.randn(1, 50, D)).to(dtype)
    logits = layer.logits(x)
    assert logits.abs().max() > 1e3 and logits.dtype == torch.float32
    y, _ = layer(x)
    best = logits[0].cummax(0).indices  # (T, H)
    v = split_heads(layer.value(x), H)[0]
    wanted = layer.out(torch.stack([v[best[:, h], h] for h in range(H)], 1).flatten(1))
    close = (logits[0].topk(2, 0).values.diff(dim=0).abs() > 20).all()
    assert close, "the seed gives a draw"
    torch.testing.assert_close(y[0, -1], wanted[-1], rtol=1e-3, atol=1e-1)
    y.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_initialisation() -> None:
    """White x gives logits and values of variance one."""
    layer = Aaren(512)
    x = torch.randn(4, 256, 512)
    assert 0.7 < layer.logits(x).std() < 1.3
    assert 0.95 < layer.value(x).std() < 1.05
    assert sum(p.numel() for p in layer.parameters()) == 3 * 512**2 + 512
    assert layer.state_size == 512 + 2 * layer.n_heads


def test_the_query_does_not_decay() -> None:
    assert Aaren(D).optim_hints() == {"query": {"weight_decay": 0.0}}


@pytest.mark.parametrize("n_heads", [0, -1, 3, 64, 2.0])
def test_bad_heads(n_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"n_heads: expected .* got {n_heads}"):
        Aaren(D, n_heads=n_heads)
