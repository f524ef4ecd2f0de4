"""The diagonal state space model in chunks of time: matrix products inside a chunk, a scan across chunks.

Real numbers everywhere but in the scan: a complex state of N is a row of M = 2 N reals (`to_pairs`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.ops._chunks import chunk_length
from linrnn.ops.diagonal_scan import diagonal_scan
from linrnn.ops.fft_conv import fft_conv

CHUNK = 64


class Layout(NamedTuple):
    """Where tokens go: real ones in order, every document from the start of a chunk, n chunks of C a row."""

    source: Tensor  # (B, n C) the token of each place; T where there is none
    place: Tensor  # (B, T) the place of each token; that of a padded one means nothing
    cut: Tensor | None  # (B, n) whether a chunk begins with no state from before
    tail: Tensor  # (B, C) the places of the tokens of the last chunk, moved to its end
    has_tail: Tensor  # (B, C) whether there is one
    last: Tensor  # (B) the last chunk
    length: Tensor  # (B) its number of tokens
    forgotten: Tensor | None  # (B) whether a reset follows the last token


def chunked_ssm(log_a, b, c, x, h0, reset, mask, length: int, conv: bool):
    """diagonal_ssm in the form "chunk" or "conv" (without reset): b, c and h0 in the dtype of states.

    length: tokens of a document, about; a chunk has no more, so that chunks are half full on average.
    """
    B, T, _ = x.shape
    D, N = b.shape
    C = chunk_length(length, CHUNK)
    layout = None if reset is None and mask is None else lay_out(reset, mask, B, T, C, x.device)
    if layout is None:
        n = -(-T // C)
        blank = n * C - T
        chunks = torch.cat((x, x.new_zeros(B, blank, D)), 1) if blank else x  # (B, n C, D)
        cut = None
    else:
        n = layout.source.shape[1] // C
        chunks = take(torch.cat((x, x.new_zeros(B, 1, D)), 1), layout.source)
        cut = layout.cut
    rows = chunks.unflatten(1, (n, C)).permute(3, 0, 1, 2).reshape(D, B * n, C)

    powers = _powers(log_a, C, b.dtype)  # (D, C + 1, N)
    written = b[:, None] * powers[:, :C]
    write = to_pairs(written.flip(1))  # (D, C, M): what a token leaves at the end of its chunk
    read = conj_pairs(c[:, None] * powers[:, 1:]).mT  # (D, M, C): what a token sees of the state before its chunk

    u = (rows @ write).unflatten(1, (B, n)).permute(1, 2, 0, 3)  # (B, n, D, M)
    u = from_pairs(u, b.dtype).flatten(2)  # (B, n, D N)
    h = u.new_zeros(B, D * N) if h0 is None else h0.flatten(1)
    after, final = diagonal_scan(powers[:, C].flatten(), u, h, reset=cut)
    before = torch.cat((h[:, None], after[:, :-1]), 1)
    if cut is not None:
        before = torch.where(cut[..., None], 0, before)
    before = before.unflatten(2, (D, N))  # (B, n, D, N)

    if conv:
        y = fft_conv(chunks, response(log_a, b, c, n * C))
        if h0 is not None:
            starts = h0[:, None] * _exp_multiples(log_a, C, n, b.dtype).transpose(0, 1)  # (B, n, D, N)
            y = y + _tokens(_rows(starts) @ read, B, n)
    else:
        answer = (to_pairs(written) @ conj_pairs(c)[..., None])[..., 0]  # (D, C)
        y = _tokens(torch.baddbmm(rows @ _toeplitz(answer), _rows(before), read), B, n)

    if layout is None:
        y = y[:, :T]
        if blank:
            tail = torch.cat((x.new_zeros(B, blank, D), chunks[:, (n - 1) * C : T]), 1)
            final = powers[:, C - blank] * before[:, -1] + _read_in(tail, write, b.dtype)
        else:
            final = final.unflatten(1, (D, N))
        return y, final
    y = take(y, layout.place)
    decay = powers[:, layout.length].transpose(0, 1)  # (B, D, N)
    start = before[torch.arange(B, device=x.device), layout.last]
    tail = torch.where(layout.has_tail[..., None], take(chunks, layout.tail), 0)
    final = decay * start + _read_in(tail, write, b.dtype)
    return y, final if layout.forgotten is None else torch.where(layout.forgotten[:, None, None], 0, final)


def lay_out(reset: Tensor | None, mask: Tensor | None, B: int, T: int, C: int, device: torch.device) -> Layout:
    """Lays out tokens by flags (B, T), for T >= 1. With `reset` the number of chunks depends on the data."""
    real = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask
    count = real.cumsum(1)
    rank = count - 1  # among the real tokens of its document
    if reset is not None:
        rank = rank - torch.where(reset, count - real.to(count.dtype), 0).cummax(1).values
    first = real & (rank % C == 0)
    chunk = first.cumsum(1) - 1
    n = -(-T // C) if reset is None else max(1, int(chunk[:, -1].max()) + 1)
    place = chunk * C + rank % C
    source = _scatter(torch.where(real, place, n * C), torch.arange(T, device=device).expand(B, T), n * C, T)
    last = chunk[:, -1].clamp(min=0)
    empty = rank[:, -1] < 0  # no real token since the last reset
    length = torch.where(empty, 0, rank[:, -1] % C + 1)
    cut = forgotten = None
    if reset is not None:
        opens = first & (rank == 0) & (reset.cumsum(1) > 0)
        cut = _scatter(torch.where(opens, chunk, n), torch.ones_like(opens), n, False)
        forgotten = empty & reset.any(1)
    behind = torch.arange(-C, 0, device=device) + length[:, None]  # (B, C), within the last chunk
    tail = last[:, None] * C + behind.clamp(min=0)
    return Layout(source, place.clamp(0, n * C - 1), cut, tail, behind >= 0, last, length, forgotten)


def response(log_a: Tensor, b: Tensor, c: Tensor, T: int) -> Tensor:
    """The answer to an impulse, Re(sum_n c_n a_n^t b_n) for t < T, (D, T): the kernel of the convolution."""
    s = _root(T)
    powers = _exp_multiples(log_a, 1, s, b.dtype)  # (D, s, N)
    starts = (c * b)[:, None] * _exp_multiples(log_a, s, -(-T // s), b.dtype)
    return (to_pairs(starts) @ conj_pairs(powers).mT).flatten(1)[:, :T]


def exponential(z: Tensor) -> Tensor:
    """exp(z), by the real functions, which unlike the complex one are vectorised on a CPU."""
    if not z.is_complex():
        return z.exp()
    r, θ = z.real.exp(), z.imag
    return torch.complex(r * θ.cos(), r * θ.sin())


def to_pairs(z: Tensor) -> Tensor:
    """(..., N) to (..., M) real."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2) if z.is_complex() else z


def conj_pairs(c: Tensor) -> Tensor:
    """The pairs of conj(c): Re(sum c h) is the sum of their products with those of h."""
    return torch.stack((c.real, -c.imag), -1).flatten(-2) if c.is_complex() else c


def from_pairs(v: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., M) to (..., N) of the given dtype."""
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) if dtype.is_complex else v


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, D) at the tokens `index` (B, S): (B, S, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _powers(log_a: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """exp(t log_a) for t = 0 to C, (D, C + 1, N): products of two exponentials, so 2 sqrt(C) of them are enough."""
    s = _root(C)
    small, large = _exp_multiples(log_a, 1, s, dtype), _exp_multiples(log_a, s, C // s + 1, dtype)
    return (large[:, :, None] * small[:, None]).flatten(1, 2)[:, : C + 1]


def _exp_multiples(log_a: Tensor, step: int, n: int, dtype: torch.dtype) -> Tensor:
    """exp(t log_a) for t = 0, step, ..., (n - 1) step, (D, n, N), rounded to `dtype` at the end."""
    t = torch.arange(n, device=log_a.device)[:, None] * step
    return exponential(t * log_a[:, None]).to(dtype)


def _root(T: int) -> int:
    """A power of two near sqrt(T)."""
    s = 1
    while s * s < T:
        s *= 2
    return s


def _toeplitz(k: Tensor) -> Tensor:
    """(D, C) to (D, C, C) with k[t - s] at [s, t] and zeros where s > t.

    Rows of 2 C, read as rows of 2 C - 1, each begin one place earlier: views, whose gradients are sums.
    """
    D, C = k.shape
    row = torch.cat((k, torch.zeros_like(k)), 1)[:, None].expand(D, C, 2 * C)
    return row.reshape(D, -1)[:, : C * (2 * C - 1)].unflatten(1, (C, 2 * C - 1))[:, :, :C]


def _rows(states: Tensor) -> Tensor:
    """(B, n, D, N) to (D, B n, M)."""
    return to_pairs(states).flatten(0, 1).transpose(0, 1)


def _tokens(rows: Tensor, B: int, n: int) -> Tensor:
    """(D, B n, C) to (B, n C, D)."""
    return rows.unflatten(1, (B, n)).permute(1, 2, 3, 0).flatten(1, 2)


def _read_in(tail: Tensor, write: Tensor, dtype: torch.dtype) -> Tensor:
    """What tokens (B, C, D) leave in a state (B, D, N)."""
    return from_pairs((tail.permute(2, 0, 1) @ write).transpose(0, 1), dtype)


def _scatter(place: Tensor, value: Tensor, n: int, default: int | bool) -> Tensor:
    """Puts values (B, T) at their places in (B, n); those of place n are dropped."""
    out = torch.full((place.shape[0], n + 1), default, dtype=value.dtype, device=value.device)
    return out.scatter(1, place, value)[:, :n]
