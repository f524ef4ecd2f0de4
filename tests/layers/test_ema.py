"""The damped moving average against its equations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers.ema import DampedEMA
from linrnn.models.optim import param_groups


def naive(ema: DampedEMA, x: Tensor) -> Tensor:
    """One document x (T, D), average by average."""
    y = ema.omega * x
    for d, (alpha, delta, beta, eta) in enumerate(
        zip(*(p.split(ema.channels) for p in (ema.alpha, ema.delta, ema.beta, ema.eta)), strict=True)
    ):
        α, δ = alpha.sigmoid(), delta.sigmoid()
        h = x.new_zeros(α.shape)
        rows = []
        for x_t in reversed(x) if d else x:
            h = α * beta * x_t[:, None] + (1 - α * δ) * h
            rows.append((eta * h).sum(1) / ema.d_state**0.5)
        y = y + torch.stack(rows[::-1] if d else rows)
    return y


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("T", [1, 7, 63, 130])
def test_equals_the_equations(T: int, bidirectional: bool) -> None:
    ema = DampedEMA(5, d_state=3, bidirectional=bidirectional).double()
    x = torch.randn(2, T, 5, dtype=torch.float64, requires_grad=True)
    y, h = ema(x)
    expected = torch.stack([naive(ema, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert (h is None) == bidirectional
    ours, theirs = (torch.autograd.grad(out.square().sum(), [x, *ema.parameters()]) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_documents_do_not_mix(bidirectional: bool) -> None:
    ema = DampedEMA(5, bidirectional=bidirectional).double()
    x = torch.randn(1, 150, 5, dtype=torch.float64)
    reset = torch.zeros(1, 150, dtype=torch.bool)
    reset[0, [70, 71]] = True
    expected = torch.cat([naive(ema, part) for part in x[0].split([70, 1, 79])])
    torch.testing.assert_close(ema(x, reset=reset)[0][0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [-300.0, 300.0])
def test_stable_whatever_the_parameters(value: float) -> None:
    ema, x = DampedEMA(4), torch.randn(2, 200, 4)
    with torch.no_grad():
        ema.alpha.fill_(value)
        ema.delta.fill_(value)
    y, h = ema(x)
    y.square().sum().backward()
    assert y.isfinite().all() and h is not None and h.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ema.parameters())
    if value > 0:  # nothing is kept
        torch.testing.assert_close(h, ema.beta * x[:, -1, :, None], rtol=1e-5, atol=1e-5)


def test_averages_stay_in_float32() -> None:
    x = torch.randn(2, 9, 4).bfloat16()
    for h in (None, torch.zeros(2, 4, 16)):
        y, h = DampedEMA(4).bfloat16()(x, h)
        assert y.dtype == torch.bfloat16
        assert h is not None and h.dtype == torch.float32


def test_initialisation() -> None:
    ema = DampedEMA(2000)
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    for p, mean, std in ((ema.alpha, 0, 0.2), (ema.delta, 0, 0.2), (ema.beta, signs, 0.02), (ema.eta, 0, 1)):
        assert abs((p - mean).std().item() - std) < 0.02 * std
        assert abs((p - mean).mean().item()) < 0.02 * std
    assert abs(ema.omega.std().item() - 1) < 0.1
    assert all(group["weight_decay"] == 0 for group in param_groups(ema, 1e-3, 0.1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"channels": 0}, "channels: .* got 0"), ({"channels": 4, "d_state": 0}, "d_state: .* got 0")],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DampedEMA(**kwargs)
