"""HiPPO-LegS, its normal part, S4D's eigenvalues and the discretisations against dense linear algebra."""

import math

import pytest
import torch
from torch import Tensor

from linrnn.layers.hippo import discretize, legs, normal_legs, s4d_eigenvalues


def test_legs_entry_by_entry() -> None:
    A, B = legs(5)
    for n in range(5):
        assert B[n] == math.sqrt(2 * n + 1)
        for k in range(5):
            expected = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
            torch.testing.assert_close(A[n, k].item(), float(expected), rtol=1e-15, atol=0)


@pytest.mark.parametrize("N", [2, 6, 64, 256])
def test_the_normal_part(N: int) -> None:
    A, B = legs(N)
    normal = A + B[:, None] * B / 2  # the rank-one part is P P^T, P = sqrt(n + 1/2)
    torch.testing.assert_close(normal + normal.T, -torch.eye(N, dtype=A.dtype), rtol=0, atol=1e-12 * N**2)
    λ, V = normal_legs(N)
    both, vectors = torch.cat((λ, λ.conj())), torch.cat((V, V.conj()), 1)
    assert (λ.imag > 0).all() and (λ.imag.diff() > 0).all() and (λ.real == -0.5).all()
    dense = torch.linalg.eigvals(normal)
    dense = dense[dense.imag.argsort()][N // 2 :]
    torch.testing.assert_close(λ, dense, rtol=1e-12, atol=1e-12 * N)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(N, dtype=V.dtype), rtol=0, atol=1e-11)
    assert torch.linalg.cond(vectors) < 1 + 1e-10
    rebuilt = vectors @ torch.diag(both) @ vectors.mH
    torch.testing.assert_close(rebuilt, normal.to(V.dtype), rtol=0, atol=1e-13 * N**2)


def test_eigenvectors_of_legs_itself_would_not_do() -> None:
    A, _ = legs(16)
    assert torch.linalg.cond(torch.linalg.eig(A)[1]) > 1e9


@pytest.mark.parametrize("N", [2, 16, 64])
def test_closed_forms(N: int) -> None:
    for n in range(N // 2):
        assert s4d_eigenvalues("lin", N)[n] == complex(-0.5, math.pi * n)
        inv = s4d_eigenvalues("inv", N)[n]
        torch.testing.assert_close(inv.item(), complex(-0.5, N / math.pi * (N / (2 * n + 1) - 1)), rtol=1e-14, atol=0)
    assert torch.equal(s4d_eigenvalues("legs", N), normal_legs(N)[0])


def test_inv_approximates_legs() -> None:
    legs_ω, inv = (s4d_eigenvalues(init, 256).imag.sort().values for init in ("legs", "inv"))
    torch.testing.assert_close(inv[-8:], legs_ω[-8:], rtol=0.06, atol=0)  # the largest frequencies, N² / π (2n+1)


def dense_step(A: Tensor, B: Tensor, dt: float, method: str) -> tuple[Tensor, Tensor]:
    """Discretises a dense system: the exact response to a constant input, or the trapezoidal rule."""
    one = torch.eye(len(A), dtype=A.dtype)
    if method == "zoh":  # the input as a state that never changes: no difference of nearly equal numbers
        n = len(A)
        both = torch.linalg.matrix_exp(dt * torch.cat((torch.cat((A, B), 1), torch.zeros(B.shape[1], n + B.shape[1]))))
        return both[:n, :n], both[:n, n:]
    inverse = torch.linalg.inv(one - dt / 2 * A)
    return inverse @ (one + dt / 2 * A), dt * inverse @ B


@pytest.mark.parametrize("dt", [1e-6, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretize_equals_the_dense_system(method: str, dt: float) -> None:
    λ, _ = normal_legs(8)
    A = torch.stack([torch.stack((torch.stack((v.real, -v.imag)), torch.stack((v.imag, v.real)))) for v in λ])
    log_a, factor = discretize(λ, torch.tensor(dt, dtype=torch.float64), method)
    for i, block in enumerate(A):
        Ad, Bd = dense_step(block, torch.tensor([[1.0], [0.0]], dtype=torch.float64), dt, method)
        torch.testing.assert_close(log_a[i].exp(), torch.complex(Ad[0, 0], Ad[1, 0]), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(factor[i], torch.complex(Bd[0, 0], Bd[1, 0]), rtol=1e-8, atol=0)


def test_no_cancellation_at_small_steps() -> None:
    λ, dt = normal_legs(8)[0], 1e-6
    z = λ * dt
    _, factor = discretize(λ, torch.tensor(dt, dtype=torch.float64), "zoh")
    torch.testing.assert_close(factor, dt * (1 + z / 2 + z**2 / 6 + z**3 / 24), rtol=1e-15, atol=0)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretize_at_its_corners(method: str) -> None:
    """A state that only adds up, one that forgets all at once, and steps of a hair and of an age."""
    values = torch.tensor([0, -2, -1e-12, -1e12 + 1e12j, 1e6j], dtype=torch.complex128)
    λ = values.clone().requires_grad_()
    log_a, factor = discretize(λ, torch.ones((), dtype=torch.float64), method)
    assert (log_a.real <= 1e-15).all() and log_a.isfinite().all()
    torch.testing.assert_close(factor[0].item(), 1 + 0j, rtol=1e-12, atol=0)
    torch.testing.assert_close(factor[2].item(), 1 + 0j, rtol=1e-9, atol=0)
    (log_a.abs().sum() + factor.abs().sum()).backward()
    assert λ.grad is not None and λ.grad.isfinite().all()


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_derivatives(method: str) -> None:
    λ = torch.complex(-torch.rand(4, dtype=torch.float64) - 0.1, torch.randn(4, dtype=torch.float64)).requires_grad_()
    dt = torch.rand(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda λ, dt: discretize(λ, dt, method), (λ, dt))
