"""S4D against dense systems, the paper's kernel and its own forms; the common properties are in test_contract.py."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import S4D
from linrnn.layers.hippo import legs, normal_legs, s4d_eigenvalues
from linrnn.layers.s4d import S4DState

MODES = ("chunk", "conv", "scan")


def complex_C(layer: S4D) -> Tensor:
    return torch.complex(layer.C[..., 0], layer.C[..., 1])


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_equals_the_dense_system(disc: str) -> None:
    """The normal part of LegS, dense and real, discretised by a matrix exponential or a solve, run token by token."""
    D, N, T = 4, 8, 63
    layer = S4D(D, d_state=N, init="legs", disc=disc, output=None).double()
    A, B = legs(N)
    A = A + B[:, None] * B / 2
    λ, V = normal_legs(N)
    with torch.no_grad():  # float32 rounded them
        layer.log_A_real.fill_(math.log(0.5))
        layer.A_imag.copy_(λ.imag.expand(D, -1))
    W_in = 2 * V.sum(1).real  # V V^* and conjugates: ones in the eigenbasis
    W_out = 2 * (complex_C(layer) @ V.mH).real  # (D, N)
    x, one = torch.randn(3, T, D, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    y, state = layer(x)
    for d in range(D):
        dt = layer.log_dt[d].exp()
        if disc == "zoh":
            Ad = torch.linalg.matrix_exp(dt * A)
            Bd = torch.linalg.solve(A, (Ad - one) @ W_in)
        else:
            Ad = torch.linalg.solve(one - dt / 2 * A, one + dt / 2 * A)
            Bd = torch.linalg.solve(one - dt / 2 * A, dt * W_in)
        h, expected = torch.zeros(3, N, dtype=torch.float64), []
        for t in range(T):
            h = h @ Ad.T + x[:, t, d, None] * Bd
            expected.append(h @ W_out[d] + layer.D[d] * x[:, t, d])
        torch.testing.assert_close(y[..., d], torch.stack(expected, 1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state.h[:, d], h.to(V.dtype) @ V.conj(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_equals_the_convolution_with_the_kernel_of_the_paper(init: str, disc: str) -> None:
    D, N, T = 4, 16, 200
    layer = S4D(D, d_state=N, init=init, disc=disc, output=None).double()
    A, dt = s4d_eigenvalues(init, N), layer.log_dt.exp()[:, None]
    if disc == "zoh":
        Ad, Bd = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        Ad, Bd = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    K = 2 * (complex_C(layer) * Bd * Ad ** torch.arange(T)[:, None, None]).real.sum(-1)  # (T, D)
    x = torch.randn(2, T, D, dtype=torch.float64)
    expected = torch.stack([(K[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(T)], 1) + layer.D * x
    # float32 holds A at the start, and the largest frequencies turn it into phases
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


def results(layer: S4D, x: Tensor, state: Any = None, **kwargs: Any) -> list[Tensor]:
    """y on real tokens, the final state, and the gradients of both by all parameters, x and the state."""
    sources = [*layer.parameters(), x] + ([] if state is None else [state.h])
    y, final = layer(x, state, **kwargs)
    if "mask" in kwargs:
        y = torch.where(kwargs["mask"][..., None], y, 0)
    outputs = [y, *([] if final is None else [torch.view_as_real(final.h)])]
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in outputs)
    return [*outputs, *torch.autograd.grad(loss, sources)]


@pytest.mark.parametrize("T", [1, 63, 1000])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_forms_agree(T: int, bidirectional: bool) -> None:
    layer = S4D(16, d_state=8, bidirectional=bidirectional).double()
    x = torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)
    state = None
    if not bidirectional:
        h = layer(torch.randn(2, 5, 16, dtype=torch.float64))[1].h
        state = S4DState(h.detach().requires_grad_())
    mask, reset = torch.rand(2, T) < 0.7, torch.rand(2, T) < 0.02
    for kwargs in ({}, {"mask": mask}, {"reset": reset}, {"mask": mask, "reset": reset}):
        seen = []
        for mode in MODES:
            layer.mode = mode
            seen.append(results(layer, x, state, **kwargs))
        for ours in seen[1:]:
            for v, w in zip(ours, seen[0], strict=True):
                torch.testing.assert_close(v, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("init", ["lin", "inv"])
def test_forms_in_float32(init: str, mode: str) -> None:
    """Within a few roundings of float64 at 4000 tokens, with frequencies of up to 129 radians a token.

    The scan multiplies by a rounded number at every token: its errors add up for as long as a state lasts.
    """
    layer = S4D(16, d_state=64, init=init, mode=mode)
    exact = copy.deepcopy(layer).double()
    exact.mode = "scan"
    x = torch.randn(1, 4000, 16)
    with torch.no_grad():
        (y, state), (expected, expected_state) = layer(x), exact(x.double())
    lasts = (1 / -torch.expm1(layer.discrete()[0].real)).mean().item()
    roundings = lasts if mode == "scan" else 20
    for ours, theirs in ((y, expected), (state.h, expected_state.h)):
        assert (ours - theirs).norm() < roundings * torch.finfo(torch.float32).eps * theirs.norm()


def test_bidirectional_is_a_layer_each_way() -> None:
    both = S4D(16, d_state=8, bidirectional=True, output=None).double()
    halves = [S4D(16, d_state=8, output=None).double() for _ in range(2)]
    with torch.no_grad():
        for half, C in zip(halves, both.C, strict=True):
            for name in ("log_dt", "log_A_real", "A_imag", "D"):
                getattr(half, name).copy_(getattr(both, name))
            half.C.copy_(C)
        halves[1].D.zero_()
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    expected = halves[0](x)[0] + halves[1](x.flip(1))[0].flip(1)
    torch.testing.assert_close(both(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_what_follows_the_state_space() -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = S4D(16, output=None).double()
    y = torch.nn.functional.gelu(plain(x)[0])
    for output, width in (("linear", 16), ("glu", 32)):
        layer = S4D(16, output=output).double()
        layer.load_state_dict(plain.state_dict(), strict=False)
        assert layer.out_proj.weight.shape == (width, 16)
        a, b = layer.out_proj(y).split(16, -1) if output == "glu" else (layer.out_proj(y), None)
        torch.testing.assert_close(layer(x)[0], a if b is None else a * torch.sigmoid(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_initialisation(init: str) -> None:
    layer = S4D(512, init=init, dt_min=0.01, dt_max=1.0)
    λ = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    torch.testing.assert_close(λ[0], s4d_eigenvalues(init, 64).to(λ.dtype), rtol=1e-6, atol=0)
    assert (λ == λ[0]).all()
    share = ((layer.log_dt - math.log(0.01)) / math.log(100)).sort().values
    torch.testing.assert_close(share, torch.linspace(0, 1, 512), rtol=0, atol=0.1)
    torch.testing.assert_close(complex_C(layer).abs().square().mean().item(), 1.0, rtol=0.05, atol=0)
    assert S4D(8).d_state == 8 and S4D(7).d_state == 6 and S4D(1).d_state == 2 and layer.d_state == 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-300.0, -20.0, 3.0, 300.0])
@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_stable_whatever_the_parameters(disc: str, value: float, dtype: torch.dtype) -> None:
    layer = S4D(16, disc=disc).to(dtype)
    names = ("log_dt", "log_A_real", "A_imag")
    with torch.no_grad():
        for name in names:
            getattr(layer, name).fill_(value)
    assert (layer.discrete()[0].real < 0).all()
    y, _ = layer(torch.randn(2, 100, 16, dtype=dtype))
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(getattr(layer, name).grad.isfinite().all() for name in names)


def test_phases_and_states_are_exact() -> None:
    layer = S4D(16).bfloat16()
    assert layer.discrete()[0].dtype == torch.complex128
    assert layer(torch.zeros(1, 200, 16, dtype=torch.bfloat16))[1].h.dtype == torch.complex64


def test_optimiser_hints() -> None:
    hint = {"lr_scale": 0.25, "weight_decay": 0.0}
    assert S4D(16, lr_scale=0.25).optim_hints() == {"log_dt": hint, "log_A_real": hint, "A_imag": hint}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_state": 7}, "d_state: expected an even size, .* got 7"),
        ({"init": "dplr"}, r"init: expected one of 'lin', 'inv', 'legs', got 'dplr'"),
        ({"disc": "dss"}, r"disc: expected one of 'zoh', 'bilinear', got 'dss'"),
        ({"output": "gelu"}, r"output: expected one of 'glu', 'linear', None, got 'gelu'"),
        ({"mode": "fft"}, r"mode: expected one of 'auto', 'chunk', 'conv', 'scan', got 'fft'"),
        ({"dt_min": 0.0}, r"dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got 0\.0, 0\.1"),
        ({"dt_max": 1e-4}, "dt_min, dt_max: .* got 0.001, 0.0001"),
        ({"lr_scale": None}, r"lr_scale: expected a number in \(0, 1\], got None"),
        ({"lr_scale": 2.0}, r"lr_scale: expected a number in \(0, 1\], got 2\.0"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4D(16, **kwargs)
