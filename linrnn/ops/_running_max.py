"""The running maximum of exponents under a decay: units in which sums of exponentials neither overflow nor vanish."""

import torch
from torch import Tensor

from linrnn.ops._backend import unwatched
from linrnn.ops._inputs import expand_flags

MAX_CHUNK = 64


def nothing(dtype: torch.dtype) -> float:
    """The exponent of a sum that is still empty: far below any other, and finite, so that differences are."""
    return torch.finfo(dtype).min / 8


def finite_exponent(exponent: Tensor) -> Tensor:
    """The exponents that units are made of: no infinity or NaN, which would outlive a reset (a finite decay)."""
    none = nothing(exponent.dtype)
    return exponent.clamp(none, -none / 2).nan_to_num(none)


def mark_flags(
    exponent: Tensor, log_decay: Tensor | None, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Exponents (B, T, ...) and real log decays that say the same without flags: padding adds nothing, a reset forgets.

    log_decay: None, or any shape that broadcasts to (B, T, ...).
    """
    none = nothing(exponent.dtype)
    if mask is not None:
        mask = expand_flags(mask, exponent)
        exponent = torch.where(mask, exponent, none)
        log_decay = None if log_decay is None else torch.where(mask, log_decay, 0)
    if reset is not None:
        kept = exponent.new_zeros(()) if log_decay is None else log_decay
        log_decay = torch.where(expand_flags(reset, exponent), none, kept)
    return exponent, log_decay


def running_max(exponent: Tensor, log_decay: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """m_t = max(m_{t-1} + log_decay_t, exponent_t) along dimension 1, without gradient.

    Args:
        exponent: (B, T, ...). log_decay: None, or broadcastable to it. initial: (B, ...).

    Returns:
        m, (B, T, ...), and how much every step rescales what came before, log_decay_t + m_{t-1} - m_t, at most 0 and
        with the gradient of log_decay.
    """
    x, s = finite_exponent(exponent.detach()), initial.detach()
    before = torch.cat((s[:, None], _scan(x, None if log_decay is None else log_decay.detach(), s)), 1)
    m, m_before = before[:, 1:], before[:, :-1]
    change = m_before - m
    return m, change if log_decay is None else log_decay + change


def _scan(x: Tensor, w: Tensor | None, s: Tensor) -> Tensor:
    """The maxima, chunks of time in parallel: each chunk from nothing, the carry across chunks, each from its carry."""
    T = x.shape[1]
    if w is None:
        return torch.maximum(x.cummax(1).values, s[:, None]) if T else x
    C = 1
    while C < MAX_CHUNK and C * C < T:  # comparisons alone, which a symbolic T allows
        C *= 2
    n = T // C
    w = w.expand(x.shape)
    out = []
    if n > 0:
        xs = x[:, : n * C].unflatten(1, (n, C)).unbind(2)
        ws = w[:, : n * C].unflatten(1, (n, C)).unbind(2)
        top, decay = xs[0], ws[0]
        for x_j, w_j in zip(xs[1:], ws[1:], strict=True):
            top, decay = torch.maximum(top + w_j, x_j), decay + w_j
        carried = []
        for top_c, decay_c in zip(top.unbind(1), decay.unbind(1), strict=True):
            carried.append(s)
            s = torch.maximum(s + decay_c, top_c)
        m = torch.stack(carried, 1)
        maxima = []
        for x_j, w_j in zip(xs, ws, strict=True):
            m = torch.maximum(m + w_j, x_j)
            maxima.append(m)
        out.append(torch.stack(maxima, 2).flatten(1, 2))
    for t in range(n * C, T):
        s = torch.maximum(s + w[:, t], x[:, t])
        out.append(s[:, None])
    return torch.cat(out, 1) if out else x


def units(exponent: Tensor, log_decay: Tensor | None, initial: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The units of the final state, (B, ...), with their gradient, and a factor of 1 that gives it to the state.

    To autograd the units m are constants, which is right for all that does not depend on them. The final state does:
    in units of `last` instead of m_T its derivatives are those of the recurrence.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and unwatched((exponent, initial)):
        return m[:, -1].clone(), torch.ones_like(initial)
    exponent = finite_exponent(exponent)
    if log_decay is None:
        every = torch.cat((initial[:, None], exponent), 1)
    else:
        w = log_decay.expand(exponent.shape)
        later = w.flip(1).cumsum(1).flip(1)  # tokens t to T-1
        after = torch.cat((later[:, 1:], torch.zeros_like(later[:, :1])), 1)
        every = torch.cat(((initial + later[:, 0])[:, None], exponent + after), 1)
    last = every.gather(1, every.argmax(1, keepdim=True)).squeeze(1)  # of equal ones the first has the gradient
    return last, (m[:, -1] - last).exp()
