"""The multiplications of each recurrence against itself, written out in numbers that count their products.

What is written out is compared with the op that the layer runs, so that it is that recurrence which is counted.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linrnn
from linrnn import layers, ops
from linrnn.layers.kernel_attention import Features, causal
from linrnn.layers.short_conv import ShortConv

D, T = 16, 5


class Number:
    """A real or complex number; `made` is how many products of real numbers there have been."""

    made: ClassVar[int] = 0

    def __init__(self, value: complex):
        self.value = value

    def __mul__(self, other: "Number") -> "Number":
        Number.made += (1 + isinstance(self.value, complex)) * (1 + isinstance(other.value, complex))
        return Number(self.value * other.value)

    def __add__(self, other: "Number") -> "Number":
        return Number(self.value + other.value)

    def __sub__(self, other: "Number") -> "Number":
        return Number(self.value - other.value)

    @property
    def real(self) -> "Number":
        return Number(self.value.real)

    @property
    def imag(self) -> "Number":
        return Number(self.value.imag)


real = np.frompyfunc(lambda n: n.real, 1, 1)
imag = np.frompyfunc(lambda n: n.imag, 1, 1)
value = np.frompyfunc(lambda n: n.value, 1, 1)


def numbers(x: Tensor) -> Any:
    return np.frompyfunc(Number, 1, 1)(np.array(x.tolist(), dtype=object))


def function(f: Callable[[Any], Any]) -> Any:
    """An elementwise function of numbers, which costs no product."""
    return np.frompyfunc(lambda n: Number(float(f(n.value))), 1, 1)


def quotient(a: Any, b: Any) -> Any:
    return np.frompyfunc(lambda a, b: Number(a.value / b.value), 2, 1)(a, b)


def top(a: Any, b: Any) -> Any:
    return np.frompyfunc(lambda a, b: a if a.value >= b.value else b, 2, 1)(a, b)


exp = function(np.exp)
outer = np.multiply.outer
Naive = tuple[Any, Tensor]  # what the recurrence gave, (T, ...) of Numbers, and what the op gives


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def diagonal(a: Tensor) -> Naive:
    """h_t = a h_{t-1} + u_t, with a (N)."""
    u = torch.complex(normal(T, len(a)), normal(T, len(a))) if a.is_complex() else normal(T, len(a))
    a_, h, hs = numbers(a), numbers(torch.zeros_like(u[0])), []
    for u_t in numbers(u):
        h = a_ * h + u_t
        hs.append(h)
    return np.stack(hs), ops.diagonal_scan(a, u[None])[0][0]


def state_spaces(log_a: Tensor, b: Tensor, c: Tensor) -> Naive:
    x = normal(T, len(b))
    a_, b_, c_, x_ = numbers(log_a.exp()), numbers(b), numbers(c), numbers(x)
    h, ys = numbers(torch.zeros_like(b)), []
    for x_t in x_:
        h = a_ * h + b_ * x_t[:, None]
        product = real(c_) * real(h) - imag(c_) * imag(h) if c.is_complex() else c_ * h
        ys.append(product.sum(1))
    return np.stack(ys), ops.diagonal_ssm(log_a, b, c, x[None])[0][0]


def s4d(layer) -> Naive:
    log_a, b = layer.discrete()
    C = layer.C.detach()
    return state_spaces(log_a, b, torch.complex(C[..., 0], C[..., 1]))


def rglru(layer) -> Naive:
    a, i, x = torch.rand(T, D, dtype=torch.float64), normal(T, D), normal(T, D)
    m, h, hs = (1 - a**2).sqrt(), numbers(torch.zeros(D, dtype=torch.float64)), []
    for a_t, m_t, i_t, x_t in zip(*map(numbers, (a, m, i, x)), strict=True):
        h = a_t * h + m_t * (i_t * x_t)
        hs.append(h)
    return np.stack(hs), ops.diagonal_scan(a[None], (m * i * x)[None])[0][0]


def hgrn(layer) -> Naive:
    x = normal(1, T, D)
    a, u = layer.coefficients(x)
    write, c = torch.sigmoid(-layer.lambda_proj(x))[0], u[0] / torch.sigmoid(-layer.lambda_proj(x))[0]
    decay, turn = numbers(1 - write), None if layer.theta is None else numbers(torch.exp(1j * layer.theta.detach()))
    h, hs = numbers(torch.zeros_like(c[0])), []
    for λ, w, c_t in zip(decay, numbers(write), numbers(c), strict=True):
        h = (λ if turn is None else λ * turn) * h + w * c_t
        hs.append(h)
    return np.stack(hs), ops.diagonal_scan(a, u)[0][0]


def matrices(H: int, K: int, V: int, decay: str = "none") -> Naive:
    """S_t = α_t S_{t-1} + k_t v_t^T, o_t = q_t^T S_t."""
    q, k, v = normal(1, T, H, K), normal(1, T, H, K), normal(1, T, H, V)
    shape = {"none": (H,), "head": (H,), "channel": (1, T, H, K)}[decay]
    g = -torch.rand(*shape, dtype=torch.float64)
    α = g.exp().reshape(-1, H, K if g.ndim == 4 else 1).expand(T, H, K)
    S, os = numbers(torch.zeros(H, K, V)), []
    for q_t, k_t, v_t, α_t in zip(*(numbers(z[0]) for z in (q, k, v)), numbers(α), strict=True):
        new = np.stack([outer(k_t[h], v_t[h]) for h in range(H)])
        S = (S if decay == "none" else α_t[..., None] * S) + new
        os.append(np.stack([q_t[h] @ S[h] for h in range(H)]))
    o, _ = ops.linear_attention(q, k, v, log_decay=None if decay == "none" else g, scale=1.0)
    return np.stack(os), o[0]


def kernel(layer) -> Naive:
    kind, H, F, V = layer.kind, layer.n_heads, layer.n_features, layer.d_head
    q, k, v = normal(1, T, H, F), normal(1, T, H, F), normal(1, T, H, V)
    if not kind.logs:
        q, k = q.exp(), k.exp()
    expected, _ = causal(kind, Features(q, k), v, scale=1.0)
    S, z, m = numbers(torch.zeros(H, F, V)), numbers(torch.zeros(H, F)), numbers(torch.full((H, F), -100.0))
    os = []
    for q_t, k_t, v_t in zip(*(numbers(y[0]) for y in (q, k, v)), strict=True):
        if kind.logs:
            larger = top(m, k_t)
            units, m = exp(m - larger), larger
            S, z, k_t = units[..., None] * S, units * z, exp(k_t - m)
        S, z = S + np.stack([outer(k_t[h], v_t[h]) for h in range(H)]), z + k_t
        if kind.each:  # softmax(q)_f / (z_f e^{m_f}), times e^{m_f} S_f
            q_t = quotient(exp(q_t), z)
        elif kind.logs:
            q_t = exp(q_t + m)
        o = np.stack([q_t[h] @ S[h] for h in range(H)])
        if kind.each:
            o = quotient(o, exp(numbers(q[0, len(os)])).sum(1)[:, None])
        elif kind.normalize:
            below = np.stack([q_t[h] @ z[h] for h in range(H)])
            o = quotient(o, below[:, None] + Number(kind.eps))
        os.append(o)
    return np.stack(os), expected[0]


def mamba(layer) -> Naive:
    E, N = layer.d_inner, layer.d_state
    x, dt, A = normal(T, E), torch.rand(T, E, dtype=torch.float64), -torch.rand(E, N, dtype=torch.float64)
    B, C = normal(T, N), normal(T, N)
    h, ys, A_ = numbers(torch.zeros(E, N)), [], numbers(A)
    for x_t, Δ, B_t, C_t in zip(*map(numbers, (x, dt, B, C)), strict=True):
        h = exp(Δ[:, None] * A_) * h + outer(Δ * x_t, B_t)
        ys.append(h @ C_t)
    return np.stack(ys), ops.selective_scan(x[None], dt[None], A, B[None], C[None])[0][0]


def mamba2(layer) -> Naive:
    H, K, V = layer.n_heads, layer.d_state, layer.d_inner // layer.n_heads
    q, k, u = normal(T, H, K), normal(T, H, K), normal(T, H, V)
    dt, A = torch.rand(T, H, dtype=torch.float64), -torch.rand(H, dtype=torch.float64)
    h, ys, A_ = numbers(torch.zeros(H, K, V)), [], numbers(A)
    for q_t, k_t, u_t, Δ in zip(*map(numbers, (q, k, u, dt)), strict=True):
        v_t = Δ[:, None] * u_t
        h = exp(Δ * A_)[:, None, None] * h + np.stack([outer(k_t[i], v_t[i]) for i in range(H)])
        ys.append(np.stack([q_t[i] @ h[i] for i in range(H)]))
    o, _ = ops.linear_attention(q[None], k[None], (dt[..., None] * u)[None], log_decay=(dt * A)[None], scale=1.0)
    return np.stack(ys), o[0]


def delta(layer) -> Naive:
    H, K, V = layer.n_heads, layer.d_key, layer.d_value
    q, k, v = normal(T, H, K), nn.functional.normalize(normal(T, H, K), dim=-1), normal(T, H, V)
    beta, decays = torch.rand(T, H, dtype=torch.float64), isinstance(layer, layers.GatedDeltaNet)
    g = -torch.rand(T, H, dtype=torch.float64) if decays else None
    S, os = numbers(torch.zeros(H, K, V)), []
    α = numbers(torch.zeros(T, H) if g is None else g.exp())
    for q_t, k_t, v_t, β, α_t in zip(*map(numbers, (q, k, v, beta)), α, strict=True):
        S = α_t[:, None, None] * S if decays else S
        write = β[:, None] * (v_t - np.stack([k_t[h] @ S[h] for h in range(H)]))
        S = S + np.stack([outer(k_t[h], write[h]) for h in range(H)])
        os.append(np.stack([q_t[h] @ S[h] for h in range(H)]))
    o, _ = ops.delta_rule(q[None], k[None], v[None], beta[None], log_decay=None if g is None else g[None], scale=1.0)
    return np.stack(os), o[0]


def rwkv7(layer) -> Naive:
    H, K = layer.n_heads, layer.d_head
    r, k, v, rate = normal(T, H, K), normal(T, H, K), normal(T, H, K), torch.rand(T, H, K, dtype=torch.float64)
    κ, w = nn.functional.normalize(normal(T, H, K), dim=-1), -torch.rand(T, H, K, dtype=torch.float64)
    S, os = numbers(torch.zeros(H, K, K)), []  # keys by values: the paper's S^T
    for r_t, w_t, k_t, v_t, κ_t, a_t in zip(*map(numbers, (r, w.exp(), k, v, κ, rate)), strict=True):
        remove = a_t * κ_t
        read = [κ_t[h] @ S[h] for h in range(H)]
        S = w_t[..., None] * S - np.stack([outer(remove[h], read[h]) for h in range(H)])
        S = S + np.stack([outer(k_t[h], v_t[h]) for h in range(H)])
        os.append(np.stack([r_t[h] @ S[h] for h in range(H)]))
    o, _ = ops.rwkv7(*(z[None] for z in (r, w, k, v, -κ, κ * rate)))
    return np.stack(os), o[0]


def wkv(layer) -> Naive:
    N, turns = layer.d_state, isinstance(layer, layers.ComplexRWKV)
    k, v, u = normal(T, N), normal(T, N), normal(N)
    w = -torch.rand(N, dtype=torch.float64)
    if turns:
        v, w = torch.complex(v, normal(T, N)), torch.complex(w, normal(N))
    λ = numbers(torch.exp(1j * w.imag) if turns else torch.ones(N))  # the turn of the decay
    b, p, decay, u_ = numbers(torch.zeros(N)), numbers(torch.full((N,), -100.0)), numbers(w.real), numbers(u)
    a, os = numbers(torch.zeros_like(v[0])), []
    for k_t, v_t in zip(numbers(k), numbers(v), strict=True):
        m = top(p, u_ + k_t)
        past, now = exp(p - m), exp(u_ + k_t - m)
        os.append(quotient(past * real(a) + now * real(v_t), past * b + now))
        m = top(p + decay, k_t)
        past, now, p = exp(p + decay - m), exp(k_t - m), m
        polar = np.frompyfunc(lambda r, φ: Number(r.value * φ.value), 2, 1)(past, λ) if turns else past
        a, b = polar * a + now * v_t, past * b + now
    o, _ = ops.wkv(k[None], v[None], w, u)
    return np.stack(os), o[0].real


def aaren(layer) -> Naive:
    H, V = layer.n_heads, layer.d_head
    l, v = normal(T, H), normal(T, H, V)
    m, z, y, os = numbers(torch.full((H,), -100.0)), numbers(torch.zeros(H)), numbers(torch.zeros(H, V)), []
    for l_t, v_t in zip(numbers(l), numbers(v), strict=True):
        larger = top(m, l_t)
        before, now, m = exp(m - larger), exp(l_t - larger), larger
        z, y = before * z + now, before[:, None] * y + now[:, None] * v_t
        os.append(quotient(y, z[:, None]))
    return np.stack(os), ops.softmax_scan(l[None], v[None])[0][0]


def ema(layer) -> Naive:
    return state_spaces(*(p.detach() for p in layer.ema.coefficients()))


def assert_close(got: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(value(got).tolist(), dtype=expected.dtype), expected, rtol=1e-9, atol=1e-9)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Naive]]] = {
    "lru": ("lru", {"d_state": 3}, lambda y: diagonal(y.eigenvalues())),
    "slru": ("slru", {"d_state": 3}, lambda y: diagonal(y.eigenvalues())),
    "s4d": ("s4d", {"d_state": 4}, s4d),
    "s5": ("s5", {"d_state": 6}, lambda y: diagonal(y.discrete()[0])),
    "s5, all states": ("s5", {"d_state": 6, "conj_sym": False}, lambda y: diagonal(y.discrete()[0])),
    "rglru": ("rglru", {}, rglru),
    "hgrn": ("hgrn", {"d_state": 3}, hgrn),
    "hgrn, complex": ("hgrn", {"d_state": 3, "complex": True}, hgrn),
    **{
        f"linear attention, {name}": ("linear_attention", {"n_heads": 2, "d_key": 3, "feature_map": name}, kernel)
        for name in ("identity", "elu", "cosine", "taylor", "exp", "softmax")
    },
    "performer": ("performer", {"n_heads": 2, "n_features": 5}, kernel),
    "retnet": ("retnet", {"n_heads": 2, "d_value": 3}, lambda y: matrices(y.n_heads, y.d_key, y.d_value, "head")),
    "gla": ("gla", {"n_heads": 2, "d_value": 3}, lambda y: matrices(y.n_heads, y.d_key, y.d_value, "channel")),
    "mamba": ("mamba", {"d_state": 3, "expand": 1}, mamba),
    "mamba2": ("mamba2", {"d_state": 3, "expand": 1, "d_head": 8}, mamba2),
    "deltanet": ("deltanet", {"n_heads": 2, "d_key": 3, "d_value": 4}, delta),
    "gated_deltanet": ("gated_deltanet", {"n_heads": 2, "d_key": 3, "d_value": 4}, delta),
    "aaren": ("aaren", {"n_heads": 2}, aaren),
    "rwkv7": ("rwkv7", {"n_heads": 4}, rwkv7),
    "rwkv4": ("rwkv4", {"d_state": 3}, wkv),
    "token_mix": ("token_mix", {"d_state": 3}, wkv),
    "complex_rwkv": ("complex_rwkv", {"d_state": 3}, wkv),
}


@pytest.mark.parametrize("case", CASES)
def test_recurrences_are_what_they_take_written_out(case):
    name, options, naive = CASES[case]
    layer = layers.build(name, D, **options).double()
    Number.made = 0
    with torch.no_grad():
        got, expected = naive(layer)
    assert_close(got, expected)
    filters = sum(module.weight.numel() for module in layer.modules() if isinstance(module, ShortConv))
    assert linrnn.flops(layer, T, part="recurrence") == Number.made + T * filters


def test_mega_counts_its_average_and_its_chunks():
    layer = layers.build("mega", D, d_state=3, chunk_size=4).double()
    Number.made = 0
    with torch.no_grad():
        got, expected = ema(layer)
    assert_close(got, expected)
    attention = layer.d_key + layer.d_value
    assert linrnn.flops(layer, T, part="recurrence") == Number.made + T * 4 * attention
    assert linrnn.flops(layer, 3, part="recurrence") == Number.made // T * 3 + 3 * 3 * attention
    whole = layers.build("mega", D, d_state=3, chunk_size=None)
    assert linrnn.flops(whole, T, part="recurrence") == Number.made + T * T * attention
