"""The windowed convolution against torch's own; the common properties are in test_contract.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import Conv

D = 16


def naive(layer: Conv, x: Tensor) -> Tensor:
    """One document: torch's convolution, with zeros before it, and behind it where it looks ahead."""
    K = layer.conv.width
    gate, u = (x @ W.T for W in layer.gate_in.weight.chunk(2))
    pads = (K - 1, 0) if layer.causal else (K // 2, K // 2)
    u = F.conv1d(F.pad(u.mT, pads), layer.conv.weight[:, None], layer.conv.bias, groups=layer.d_model).mT
    return (gate * torch.sigmoid(gate) * u) @ layer.out.weight.T


def make(**kwargs) -> Conv:
    layer = Conv(D, **kwargs).double()
    torch.nn.init.normal_(layer.conv.bias)  # starts at zero
    return layer


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("K", [1, 5, 61])
@pytest.mark.parametrize("T", [1, 63, 200])
def test_equals_torch(K: int, T: int, bidirectional: bool) -> None:
    layer = make(conv_width=K, bidirectional=bidirectional)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (layer(x)[0], naive(layer, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_sees_its_window_within_its_document(bidirectional: bool) -> None:
    """Of padded and packed rows, real tokens only: which inputs an output depends on, counted by gradients."""
    layer, T, t = make(conv_width=5, bidirectional=bidirectional), 20, 10
    mask, reset = torch.ones(1, T, dtype=torch.bool), torch.zeros(1, T, dtype=torch.bool)
    mask[:, 9], mask[:, 11], reset[:, 8] = False, False, True
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, mask=mask, reset=reset)[0][:, t].sum(), x)
    seen = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert seen == ([8, 10, 12, 13] if bidirectional else [8, 10])


def test_the_state_is_the_window() -> None:
    assert Conv(D, conv_width=5).state_size == 4 * D
    assert Conv(D, conv_width=1).state_size == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"conv_width": 0}, "conv_width: expected an integer >= 1, got 0"),
        ({"conv_width": 2.5, "bidirectional": True}, "conv_width: expected an integer >= 1, got 2.5"),
        (
            {"conv_width": 4, "bidirectional": True},
            "conv_width: expected an odd number, as a centred filter has, got 4",
        ),
    ],
)
def test_bad_arguments(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        Conv(D, **kwargs)
