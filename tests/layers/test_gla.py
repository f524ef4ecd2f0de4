"""GLA against its equations token by token; the common properties are in test_contract.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import GLA

D, H, T = 16, 2, 40


def naive(layer: GLA, x: Tensor) -> Tensor:
    K, V = layer.d_key, layer.d_value
    q, k, v, gate = (x @ W.T for W in layer.qkvg.weight.split([H * K, H * K, H * V, H * V]))
    if layer.conv.conv is not None:
        filters = layer.conv.conv.weight[:, None]  # (channels, 1, W)

        def convolved(s: Tensor) -> Tensor:
            padded = F.pad(s.mT, (filters.shape[-1] - 1, 0))
            return F.conv1d(padded, filters, groups=len(filters)).mT

        if layer.conv.streams == "k":
            k = convolved(k)
        else:
            q, k, v = convolved(torch.cat((q, k, v), -1)).split([H * K, H * K, H * V], -1)
    α = torch.sigmoid(layer.decay_out(layer.decay_in(x))) ** (1 / layer.gate_temperature)
    q, k, v, α = (s.unflatten(-1, (H, -1)) for s in (q, k, v, α))
    S, outs = x.new_zeros(len(x), H, K, V), []
    for t in range(x.shape[1]):
        S = α[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], S) / K**0.5
        outs.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight)
    return (torch.stack(outs, 1).flatten(2) * gate * torch.sigmoid(gate)) @ layer.out.weight.T


@pytest.mark.parametrize("kwargs", [{}, {"conv": "k"}, {"conv": "qkv", "conv_width": 3}, {"d_key": 5, "d_value": 3}])
def test_equals_the_recurrence(kwargs: dict[str, Any]) -> None:
    layer = GLA(D, n_heads=H, gate_temperature=4.0, **kwargs).double()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], naive(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conv", ["k", "qkv"])
def test_pieces_and_steps_with_a_convolution(conv: str) -> None:
    layer = GLA(D, n_heads=H, conv=conv).double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    whole, final = layer(x)
    for lengths in ([1, 0, 2, 37], [1] * T):
        ys, state = [], layer.init_state(2)
        for piece in x.split(lengths, 1):
            y, state = layer(piece, state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), whole)
        torch.testing.assert_close(state, final)


@pytest.mark.parametrize("conv", ["k", "qkv"])
def test_padding_and_documents_with_a_convolution(conv: str) -> None:
    layer = GLA(D, n_heads=H, conv=conv).double()
    x = torch.randn(1, T, D, dtype=torch.float64)
    mask = torch.rand(1, T) < 0.7
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[:, 23] = True
    y, state = layer(x, reset=reset, mask=mask)
    first, _ = layer(x[:, :23][:, mask[0, :23]])
    second, final = layer(x[:, 23:][:, mask[0, 23:]])
    torch.testing.assert_close(y[:, mask[0]], torch.cat((first, second), 1))
    torch.testing.assert_close(state, final)


def test_starts_by_forgetting_slowly() -> None:
    layer = GLA(64)
    x = torch.randn(4, 100, 64)
    α = torch.sigmoid(layer.decay_out(layer.decay_in(x))) ** (1 / 16)
    assert 0.94 < α.mean() < 0.97  # 0.5^(1/16) = 0.958


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_key": 0}, "d_key: expected an integer >= 1, got 0"),
        ({"d_value": -1}, "d_value: expected an integer >= 1, got -1"),
        ({"n_heads": 5}, "n_heads: expected a divisor of 16, got 5"),
        ({"gate_low_rank": 0}, "gate_low_rank: expected an integer >= 1, got 0"),
        ({"gate_temperature": 0.0}, "gate_temperature: expected a number > 0, got 0.0"),
        ({"conv": "v"}, "conv: expected one of 'none', 'k', 'qkv', got 'v'"),
        ({"conv": "k", "conv_width": 0}, "conv_width: expected an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GLA(D, **kwargs)
