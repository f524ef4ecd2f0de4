"""Attention against transformers: models of random weights, ours on what their first attention reads."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linrnn.layers import Attention
from linrnn.layers.positions import NTK, ALiBi, Interpolation, Positions, RoPE, YaRN

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
D, T = 48, 40


def first_attention(model: nn.Module, attention: nn.Module, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Runs a model and returns what its first attention reads and writes."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        seen.extend((args[0] if args else kwargs["hidden_states"], output[0]))

    attention.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(0, 50, (2, T)), attention_mask=None if mask is None else mask.long())
    return seen[0], seen[1]


def config(family: str, **kwargs: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 3}
    more = {"intermediate_size": 16, "pad_token_id": 0, "initializer_range": 0.3}
    return getattr(transformers, f"{family}Config")(**(sizes | more | kwargs))


def load(layer: Attention, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear) -> None:
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat((q.weight, k.weight, v.weight)))
        layer.out.weight.copy_(out.weight)


def compare(layer: Attention, x: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * expected.abs().max().item()}
    with torch.no_grad():
        y = layer(x, mask=mask)[0]
        real = torch.ones(2, T, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(y[real], expected[real], **tolerance)
        if layer.causal:  # and its cache
            first, state = layer(x[:, : T // 2], mask=None if mask is None else mask[:, : T // 2])
            ys = [first]
            for t in range(T // 2, T):
                y_t, state = layer(x[:, t : t + 1], state, mask=None if mask is None else mask[:, t : t + 1])
                ys.append(y_t)
            torch.testing.assert_close(torch.cat(ys, 1)[real], expected[real], **tolerance)


LLAMA: list[tuple[dict[str, Any], Positions]] = [
    ({"rope_type": "default", "rope_theta": 500.0}, RoPE(base=500.0)),
    ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, RoPE(scaling=Interpolation(4))),
    # its factor at a length T above the original one is factor T / original - (factor - 1)
    ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, RoPE(scaling=NTK(2 * T / 16 - 1, "aware"))),
    (
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 64},
        RoPE(base=100.0, scaling=YaRN(4, 64, ramp="dimensions")),
    ),
    (
        {"rope_type": "yarn", "factor": 8.0, "rope_theta": 50.0, "original_max_position_embeddings": 32}
        | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5},
        RoPE(base=50.0, scaling=YaRN(8, 32, fast=4.0, slow=0.5, ramp="dimensions", temperature=1.5**2)),
    ),
]


@pytest.mark.parametrize(("rope", "positions"), LLAMA, ids=lambda p: p.get("rope_type") if isinstance(p, dict) else "")
def test_llama(rope: dict[str, Any], positions: Positions) -> None:
    settings = config("Llama", max_position_embeddings=16, rope_parameters=rope)
    from transformers import LlamaModel

    model = LlamaModel(settings).eval()
    attention = model.layers[0].self_attn
    layer = Attention(D, n_heads=3, positions=positions)
    load(layer, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    compare(layer, *first_attention(model, attention))


def test_llama_padded_left() -> None:
    settings = config("Llama")
    from transformers import LlamaModel

    model = LlamaModel(settings).eval()
    attention = model.layers[0].self_attn
    layer = Attention(D, n_heads=3)
    load(layer, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    mask = torch.arange(T) >= torch.tensor([[0], [13]])
    compare(layer, *first_attention(model, attention, mask), mask)


def test_mistral() -> None:
    settings = config("Mistral", num_attention_heads=6, num_key_value_heads=2, sliding_window=7, head_dim=8)
    from transformers import MistralModel

    model = MistralModel(settings).eval()
    attention = model.layers[0].self_attn
    layer = Attention(D, n_heads=6, n_kv_heads=2, window=7)
    load(layer, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    compare(layer, *first_attention(model, attention))


def test_qwen3() -> None:
    settings = config("Qwen3", num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5)
    from transformers import Qwen3Model

    model = Qwen3Model(settings).eval()
    attention = model.layers[0].self_attn
    layer = Attention(D, n_heads=3, n_kv_heads=1, qk_norm="qk")
    load(layer, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    with torch.no_grad():
        for ours, theirs in ((layer.q_norm, attention.q_norm), (layer.k_norm, attention.k_norm)):
            ours.weight.copy_(theirs.weight.normal_())
    compare(layer, *first_attention(model, attention))


def test_phi() -> None:
    settings = config(
        "Phi", rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    )
    from transformers import PhiModel

    model = PhiModel(settings).eval()
    attention = model.layers[0].self_attn
    layer = Attention(D, n_heads=3, positions=RoPE(base=100.0, fraction=0.5))
    load(layer, attention.q_proj, attention.k_proj, attention.v_proj, attention.dense)
    compare(layer, *first_attention(model, attention))


@pytest.mark.parametrize("n_heads", [3, 4, 6])
def test_bloom(n_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    settings = transformers.BloomConfig(hidden_size=D, n_head=n_heads)
    theirs = BloomAttention(settings, layer_idx=0).eval()
    layer = Attention(D, n_heads=n_heads, positions=ALiBi())
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.zero_()
        weight = theirs.query_key_value.weight.view(n_heads, 3, -1, D)
        layer.qkv.weight.copy_(weight.transpose(0, 1).reshape(3 * D, D))
        layer.out.weight.copy_(theirs.dense.weight)
        x = torch.randn(2, T, D)
        future = torch.full((T, T), -torch.inf).triu(1)[None, None]
        alibi = build_alibi_tensor(torch.ones(2, T), n_heads, x.dtype)
        expected = theirs(x, torch.zeros_like(x), alibi, future)[0]
    compare(layer, x, expected)


def test_roformer() -> None:
    settings = config("RoFormer", max_position_embeddings=64)
    from transformers import RoFormerModel

    model = RoFormerModel(settings).eval()
    attention = model.encoder.layer[0].attention.self
    layer = Attention(D, n_heads=3, bidirectional=True)
    out = nn.Linear(D, D)
    nn.init.eye_(out.weight)  # theirs comes later
    pairs = torch.arange(D).view(3, D // 6, 2).transpose(1, 2).flatten()  # theirs are side by side
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value):
            linear.bias.zero_()
    load(layer, attention.query, attention.key, attention.value, out)
    with torch.no_grad():
        for i in range(2):
            layer.qkv.weight[i * D : (i + 1) * D] = layer.qkv.weight[i * D : (i + 1) * D][pairs]
    mask = torch.arange(T) < torch.tensor([[T], [23]])
    compare(layer, *first_attention(model, attention, mask), mask)


def test_yarn_of_the_paper() -> None:
    """The ramp over r = L θ / 2π, and the logits' factor (0.1 ln s + 1)²."""
    n, L, s, base = 64, 2048, 16.0, 10000.0
    θ = [base ** (-2 * i / n) for i in range(n // 2)]
    expected = []
    for angle in θ:
        r = L * angle / (2 * math.pi)
        γ = 0.0 if r < 1 else 1.0 if r > 32 else (r - 1) / 31
        expected.append((1 - γ) * angle / s + γ * angle)
    rope = RoPE(base=base, scaling=YaRN(s, L))
    torch.testing.assert_close(rope.frequencies(n, torch.float64, "cpu"), torch.tensor(expected, dtype=torch.float64))
    assert rope.logit_factor == pytest.approx((0.1 * math.log(16) + 1) ** 2)
    assert rope.frequencies(n, torch.float64, "cpu")[0] == θ[0]
