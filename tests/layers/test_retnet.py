"""RetNet against the paper's parallel form and a diagonal scan; the common properties are in test_contract.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import RetNet
from linrnn.ops import diagonal_scan, linear_attention

D, H, T = 16, 2, 50
K = D // H


def complex_projections(layer: RetNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as complex numbers (B, T, H, K / 2), v (B, T, H, V) and the gate, out of the layer's weights."""
    q, k, v, gate = (x @ W.T for W in layer.qkvg.weight.split([D, D, 2 * D, 2 * D]))
    q, k, v = (s.unflatten(-1, (H, -1)) for s in (q, k, v))
    q, k = (torch.complex(*s.chunk(2, -1)) for s in (q, k / K**0.5))
    return q, k, v, gate


def output(layer: RetNet, o: Tensor, gate: Tensor) -> Tensor:
    o = o.flatten(2)
    normed = F.group_norm(o.flatten(0, 1), H, eps=1e-6).view_as(o)
    return (F.silu(gate) * normed) @ layer.out.weight.T


def test_equals_the_parallel_form() -> None:
    layer = RetNet(D, n_heads=H).double()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    q, k, v, gate = complex_projections(layer, x)
    n = torch.arange(T, dtype=torch.float64)
    θ = 10000.0 ** (-torch.arange(K // 2, dtype=torch.float64) / (K // 2))
    Θ = torch.exp(1j * n[:, None] * θ)[:, None]  # (T, 1, K / 2)
    γ = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    decays = torch.where(n[:, None] >= n, γ[:, None, None] ** (n[:, None] - n).clamp(min=0), 0)  # (H, T, T)
    scores = torch.einsum("bnhk,bmhk->bhnm", q * Θ, (k * Θ).conj()).real * decays
    expected = output(layer, torch.einsum("bhnm,bmhv->bnhv", scores, v), gate)
    y, _ = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


def test_equals_a_diagonal_scan_with_complex_decay() -> None:
    layer = RetNet(D, n_heads=H).double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    q, k, v, gate = complex_projections(layer, x)
    θ = 10000.0 ** (-torch.arange(K // 2, dtype=torch.float64) / (K // 2))
    γ = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    λ = γ[:, None] * torch.exp(-1j * θ)  # (H, K / 2)
    writes = k[..., None] * v[..., None, :]  # (B, T, H, K / 2, V)
    h, last = diagonal_scan(λ[..., None].expand(writes.shape[2:]).flatten(), writes.flatten(2))
    h = h.view(writes.shape)
    o = torch.einsum("bthk,bthkv->bthv", q.conj(), h).real
    y, state = layer(x)
    torch.testing.assert_close(y, output(layer, o, gate), rtol=1e-9, atol=1e-9)
    S = torch.complex(*state.S.chunk(2, 2)) / K**0.5  # the layer scales what it reads, not k
    torch.testing.assert_close(S, last.view(S.shape), rtol=1e-9, atol=1e-9)


def test_many_steps_keep_the_phase() -> None:
    # a state in the frame of the last token: the angle of a step does not grow with time
    layer = RetNet(D, n_heads=H)
    x = torch.randn(1, 1000, D)
    with torch.no_grad():
        y, _ = layer(x)
        state = layer.init_state(1)
        for x_t in x.unbind(1):
            y_t, state = layer.step(x_t, state)
        expected = layer.double()(x.double())[0]
    for ours in (y[:, -1], y_t):
        assert (ours - expected[:, -1]).norm() < 1e-4 * expected[:, -1].norm()


def test_late_tokens_are_as_exact_as_early_ones() -> None:
    layer = RetNet(D, n_heads=H)
    x = torch.randn(1, 20_000, D)
    with torch.no_grad():
        y, expected = layer(x)[0], layer.double()(x.double())[0]
    for part in (slice(0, 1000), slice(19_000, None)):
        assert (y - expected)[:, part].norm() < 2e-6 * expected[:, part].norm()


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_constant_decay_equals_lightning_attention_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = transformers.MiniMaxConfig(
        hidden_size=D, num_attention_heads=H, head_dim=8, num_hidden_layers=2, block_size=16, vocab_size=10
    )
    oracle = MiniMaxLightningAttention(config, layer_idx=0).eval()
    x = torch.randn(2, T, D)
    with torch.no_grad():
        expected, expected_state = oracle(x, (x, x), None)[:2]
        q, k, v = F.silu(oracle.qkv_proj(x)).view(2, T, H, 24).chunk(3, -1)
        o, state = linear_attention(q, k, v, log_decay=-oracle.slope_rate.flatten(), scale=1.0)
        y = oracle.out_proj(torch.sigmoid(oracle.output_gate(x)) * oracle.norm(o.flatten(2)))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_value": 0}, "d_value: expected an integer >= 1, got 0"),
        ({"n_heads": 16}, "n_heads: rotary positions need an even width d_model / n_heads, got 1"),
        ({"n_heads": 3}, "n_heads: expected a divisor of 16, got 3"),
        ({"rope_base": -1.0}, "rope_base: expected a number > 0, got -1.0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetNet(D, **kwargs)
