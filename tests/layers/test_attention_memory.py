"""Attention over long sequences: masks are made for blocks of queries, never T x T."""

from typing import Any

import pytest
import torch

from linrnn.decode.live import LiveBytes
from linrnn.layers import Attention
from linrnn.layers.positions import ReRoPE

T = 5000
OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("mask",)),
    ({}, ("reset",)),
    ({}, ("state",)),
    ({"window": 100}, ()),
    ({"window": 100, "sink": 4}, ("mask",)),
    ({"window": 100, "sink": 4}, ("reset",)),
    ({"positions": "alibi"}, ()),
    ({"positions": ReRoPE(100)}, ()),
    ({"bidirectional": True}, ("reset", "mask")),
    ({"bidirectional": True, "half_causal": True, "n_heads": 2}, ("mask",)),
]


def arguments(layer: Attention, given: tuple[str, ...]) -> dict[str, Any]:
    mask = torch.arange(T)[None] >= 100
    reset = torch.arange(T)[None] % 1700 == 1699
    state = layer(torch.randn(1, 10, 16))[1] if "state" in given else None
    return {k: v for k, v in {"mask": mask, "reset": reset, "state": state}.items() if k in given}


@pytest.mark.parametrize(
    ("kwargs", "given", "training"), [(*o, False) for o in OPTIONS] + [(*o, True) for o in OPTIONS[1::3]], ids=str
)
def test_no_square_of_the_length(kwargs: dict[str, Any], given: tuple[str, ...], training: bool) -> None:
    """Fewer bytes are alive at once than half a T x T mask in float32 has, also in the backward pass."""
    layer, x = Attention(16, **({"n_heads": 1} | kwargs)), torch.randn(1, T, 16)
    with torch.no_grad():
        more = arguments(layer, given)
    with torch.set_grad_enabled(training), LiveBytes() as live:
        y = layer(x, **more)[0]
        if training:
            y.square().sum().backward()
    square = 4 * T * T
    local = "window" in kwargs and "reset" not in given
    assert live.peak < square / (8 if local else 2)
    assert y.isfinite().all()


@pytest.mark.parametrize("kwargs", [{}, {"window": 100}, {"bidirectional": True}], ids=str)
def test_dropout_keeps_no_square(kwargs: dict[str, Any]) -> None:
    """torch's call on a CPU writes weights down if it drops some: those of a block, in training, of one at a time."""
    layer, x = Attention(16, n_heads=2, dropout=0.1, **kwargs), torch.randn(1, T, 16)
    with LiveBytes() as live:
        layer(x)[0].square().sum().backward()
    assert live.peak < 4 * T * T


def test_padding_needs_no_mask() -> None:
    layer, x = Attention(16, n_heads=1), torch.randn(2, T, 16)
    mask = torch.arange(T) >= torch.tensor([[0], [1000]])
    with torch.no_grad(), LiveBytes() as live:
        layer(x, mask=mask)
    assert live.peak < 30 * x.nbytes < T * T


def test_windows_are_linear_in_the_length() -> None:
    layer = Attention(16, n_heads=1, window=64, sink=4)
    with torch.no_grad():
        y, state = layer(torch.randn(1, 100_000, 16))
    assert y.isfinite().all() and state.k.isfinite().all()
