"""Mamba2 against transformers' and against its equations; the common properties are in test_contract.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import Mamba2

D, T = 16, 37


def naive(layer: Mamba2, u: Tensor) -> Tensor:
    """The equations of the paper, token by token, for one group or several."""
    H, N, G = layer.n_heads, layer.d_state, layer.n_groups
    lower, upper = layer.dt_limit or (0, math.inf)
    z, xBC, dt = layer.in_proj(u).split([layer.d_inner, layer.d_inner + 2 * G * N, H], -1)
    filters = layer.conv.weight[:, None]
    padded = F.pad(xBC.mT, (filters.shape[-1] - 1, 0))
    xBC = F.silu(F.conv1d(padded, filters, layer.conv.bias, groups=len(filters)).mT)
    x, B, C = xBC.split([layer.d_inner, G * N, G * N], -1)
    x = x.unflatten(-1, (H, -1))
    B, C = (s.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for s in (B, C))
    Δ, A = torch.log1p(torch.exp(dt + layer.dt_bias)).clamp(lower, upper), -layer.A_log.exp()
    h, ys = u.new_zeros(len(u), H, N, x.shape[-1]), []
    for t in range(u.shape[1]):
        write = B[:, t, :, :, None] * x[:, t, :, None]
        h = torch.exp(Δ[:, t] * A)[..., None, None] * h + Δ[:, t, :, None, None] * write
        ys.append((C[:, t, :, :, None] * h).sum(2) + layer.D[:, None] * x[:, t])
    y = (torch.stack(ys, 1).flatten(2) * F.silu(z)).unflatten(-1, (G, -1))
    y = y / (y.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    return layer.out_proj(y.flatten(2) * layer.norm.weight.flatten())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_groups": 2},
    {"d_state": 5, "d_head": 4, "d_conv": 2, "expand": 3},
    {"bias": True, "conv_bias": False, "norm_eps": 0.1},
    {"dt_limit": [0.005, 0.02]},  # the biases begin between 0.001 and 0.1
]


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_equals_the_recurrence(kwargs: dict[str, Any]) -> None:
    layer = Mamba2(D, **kwargs).double()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], naive(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    ("n_groups", "use_bias", "use_conv_bias", "eps"), [(1, False, True, 1e-5), (2, True, False, 0.1)]
)
def test_equals_transformers(n_groups: int, use_bias: bool, use_conv_bias: bool, eps: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=D, num_heads=8, head_dim=4, state_size=12, expand=2, n_groups=n_groups, num_hidden_layers=1,
        chunk_size=8, use_bias=use_bias, use_conv_bias=use_conv_bias, layer_norm_epsilon=eps, vocab_size=10,
    )  # fmt: skip
    oracle = Mamba2Mixer(config, layer_idx=0).eval()
    layer = Mamba2(D, d_state=12, d_head=4, n_groups=n_groups, bias=use_bias, conv_bias=use_conv_bias, norm_eps=eps)
    given = {name.replace("conv1d", "conv"): tensor for name, tensor in oracle.state_dict().items()}
    given["norm.weight"] = given["norm.weight"].view(layer.norm.weight.shape)
    layer.load_state_dict(given)
    x = torch.randn(2, T, D)
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], oracle(x), rtol=1e-5, atol=1e-5)
        y, state = layer(x[:, :30])
        torch.testing.assert_close(y, oracle(x[:, :30], cache_params=cache), rtol=1e-5, atol=1e-5)
        for x_t in x[:, 30:].unbind(1):
            y_t, state = layer.step(x_t, state)
            torch.testing.assert_close(y_t, oracle(x_t[:, None], cache_params=cache)[:, 0], rtol=1e-5, atol=1e-5)
        ssm = cache.get_recurrent_state(0, state_idx=0)
        torch.testing.assert_close(state.ssm.mT, ssm, rtol=1e-5, atol=1e-5)


def test_pieces_and_steps_are_clamped_alike() -> None:
    layer = Mamba2(D, dt_limit=(0.005, 0.02)).double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    whole, final = layer(x)
    first, state = layer(x[:, :20])
    rest = []
    for x_t in x[:, 20:].unbind(1):
        y_t, state = layer.step(x_t, state)
        rest.append(y_t)
    torch.testing.assert_close(torch.cat([first, torch.stack(rest, 1)], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.ssm, final.ssm, rtol=1e-10, atol=1e-10)


def test_initialisation() -> None:
    layer = Mamba2(512, d_head=4).double()
    dt, A = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 1e-3 * (1 - 1e-4) <= dt.min() and dt.max() <= 0.1 * (1 + 1e-4)
    assert (dt.log().mean() - math.log(0.01)).abs() < 0.3
    assert 1 <= A.min() and A.max() <= 16
    assert (A.mean() - 8.5).abs() < 1
    assert layer.optim_hints().keys() == {"A_log", "D", "dt_bias"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_conv": 0}, "d_conv: expected an integer >= 1, got 0"),
        ({"expand": 1.5}, "expand: expected an integer >= 1, got 1.5"),
        ({"d_head": 5}, r"d_head: expected a divisor of expand \* d_model = 32, got 5"),
        ({"d_head": 0}, "d_head: expected an integer >= 1, got 0"),
        ({"n_groups": 3}, "n_groups: expected a divisor of the number of heads, 4, got 3"),
        ({"A_range": (0.0, 1.0)}, r"A_range: expected 0 < lower <= upper, got \(0.0, 1.0\)"),
        ({"dt_min": 0.2}, "dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got 0.2, 0.1"),
        ({"norm_eps": 0.0}, "norm_eps: expected a finite number > 0, got 0.0"),
        ({"dt_limit": (0.1, 0.01)}, r"dt_limit: expected None or numbers 0 <= lower <= upper, got \(0.1, 0.01\)"),
        ({"dt_limit": (-1.0, 1.0)}, "dt_limit: expected None or numbers"),
        ({"dt_limit": (math.inf, math.inf)}, "dt_limit: expected None or numbers"),
        ({"dt_limit": [0.1]}, r"dt_limit: expected None or numbers 0 <= lower <= upper, got \[0.1\]"),
        ({"dt_limit": 0.1}, "dt_limit: expected None or numbers"),
        ({"d_model": 5}, "d_head: a width of 10 is no 4 or more heads of 4, 8, ... 64; give d_head"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(**{"d_model": D, **kwargs})
