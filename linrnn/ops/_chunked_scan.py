"""The diagonal scan in plain torch: any device, any dtype, chunks of time in parallel."""

import math

import torch
from torch import Tensor

from linrnn.kernels import state_dtype

MAX_CHUNK = 64


def chunked_scan(
    a: Tensor, x: Tensor, initial_state: Tensor | None, flags: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h in x's dtype and the final state in the state dtype; not differentiable (it writes in place).

    Time is cut into n chunks of C: C steps on all chunks at once give each chunk's map s -> p s + q; n steps carry
    the state across them; C steps scan every chunk from the state before it. (Adding the decayed state to a scan from
    zero would cost the same, with twice the rounding error.)

    A reset cuts the past off even if it is infinite or NaN; a coefficient of zero does not.
    """
    if reverse:
        a, x = flip_time(a, x)
        h, final_state = chunked_scan(a, x, initial_state, None if flags is None else flags.flip(1), False)
        return h.flip(1), final_state
    B, T, D = x.shape
    dtype = state_dtype(x.dtype)
    cut = None  # (B, T, 1)
    if flags is not None:
        a, x = effective(a.to(dtype), x, flags)
        cut, _ = split_flags(flags)
    if not x.is_complex():
        a = a.to(dtype)
    s = x.new_zeros(B, D, dtype=dtype) if initial_state is None else initial_state
    h = x.new_empty(B, T, D, dtype=dtype)
    C = min(MAX_CHUNK, math.isqrt(T)) or 1
    n = T // C
    if n > 0:
        xs = x[:, : n * C].unflatten(1, (n, C)).unbind(2)
        decays = (a,) * C if a.ndim == 1 else a[..., : n * C, :].unflatten(-2, (n, C)).unbind(-2)
        cuts = [None] * C if cut is None else cut[:, : n * C].unflatten(1, (n, C)).unbind(2)
        p, q = decays[0], xs[0].to(dtype)
        for a_j, x_j, cut_j in zip(decays[1:], xs[1:], cuts[1:], strict=True):
            p, q = a_j * p, x_j + decayed(a_j, q, cut_j)
        if a.ndim == 1:
            p = _power(a, C).expand(n, D)
        cut_in = None if cut is None else cut[:, : n * C].unflatten(1, (n, C)).any(2)  # (B, n, 1)
        before = torch.empty_like(q)  # the state before each chunk, (B, n, D)
        for i in range(n):
            before[:, i] = s
            s = (q[:, i] + decayed(p[..., i, :], s, None if cut_in is None else cut_in[:, i])).to(dtype)
        chunks = h[:, : n * C].unflatten(1, (n, C))
        for j, (a_j, x_j, cut_j) in enumerate(zip(decays, xs, cuts, strict=True)):
            before = x_j + decayed(a_j, before, cut_j)
            chunks[:, :, j] = before
    for t in range(n * C, T):
        s = x[:, t] + decayed(a if a.ndim == 1 else a[..., t, :], s, None if cut is None else cut[:, t])
        h[:, t] = s
    return h.to(x.dtype), s.clone()


def decayed(a: Tensor, s: Tensor, cut: Tensor | None) -> Tensor:
    """a s, and zero where the past is cut off."""
    return a * s if cut is None else torch.where(cut, 0, a * s)


def _power(a: Tensor, n: int) -> Tensor:
    """a^n in double precision: its rounding error is the same in every chunk, so it would add up, not average out."""
    if a.device.type == "mps":  # has no float64
        return a**n
    return a.to(torch.promote_types(a.dtype, torch.float64)) ** n


def effective(a: Tensor, x: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """a (B, T, D) and x without flags: a reset zeroes a, a padded token has a = 1 (0 if also reset) and x = 0."""
    reset, hold = split_flags(flags)
    a = torch.where(hold, torch.ones_like(a), a)
    return torch.where(reset, torch.zeros_like(a), a), torch.where(hold, torch.zeros_like(x), x)


def split_flags(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The bits (reset, hold) of flags (B, T), as (B, T, 1) bool."""
    return (flags & 1).bool()[..., None], (flags & 2).bool()[..., None]


def flip_time(a: Tensor, *sequences: Tensor) -> tuple[Tensor, ...]:
    """a (D,), (T, D) or (B, T, D) and tensors (B, T, D), last token first."""
    return (a if a.ndim == 1 else a.flip(-2), *(v.flip(1) for v in sequences))
