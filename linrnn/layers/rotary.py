"""Rotary positions (Su et al. 2021, arXiv:2104.09864): R_t turns the pair (i, i + K/2) of a head by the angle t θ_i.

In linear attention they are a recurrence, S_t = R_{-1} S_{t-1} + k_t v_t^T, with R_1 a turn by θ: q_t^T S_t is
sum_j (R_t q_t)^T (R_j k_j) v_j^T. Written so, the state needs no position beside it, never sees a large angle, and a
reset needs no new count.
"""

import math

import torch
from torch import Tensor

from linrnn.layers.base import accumulation_dtype


def rotate(x: Tensor, position: Tensor, base: float | Tensor) -> Tensor:
    """Turns x (B, T, ..., K) by positions (1 or B, T), whole or not: the halves of K are the pairs' coordinates.

    Args:
        x: what is turned.
        position: of each token.
        base: θ_i = base^(-2i/K), or the angles θ (K / 2) themselves.
    """
    dtype = accumulation_dtype(x.dtype)
    half = x.shape[-1] // 2
    # the phase of position 50 000 is wrong by 1e-3 in float32; Apple's GPUs have no float64
    exact = dtype if x.device.type == "mps" else torch.float64
    frequency = base.to(exact) if isinstance(base, Tensor) else rotary_frequencies(base, half, exact, x.device)
    position = position[(..., *(None for _ in range(x.ndim - 2)))]  # (1 or B, T, 1, ..., 1)
    angle = (position * frequency).remainder(2 * math.pi).to(dtype)  # (1 or B, T, ..., K / 2)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.to(dtype).chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)


def rotary_frequencies(base: float, half: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Returns θ_i = base^(-i/half) for i < half."""
    return base ** (torch.arange(half, dtype=dtype, device=device) / -half)


def count_real(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts real tokens: up to and with each, (1 or B, T), and in all, (1 or B), int64."""
    if mask is None:
        T = x.shape[1]
        return torch.arange(1, T + 1, device=x.device)[None], torch.full((1,), T, device=x.device)
    return mask.cumsum(1), mask.sum(1)


def rotate_features(q: Tensor, k: Tensor, position: Tensor, n: int, base: float) -> tuple[Tensor, Tensor]:
    """Turns the last n features of q and k (B, T, H, F) by positions (1 or B, T)."""
    qk = torch.stack((q, k), 2)  # (B, T, 2, H, F)
    fixed, turned = qk.split((qk.shape[-1] - n, n), -1)
    q, k = torch.cat((fixed, rotate(turned, position, base)), -1).unbind(2)
    return q, k


def rotate_back(S: Tensor, count: Tensor, n: int, base: float) -> Tensor:
    """Turns the last n features of a state (B, H, F, V) back by counts (1 or B): the next token is at position one."""
    rows = S.movedim(-1, 1)[:, None]  # (B, 1, V, H, F)
    fixed, turned = rows.split((S.shape[2] - n, n), -1)
    return torch.cat((fixed, rotate(turned, -count[:, None], base)), -1)[:, 0].movedim(1, -1)
