"""Triton kernels of linear attention in chunks: states between chunks, and what reads them. Both in both directions.

Backwards in time the same two kernels carry and read the gradients of the states: queries write, keys read.

    S <- total S + (decayed k)^T v                 D <- total D + (decayed q)^T grad_o
    o = (decayed q) S + scores v                   grad_v = (decayed k) D + scores^T grad_o
"""

import triton
import triton.language as tl

from linrnn.kernels.triton.tiles import (
    CHANNEL,
    HEAD,
    NONE,
    chunk_scores,
    head_of,
    head_pairs,
    load_channel_sums,
    load_head_sums,
    load_tile,
    product,
    split,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "n"])
def channel_sums(log_decay, sums, part, T, W, n, C: tl.constexpr, BW: tl.constexpr):
    """Sums of log decays (B, T, W) from the start of each chunk: (2, B, n C, W), both parts. Grid (B n, W / BW)."""
    chunk = tl.program_id(0)
    b, t0 = tl.cast(chunk // n, tl.int64), chunk % n * C
    w0 = tl.program_id(1) * BW
    whole, rest = split(load_tile(log_decay + b * T * W, t0, T, W, w0, W, C, BW).to(tl.float32))
    sums += b * n * C * W
    store_tile(sums, tl.cumsum(whole, 0), t0, n * C, W, w0, W, C, BW)
    store_tile(sums + part, tl.cumsum(rest, 0), t0, n * C, W, w0, W, C, BW)


@triton.jit(do_not_specialize=["T", "n"])
def scores_of_chunks(
    x, y, decay, part, scores, T, H, K, n, DECAY: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(B, H, n, C, C): what `chunk_scores` makes of every chunk, diagonal included. Grid (B H n,)."""
    C: tl.constexpr = 1 << LEVELS
    pid = tl.program_id(0)
    bh, t0 = pid // n, pid % n * C
    x, y, decay = head_of(x, bh, T, H, K), head_of(y, bh, T, H, K), decay_of(decay, bh, T, H, K, n, DECAY, C)
    A = chunk_scores(x, y, decay, part, t0, T, H, K, DECAY, True, LEVELS, BK, DOT, PRECISION)
    store_tile(scores + tl.cast(pid, tl.int64) * C * C, A, 0, C, C, 0, C, C, C)


@triton.jit
def weights(
    decay, part, t0, T, H, k0, K, DECAY: tl.constexpr, INTO: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Decays of a chunk, at its head: (C, BK) or (C, 1) INTO each token or else out of it, and (BK, 1) over it."""
    if DECAY == CHANNEL:
        whole, rest, total_whole, total_rest = load_channel_sums(decay, part, t0, H * K, k0, K, C, BK)
        total = tl.exp(total_whole + total_rest)[:, None]
        if INTO:
            w = tl.exp(whole + rest)
        else:
            w = tl.exp((total_whole[None, :] - whole) + (total_rest[None, :] - rest))
    else:
        whole, rest, total_whole, total_rest = load_head_sums(decay, t0, T, H, C)
        total = tl.zeros((BK, 1), tl.float32) + tl.exp(total_whole + total_rest)
        if INTO:
            w = tl.exp(whole + rest)[:, None]
        else:
            w = tl.exp((total_whole - whole) + (total_rest - rest))[:, None]
    return w, total


@triton.jit
def decay_of(decay, bh, T, H, K, n, DECAY: tl.constexpr, C: tl.constexpr):
    """The address of a head: in (B, T, H) log decays or in (2, B, n C, H, K) sums."""
    if DECAY == CHANNEL:
        return head_of(decay, bh, n * C, H, K)
    elif DECAY == HEAD:
        return head_of(decay, bh, T, H, 1)
    else:
        return decay


@triton.jit
def decayed(
    x, decay, part, t0, T, H, k0, K, DECAY: tl.constexpr, INTO: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A tile (C, BK) of x, at its head, times its weights, and the decays over the chunk."""
    tile = load_tile(x, t0, T, H * K, k0, K, C, BK)
    if DECAY == NONE:
        return tile, tl.full((BK, 1), 1.0, tl.float32)
    else:
        w, total = weights(decay, part, t0, T, H, k0, K, DECAY, INTO, C, BK)
        return tile * w, total


@triton.jit(do_not_specialize=["T", "n"])
def carry(
    x, y, decay, part, first, states, last, T, H, K, V, n, scale, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S <- total S + scale x^T y over the chunks: the S before each (REVERSE: after each), and the last.

    x = k decayed to the end of its chunk; REVERSE: x = q decayed from its start. first, last: (B, H, K, V), first may
    be None; states: (B, H, n, K, V), or None if only the last is wanted. Grid (B H, K / BK, V / BV).
    """
    C: tl.constexpr = 1 << LEVELS
    bh = tl.cast(tl.program_id(0), tl.int64)
    k0, v0 = tl.program_id(1) * BK, tl.program_id(2) * BV
    x, y = head_of(x, bh, T, H, K), head_of(y, bh, T, H, V)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    if first is None:
        S = tl.zeros((BK, BV), tl.float32)
    else:
        S = load_tile(first + bh * K * V, k0, K, V, v0, V, BK, BV)
    for step in range(n):
        c = n - 1 - step if REVERSE else step
        t0 = c * C
        if states is not None:
            store_tile(states + (bh * n + c) * K * V, S, k0, K, V, v0, V, BK, BV)
        a, total = decayed(x, decay, part, t0, T, H, k0, K, DECAY, REVERSE, C, BK)
        b = load_tile(y, t0, T, H * V, v0, V, C, BV)
        S = S * total + scale * product(tl.trans(a), b, DOT, PRECISION)
    store_tile(last + bh * K * V, S, k0, K, V, v0, V, BK, BV)


@triton.jit(do_not_specialize=["T", "n"])
def read(
    x, y, z, decay, part, scores, states, out, T, H, K, V, n, scale, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale ((decayed x) states + scores z); REVERSE: (decayed x) states + scale scores^T z.

    (x, y, z) = (q, k, v), or REVERSE (k, q, grad_o). scores (B, H, n, C, C) come with one decay per channel, else they
    are computed. states may be None: only the scores count. Grid (B H n, V / BV).
    """
    C: tl.constexpr = 1 << LEVELS
    pid = tl.program_id(0)
    bh, t0 = pid // n, pid % n * C
    v0 = tl.program_id(1) * BV
    x, y = head_of(x, bh, T, H, K), head_of(y, bh, T, H, K)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    A = tl.zeros((C, C), tl.float32)
    o = tl.zeros((C, BV), tl.float32)
    for k0 in range(0, K, BK):
        a = load_tile(x, t0, T, H * K, k0, K, C, BK)
        if DECAY != CHANNEL:
            b = load_tile(y, t0, T, H * K, k0, K, C, BK)
            A += product(a, tl.trans(b), DOT, PRECISION)
        if states is not None:
            if DECAY == CHANNEL:
                a, _ = decayed(x, decay, part, t0, T, H, k0, K, DECAY, not REVERSE, C, BK)
            S = load_tile(states + tl.cast(pid, tl.int64) * K * V, k0, K, V, v0, V, BK, BV)
            o += product(a, S, DOT, PRECISION)
    if DECAY == HEAD and states is not None:
        w, _ = weights(decay, part, t0, T, H, 0, K, DECAY, not REVERSE, C, BK)
        o *= w
    if DECAY == CHANNEL:
        A = load_tile(scores + tl.cast(pid, tl.int64) * C * C, 0, C, C, 0, C, C, C)
        if REVERSE:
            A = tl.trans(A)
    elif DECAY == HEAD:
        pairs = head_pairs(decay, t0, T, H, C)
        A *= tl.trans(pairs) if REVERSE else pairs
    else:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        A = tl.where((i <= j) if REVERSE else (i >= j), A, 0.0)
    within = product(A, load_tile(head_of(z, bh, T, H, V), t0, T, H * V, v0, V, C, BV), DOT, PRECISION)
    o = o + scale * within if REVERSE else scale * (o + within)
    store_tile(head_of(out, bh, T, H, V), o, t0, T, H * V, v0, V, C, BV)
