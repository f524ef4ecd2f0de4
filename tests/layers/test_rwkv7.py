"""RWKV-7: its equations written out token by token, its decays, its initialisation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import RWKV7
from linrnn.layers.rwkv7 import low_rank
from linrnn.models.optim import param_groups

D, H = 16, 2


def randomized(**kwargs: Any) -> RWKV7:
    """A layer whose every parameter matters: at the start the low-rank maps are zero."""
    layer = RWKV7(D, n_heads=H, **kwargs).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
        layer.key.weight.normal_(std=D**-0.5)
    return layer


def naive(layer: RWKV7, x: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's equations for one sequence x (T, D), with its row vectors; and S, values by keys."""
    K = D // H
    p = dict(layer.named_parameters())
    S, before, ys = torch.zeros(H, K, K, dtype=x.dtype), torch.zeros_like(x[0]), []
    for x_t in x:
        mixed = {z: x_t + p[f"x_{z}"] * (before - x_t) for z in "rwkvag"}
        r, k, v = (
            mixed["r"] @ layer.receptance.weight.T,
            mixed["k"] @ layer.key.weight.T,
            mixed["v"] @ layer.value.weight.T,
        )
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"] + torch.tanh(mixed["w"] @ p["w1"]) @ p["w2"]))
        a = torch.sigmoid(p["a0"] + mixed["a"] @ p["a1"] @ p["a2"])
        g = torch.sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
        removal, written = k * p["k_k"], k * (1 + (a - 1) * p["k_a"])
        outs = []
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            κ = removal[part] / removal[part].norm()
            transition = torch.diag(w[part]) - torch.outer(κ, a[part] * κ)
            S[h] = S[h] @ transition + torch.outer(v[part], written[part])
            o = S[h] @ r[part]
            o = (o - o.mean()) / (o.var(correction=0) + 64e-5).sqrt()
            o = o * p["ln_x.weight"][h] + p["ln_x.bias"][h]
            outs.append(o + (r[part] * p["r_k"][h] * written[part]).sum() * v[part])
        ys.append((torch.cat(outs) * g) @ layer.output.weight.T)
        before = x_t
    return torch.stack(ys), S


@pytest.mark.parametrize("T", [1, 2, 63])
def test_is_its_equations(T: int) -> None:
    layer, x = randomized(), torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = layer(x)
        for row in range(2):
            expected, S = naive(layer, x[row])
            torch.testing.assert_close(y[row], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.S[row], S.mT, rtol=1e-10, atol=1e-10)
    assert torch.equal(state.x, x[:, -1])


def test_the_state_does_not_grow() -> None:
    # decays in (e^-0.61, 1) and removal along unit keys contract, whatever the parameters
    layer = randomized()
    with torch.no_grad():
        _, state = layer(torch.randn(1, 20_000, D, dtype=torch.float64))
        _, early = layer(torch.randn(1, 1000, D, dtype=torch.float64))
    assert state.S.norm() < 10 * early.S.norm()


def test_a_token_that_repeats_overwrites_its_value() -> None:
    """With a = 1, no decay and k̃ = κ̂ the recurrence is the delta rule with β = 1: it reads back what it wrote last."""
    layer = RWKV7(D, n_heads=1).double()
    with torch.no_grad():
        for z in "rwkvag":
            getattr(layer, f"x_{z}").zero_()
        layer.w0.fill_(-50)
        layer.a0.fill_(50)
        layer.k_k.fill_(1)
        for linear in (layer.key, layer.value):
            linear.weight.copy_(torch.eye(D))
    x = torch.zeros(1, 3, D, dtype=torch.float64)
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 0] = 1, 1, 1  # keys e0, e1, e0, all of length 1; values the same
    with torch.no_grad():
        layer.value.weight[:, 0] = torch.arange(D, dtype=torch.float64)
        _, state = layer(x[:, :1])
        torch.testing.assert_close(state.S[0, 0, 0], torch.arange(D, dtype=torch.float64))
        _, again = layer(x)
    torch.testing.assert_close(again.S[0, 0, 0], torch.arange(D, dtype=torch.float64))  # once, not twice


def test_tokens_of_zeros_have_bounded_gradients() -> None:
    layer, x = randomized(), torch.randn(2, 9, D, dtype=torch.float64)
    x[:, 3:6] = 0  # keys without a direction: κ̂ is used twice, so that 0 * its infinite slope stays 0
    y, _ = layer(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() < 1e6


def test_initialisation() -> None:
    first, last = RWKV7(64, n_heads=4), RWKV7(64, n_heads=4, layer_index=11, n_layers=12)
    for layer in (first, last):
        decay = torch.exp(-math.exp(-0.5) * layer.w0.sigmoid())
        assert 0.54 < decay.min() < 0.8 and decay.max() > 0.999
    assert last.w0.mean() < first.w0.mean()  # higher layers remember longer
    assert (first.x_k > last.x_k).float().mean() > 0.9  # and look less at the token before
    assert RWKV7(64, n_heads=4, zero_init=True)(torch.randn(1, 3, 64))[0].abs().max() == 0
    assert [low_rank(size, 2.5) for size in (16, 64, 768, 4096)] == [16, 32, 64, 160]  # of the official models
    assert RWKV7(64).w1.shape == RWKV7(64).a2.mT.shape == (64, 32) and RWKV7(64).g1.shape == (64, low_rank(64, 5.0))


def test_only_the_projections_decay() -> None:
    layer = RWKV7(D)
    projections = {id(m.weight) for m in (layer.receptance, layer.key, layer.value, layer.output)}
    groups = param_groups(layer, 1e-3, 0.1)
    assert {id(p) for group in groups if group["weight_decay"] for p in group["params"]} == projections
    assert [p is layer.w0 for group in groups if group["lr"] == 2e-3 for p in group["params"]] == [True]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_heads": 3}, "n_heads: expected a divisor of 16, got 3"),
        ({"n_heads": 0}, "n_heads: expected an integer >= 1, got 0"),
        ({"layer_index": 1}, "layer_index: expected an integer from 0 to n_layers - 1 = 0, got 1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RWKV7(D, **kwargs)
