"""S5 against a dense system and its own variants; the common properties are in test_contract.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import S5
from linrnn.layers.hippo import legs, normal_legs


def get_complex(layer: S5) -> tuple[Tensor, Tensor]:
    """Returns B̃ (P, D) and C̃ (D, P), out of the parameters as the paper writes them."""
    return torch.complex(layer.B[:, 0], layer.B[:, 1]), torch.complex(layer.C[..., 0], -layer.C[..., 1])


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_the_dense_system(blocks: int, disc: str) -> None:
    """Blocks of the normal part of LegS, dense and real, before the change of basis; one Δ for all."""
    D, N, T = 16, 12, 63
    layer = S5(D, d_state=N, blocks=blocks, disc=disc, activation=None)
    with torch.no_grad():
        layer.log_dt.fill_(math.log(0.05))
    layer.double()
    A, b = legs(N // blocks)
    A = torch.block_diag(*[A + b[:, None] * b / 2] * blocks)
    λ, V = normal_legs(N // blocks)
    with torch.no_grad():  # float32 rounds the large frequencies
        layer.Lambda_im.copy_(λ.imag.repeat(blocks))
    V = torch.block_diag(*[V] * blocks)  # (N, P)
    B, C = get_complex(layer)
    B_dense, C_dense = 2 * (V @ B).real, 2 * (C @ V.mH).real
    torch.testing.assert_close(V.mH @ B_dense.to(V.dtype), B, rtol=1e-5, atol=1e-6)  # B̃ was V^* times a real matrix
    B_dense = B_dense.detach()
    one, dt = torch.eye(N, dtype=torch.float64), layer.log_dt[0].exp()
    if disc == "zoh":
        Ad = torch.linalg.matrix_exp(dt * A)
        Bd = torch.linalg.solve(A, (Ad - one) @ B_dense)
    else:
        Ad = torch.linalg.solve(one - dt / 2 * A, one + dt / 2 * A)
        Bd = torch.linalg.solve(one - dt / 2 * A, dt * B_dense)
    x = torch.randn(3, T, D, dtype=torch.float64)
    h, expected = torch.zeros(3, N, dtype=torch.float64), []
    for t in range(T):
        h = h @ Ad.T + x[:, t] @ Bd.T
        expected.append(h @ C_dense.T + layer.D * x[:, t])
    y, state = layer(x)
    torch.testing.assert_close(y, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.h, h.to(V.dtype) @ V.conj(), rtol=1e-5, atol=1e-5)


def test_conjugate_symmetry_halves_the_states() -> None:
    half = S5(16, d_state=32, blocks=2, activation=None).double()
    full = S5(16, d_state=32, blocks=2, conj_sym=False, activation=None).double()
    with torch.no_grad():
        full.D.copy_(half.D)
        for name in ("Lambda_re", "Lambda_im", "log_dt", "B"):
            mine = getattr(half, name)
            getattr(full, name).copy_(torch.cat((mine, mine)))
        full.Lambda_im[16:] *= -1
        full.B[16:, 1] *= -1
        full.C.copy_(torch.cat((half.C, half.C * torch.tensor([1, -1])), 1))
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    (y, state), (expected, expected_state) = half(x), full(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.h, expected_state.h[:, :16], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.h.conj().resolve_conj(), expected_state.h[:, 16:], rtol=1e-12, atol=1e-12)


def test_bidirectional_reads_both_scans() -> None:
    both = S5(16, bidirectional=True, activation=None).double()
    halves = [S5(16, activation=None).double() for _ in range(2)]
    with torch.no_grad():
        for half, C in zip(halves, both.C.chunk(2, 1), strict=True):
            for name in ("Lambda_re", "Lambda_im", "log_dt", "B", "D"):
                getattr(half, name).copy_(getattr(both, name))
            half.C.copy_(C)
        halves[1].D.zero_()
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    expected = halves[0](x)[0] + halves[1](x.flip(1))[0].flip(1)
    torch.testing.assert_close(both(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_activations() -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = S5(16, activation=None).double()
    y, _ = plain(x)
    g = F.gelu(y)
    for activation in ("half_glu1", "half_glu2", "full_glu", "gelu"):
        layer = S5(16, activation=activation).double()
        layer.load_state_dict(plain.state_dict(), strict=False)
        if activation == "gelu":
            expected = g
        elif activation == "full_glu":
            a, b = layer.gate(g).split(16, -1)
            expected = a * torch.sigmoid(b)
        else:
            expected = (g if activation == "half_glu1" else y) * torch.sigmoid(layer.gate(g))
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_initialisation() -> None:
    layer = S5(512, d_state=1024, blocks=8, dt_min=0.01, dt_max=1.0)
    λ, _ = normal_legs(128)
    torch.testing.assert_close(layer.Lambda_im, λ.imag.float().repeat(8), rtol=1e-6, atol=0)
    assert (layer.Lambda_re == -0.5).all()
    share = ((layer.log_dt - math.log(0.01)) / math.log(100)).sort().values
    torch.testing.assert_close(share, torch.linspace(0, 1, 512), rtol=0, atol=0.1)
    B, C = get_complex(layer)
    # a unitary basis keeps squares: of N real rows of variance 1 / D half are left, and C has two parts of 1 / N
    torch.testing.assert_close(B.abs().square().sum().item(), 1024 / 2, rtol=0.01, atol=0)
    torch.testing.assert_close(C.abs().square().mean().item(), 2 / 1024, rtol=0.01, atol=0)


def test_B_is_cut_off_at_two_deviations() -> None:
    layer = S5(256, d_state=2, blocks=1)
    _, V = normal_legs(2)
    B = 2 * (V.to(torch.complex64) @ get_complex(layer)[0]).real
    assert 1.9 / 0.8796 < B.abs().max() * 16 < 2 / 0.8796 + 1e-4
    torch.testing.assert_close(B.var().item() * 256, 1.0, rtol=0.15, atol=0)


@pytest.mark.parametrize(("d_state", "blocks"), [(16, 1), (64, 2), (80, 2), (96, 3), (112, 2), (512, 16), (34, 1)])
def test_default_blocks(d_state: int, blocks: int) -> None:
    assert S5(16, d_state=d_state).blocks == blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-300.0, -20.0, 3.0, 300.0])
@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_stable_whatever_the_parameters(disc: str, value: float, dtype: torch.dtype) -> None:
    layer = S5(16, disc=disc).to(dtype)
    names = ("Lambda_re", "Lambda_im", "log_dt")
    with torch.no_grad():
        for name in names:
            getattr(layer, name).fill_(value)
    assert (layer.discrete()[0].abs() < 1).all()
    y, _ = layer(torch.randn(2, 100, 16, dtype=dtype))
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(getattr(layer, name).grad.isfinite().all() for name in names)


def test_clip_eigs() -> None:
    for clip_eigs in (True, False):
        layer = S5(16, clip_eigs=clip_eigs, dt_min=0.1, dt_max=0.1).double()
        with torch.no_grad():
            layer.Lambda_re.fill_(1.0)
        expected = math.exp(-1e-5 if clip_eigs else 0.1)
        size = layer.discrete()[0].abs()
        torch.testing.assert_close(size, torch.full_like(size, expected), rtol=1e-6, atol=0)


def test_optimiser_hints() -> None:
    hint = {"lr_scale": 0.5, "weight_decay": 0.0}
    assert S5(16, lr_scale=0.5).optim_hints() == dict.fromkeys(("Lambda_re", "Lambda_im", "log_dt", "B"), hint)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_state": 7}, "d_state: expected an even size, .* got 7"),
        ({"blocks": 0}, "blocks: expected an integer >= 1, got 0"),
        ({"blocks": 3}, "blocks: expected a divisor of d_state / 2 = 8, got 3"),
        ({"disc": "dss"}, r"disc: expected one of 'zoh', 'bilinear', got 'dss'"),
        ({"activation": "relu"}, r"activation: expected one of 'half_glu1', .*, None, got 'relu'"),
        ({"dt_max": 1e-4}, "dt_min, dt_max: .* got 0.001, 0.0001"),
        ({"lr_scale": 0.0}, r"lr_scale: expected a number in \(0, 1\], got 0\.0"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S5(16, **kwargs)
