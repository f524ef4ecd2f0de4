"""LRU and SLRU against independent forms of the same mathematics; the common properties are in test_contract.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn import layers
from linrnn.layers import LRU, SLRU


def set_complex(layer: LRU, λ: Tensor, B: Tensor, C: Tensor) -> None:
    """Gives the layer complex eigenvalues (N), B (N, D) and C (D, N), and γ = 1."""
    with torch.no_grad():
        layer.nu_log.copy_((-λ.abs().log()).log())
        layer.theta_log.copy_((λ.angle() % (2 * math.pi)).log())
        layer.gamma_log.zero_()
        layer.B.copy_(torch.stack((B.real, B.imag), 1))
        layer.C.copy_(torch.stack((C.real, -C.imag), -1))


def get_complex(layer: LRU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns λ (N), γ (N), complex B (N, D) and C (D, N), out of the parameters as the paper writes them."""
    λ = torch.exp(-layer.nu_log.exp() + 1j * layer.theta_log.exp())
    B = torch.complex(layer.B[:, 0], layer.B[:, 1])
    C = torch.complex(layer.C[..., 0], -layer.C[..., 1])
    return λ, layer.gamma_log.exp(), B, C


def test_equals_the_dense_real_rnn() -> None:
    N, D, T = 8, 16, 63
    blocks = [
        r * torch.tensor([[math.cos(θ), -math.sin(θ)], [math.sin(θ), math.cos(θ)]], dtype=torch.float64)
        for r, θ in ((0.99, 0.3), (0.9, 2.0), (0.5, 3.0), (0.95, 1.0))
    ]
    basis = torch.randn(N, N, dtype=torch.float64)
    A = basis @ torch.block_diag(*blocks) @ basis.inverse()
    W_in, W_out = torch.randn(N, D, dtype=torch.float64), torch.randn(D, N, dtype=torch.float64)
    x = torch.randn(3, T, D, dtype=torch.float64)

    h, expected = torch.zeros(3, N, dtype=torch.float64), []
    for t in range(T):
        h = h @ A.T + x[:, t] @ W_in.T
        expected.append(h @ W_out.T)

    layer = LRU(D, d_state=N, use_D=False).double()
    λ, P = torch.linalg.eig(A)
    set_complex(layer, λ, P.inverse() @ W_in.to(P.dtype), W_out.to(P.dtype) @ P)
    torch.testing.assert_close(layer(x)[0], torch.stack(expected, 1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("T", [1, 63, 1000])
def test_equals_the_convolution_with_its_impulse_response(T: int) -> None:
    layer = LRU(16, d_state=8).double()
    λ, γ, B, C = get_complex(layer)
    x = torch.randn(2, T, 16, dtype=torch.float64)
    powers = λ ** torch.arange(T, dtype=torch.float64)[:, None]  # (T, N): the response of h to an impulse is γ λ^k B
    u = γ * (x.to(B.dtype) @ B.T)
    h = torch.fft.ifft(torch.fft.fft(u, 2 * T, dim=1) * torch.fft.fft(powers, 2 * T, dim=0), dim=1)[:, :T]
    expected = (h @ C.T).real + layer.D * x
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x)[1].h, h[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lru", "slru"])
def test_variance_of_the_state_at_initialisation(name: str) -> None:
    layer: Any = layers.build(name, d_model=64).double()
    r = layer.eigenvalues().abs()
    B_squared = layer.B.square().flatten(1).sum(1)
    torch.testing.assert_close(B_squared.mean().item(), 1.0, rtol=0.1, atol=0)

    # white input is a sum of impulses: E|h_t|² is the energy of the responses up to t
    impulse = torch.eye(64, dtype=torch.float64)
    _, state = layer.step(impulse, None)
    energy = state.h.abs().square().sum(0)
    for t in range(100):
        if t in (0, 9, 99):
            torch.testing.assert_close(energy, B_squared * (1 - r ** (2 * (t + 1))), rtol=1e-5, atol=1e-6)
        _, state = layer.step(torch.zeros_like(impulse), state)
        energy = energy + state.h.abs().square().sum(0)


def test_real_lru_equals_slru() -> None:
    lru, slru = LRU(16, d_state=32).double(), SLRU(16, use_D=True).double()
    with torch.no_grad():
        for name in ("nu_log", "gamma_log", "D"):
            getattr(slru, name).copy_(getattr(lru, name))
        lru.theta_log.fill_(-math.inf)  # θ = 0
        lru.B[:, 1] = 0
        lru.C[..., 1] = 0
        slru.B.copy_(lru.B[:, 0])
        slru.C.copy_(lru.C[..., 0])
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    (y, state), (y_real, state_real) = lru(x), slru(x)
    torch.testing.assert_close(y, y_real, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.h.real, state_real.h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lru", "slru"])
def test_bidirectional_is_half_a_layer_each_way(name: str) -> None:
    both: Any = layers.build(name, d_model=16, d_state=12, use_D=False, bidirectional=True).double()
    halves: list[Any] = [layers.build(name, d_model=16, d_state=6, use_D=False).double() for _ in range(2)]
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for half in halves for p in half.parameters())
    with torch.no_grad():
        for half, states in zip(halves, (slice(0, 6), slice(6, 12)), strict=True):
            for parameter in half.optim_hints():
                getattr(half, parameter).copy_(getattr(both, parameter)[states])
            half.C.copy_(both.C[:, states])
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    expected = halves[0](x)[0] + halves[1](x.flip(1))[0].flip(1)
    torch.testing.assert_close(both(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lru", "slru"])
def test_ring_initialisation(name: str) -> None:
    layer: Any = layers.build(name, d_model=16, d_state=4000, r_min=0.5, r_max=0.9)
    r = layer.eigenvalues().abs()
    assert 0.5 <= r.min() and r.max() <= 0.9
    share = ((r.square() - 0.25) / (0.81 - 0.25)).sort().values  # r² is uniform
    torch.testing.assert_close(share, torch.linspace(0, 1, 4000), rtol=0, atol=0.05)
    torch.testing.assert_close(layer.gamma_log.exp(), (1 - r.square()).sqrt(), rtol=1e-4, atol=0)


def test_phases_fill_the_range() -> None:
    for max_phase in (2 * math.pi, math.pi / 10):
        θ = LRU(16, d_state=4000, max_phase=max_phase).theta_log.exp().sort().values
        torch.testing.assert_close(θ / max_phase, torch.linspace(0, 1, 4000), rtol=0, atol=0.05)


def test_gamma_is_exact_near_the_circle() -> None:
    layer = LRU(16, r_min=1 - 1e-5, r_max=1 - 1e-5)
    ν = layer.nu_log.detach().double().exp()
    expected = (-torch.expm1(-2 * ν)).sqrt()
    torch.testing.assert_close(layer.gamma_log.detach().double().exp(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("name", ["lru", "slru"])
def test_the_ends_of_the_random_numbers(name: str, draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda t: torch.full_like(t, draw))
    layer = layers.build(name, d_model=16, r_min=0.0)
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-300.0, -20.0, 3.0, 300.0])
@pytest.mark.parametrize("name", ["lru", "slru"])
def test_stable_whatever_the_parameters(name: str, value: float, dtype: torch.dtype) -> None:
    layer: Any = layers.build(name, d_model=16).to(dtype)
    with torch.no_grad():
        layer.nu_log.fill_(value)
        if name == "lru":
            layer.theta_log.fill_(value)
    assert (layer.eigenvalues().abs() < 1).all()
    y, _ = layer(torch.randn(2, 63, 16, dtype=dtype))
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (layer.nu_log, getattr(layer, "theta_log", layer.nu_log)))


@pytest.mark.parametrize("name", ["lru", "slru"])
def test_stable_after_a_wild_step(name: str) -> None:
    layer: Any = layers.build(name, d_model=16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    layer(torch.randn(2, 63, 16))[0].square().sum().backward()
    optimizer.step()
    assert (layer.eigenvalues().abs() < 1).all()


def test_decays_stay_in_float32() -> None:
    layer = LRU(16).bfloat16()
    assert layer.eigenvalues().dtype == torch.complex64
    assert SLRU(16).half().eigenvalues().dtype == torch.float32
    assert layer.double().eigenvalues().dtype == torch.complex128


def test_variants_and_sizes() -> None:
    d = 32

    def count(layer: torch.nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters())

    assert count(LRU(d, variant="post")) == 4 * d * d + 3 * d
    assert count(LRU(d)) == 4 * d * d + 3 * d + d
    assert count(SLRU(d)) == 4 * d * d + 2 * (2 * d)
    assert LRU(d, variant="post", use_D=True).D is not None
    assert LRU(d, use_D=False).D is None
    bound = math.sqrt(6 / (d + 2 * d))
    post = LRU(d, variant="post")
    assert 0.95 * bound < post.B.abs().max() <= bound
    assert 0.95 * bound < post.C.abs().max() <= bound


def test_optimiser_hints() -> None:
    hints = LRU(16, lr_scale=0.25).optim_hints()
    assert hints == {
        "nu_log": {"lr_scale": 0.25, "weight_decay": 0.0},
        "theta_log": {"lr_scale": 0.25, "weight_decay": 0.0},
        "gamma_log": {"lr_scale": 0.25, "weight_decay": 0.0},
        "B": {"weight_decay": 0.0},
    }
    assert set(SLRU(16).optim_hints()) == {"nu_log", "gamma_log", "B"}


@pytest.mark.parametrize("name", ["lru", "slru"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_state": 7, "bidirectional": True}, "d_state: .* expected even, got 7"),
        ({"r_min": -0.1}, r"r_min, r_max: .* got -0\.1"),
        ({"r_min": 0.9, "r_max": 0.8}, r"r_min, r_max: .* got 0\.9, 0\.8"),
        ({"r_max": 1.0}, r"r_min, r_max: .* got 0\.9, 1\.0"),
        ({"r_min": 0.0, "r_max": 0.0}, r"r_min, r_max: .* got 0\.0, 0\.0"),
        ({"r_min": math.nan}, r"r_min, r_max: .* got nan"),
        ({"lr_scale": 0.0}, r"lr_scale: expected a number in \(0, 1\], got 0\.0"),
    ],
)
def test_bad_values(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers.build(name, d_model=16, **kwargs)


def test_bad_values_of_the_lru() -> None:
    with pytest.raises(ValueError, match=r'variant: expected "paper" or "post", got \'keras\''):
        LRU(16, variant="keras")
    for max_phase in (0.0, 7.0, math.nan):
        with pytest.raises(ValueError, match=f"max_phase: .* got {max_phase}"):
            LRU(16, max_phase=max_phase)
