"""HiPPO-LegS and its diagonal relatives: where the eigenvalues of S4D and S5 start, and how time becomes discrete.

LegS (Gu et al. 2020, arXiv:2008.07669) is A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k, and
B_n = sqrt(2n+1). Its eigenvectors have a condition that grows exponentially with N, so A is never diagonalised itself:
A + P P^T with P_n = sqrt(n + 1/2) is -1/2 I plus a skew-symmetric matrix S ("the normal part", Gu et al. 2021,
arXiv:2111.00396, theorem 1), and -i S is Hermitian: its eigenvectors are unitary and its eigenvalues real.
"""

import math

import torch
from torch import Tensor

from linrnn.layers.base import accumulation_dtype

INITS = ("lin", "inv", "legs")
DISCRETISATIONS = ("zoh", "bilinear")


def legs(N: int) -> tuple[Tensor, Tensor]:
    """Returns the HiPPO-LegS matrix A (N, N) and B (N), float64."""
    n = torch.arange(N, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    return -(B[:, None] * B).tril(-1) - torch.diag(n + 1), B


def normal_legs(N: int) -> tuple[Tensor, Tensor]:
    """Diagonalises the normal part of LegS, A + P P^T = V diag(λ) V^*.

    Returns the eigenvalues with positive imaginary parts, λ (N / 2) complex128, the smallest first, and their
    eigenvectors V (N, N / 2), orthonormal columns. The other half is the complex conjugate. N is even.
    """
    A, B = legs(N)
    S = (A + B[:, None] * B / 2).tril(-1)  # the normal part is -1/2 on the diagonal, S below and -S^T above it
    ω, V = torch.linalg.eigh(-1j * (S - S.mT).to(torch.complex128))
    return torch.complex(torch.full_like(ω[N // 2 :], -0.5), ω[N // 2 :]), V[:, N // 2 :]


def s4d_eigenvalues(init: str, N: int) -> Tensor:
    """Returns λ (N / 2) complex128, one of each conjugate pair, for an even N (S4D, section 4).

    "lin": -1/2 + iπn; "inv": -1/2 + i (N/π) (N / (2n+1) - 1); "legs": the normal part of LegS.
    """
    if init == "legs":
        return normal_legs(N)[0]
    n = torch.arange(N // 2, dtype=torch.float64)
    ω = math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(ω, -0.5), ω)


def discretize(λ: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Turns h'(t) = λ h + B x into h_t = exp(log_a) h_{t-1} + f B x_t; returns log_a and f, shaped and typed like λ dt.

    "zoh": log_a = λ dt and f = (exp(λ dt) - 1) / λ, exact where x is constant between tokens. "bilinear":
    exp(log_a) = (1 + λ dt / 2) / (1 - λ dt / 2) and f = dt / (1 - λ dt / 2).

    Args:
        λ: complex, real parts at most 0.
        dt: real, positive.
    """
    λ = torch.where(λ == 0, torch.finfo(λ.dtype).eps, λ)  # an integral of x, which has no quotient
    z = λ * dt
    if method == "zoh":
        return z, _expm1(z) / λ
    over, under = 1 + z / 2, 1 - z / 2
    over = torch.where(over == 0, torch.finfo(z.dtype).eps, over)  # a state that forgets all has no logarithm
    return over.log() - under.log(), dt / under


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without cancellation at small z."""
    r, half = z.real.exp(), z.imag / 2
    return torch.complex(torch.expm1(z.real) * z.imag.cos() - 2 * half.sin().square(), r * z.imag.sin())


def inside_circle(log_a: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log_a with |exp(log_a)| at most so far below one that a layer of `dtype` does not round it to one."""
    return torch.complex(log_a.real.clamp(max=-4 * torch.finfo(accumulation_dtype(dtype)).eps), log_a.imag)


def exact_dtype(v: Tensor) -> torch.dtype:
    """Returns float64, in which phases over long times stay exact; float32 on devices that have no float64."""
    return torch.float32 if v.device.type == "mps" else torch.float64


def check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
