"""Triton kernel of the gradients of q, k and the log decays, chunk by chunk, out of the states and their gradients.

A log decay at t takes part in all that reaches from before t to t or later: from the state before the chunk to reads
i >= t, from writes j < t to the state after it, from writes to reads, and from state to state.
"""

import triton
import triton.language as tl

from linrnn.kernels.triton.chunks import decay_of, weights
from linrnn.kernels.triton.tiles import (
    CHANNEL,
    FLOOR,
    HEAD,
    NONE,
    head_of,
    load_column,
    load_tile,
    product,
    score_gradients,
    store_column,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "n"])
def gradients(
    q, k, v, grad_o, log_decay, decay, part, before, after, grad_kk, grad_write, grad_q, grad_k, grad_decay,
    T, H, K, V, n, B, scale, DECAY: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k (B, T, H, K), and of log decays (B, T, H, K), or (K / BK, B, T, H) to be summed.

    before, after (B, H, n, K, V): the states before the chunks, and the gradients of those after them. Of the delta
    rule, else None: grad_kk (B, H, n, C, C), of the scores of keys with keys, and grad_write (B, T, H, V), of
    v - (decayed k) S, with v what is written instead of the values. Grid (B H n, K / BK).
    """
    C: tl.constexpr = 1 << LEVELS
    pid = tl.program_id(0)
    bh, t0 = pid // n, pid % n * C
    k0 = tl.program_id(1) * BK
    v, grad_o = head_of(v, bh, T, H, V), head_of(grad_o, bh, T, H, V)
    before += tl.cast(pid, tl.int64) * K * V
    after += tl.cast(pid, tl.int64) * K * V
    grad_scores = tl.zeros((C, C), tl.float32)
    read = tl.zeros((C, BK), tl.float32)
    for v0 in range(0, V, BV):
        g = load_tile(grad_o, t0, T, H * V, v0, V, C, BV)
        u = load_tile(v, t0, T, H * V, v0, V, C, BV)
        S = load_tile(before, k0, K, V, v0, V, BK, BV)
        grad_scores += product(g, tl.trans(u), DOT, PRECISION)
        read += product(g, tl.trans(S), DOT, PRECISION)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    grad_scores *= scale
    own = tl.sum(tl.where(i == j, grad_scores, 0.0), 1)[:, None]
    a = load_tile(head_of(q, bh, T, H, K), t0, T, H * K, k0, K, C, BK)
    b = load_tile(head_of(k, bh, T, H, K), t0, T, H * K, k0, K, C, BK)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    grad_a, grad_b = score_gradients(grad_scores, a, b, decay, part, t0, T, H, k0, K, DECAY, LEVELS, BK, DOT, PRECISION)
    if DECAY != NONE:
        w, total = weights(decay, part, t0, T, H, k0, K, DECAY, True, C, BK)
        read *= w
    grad_a += scale * read
    since = a * grad_a - b * grad_b  # what a decay at a token or before it acts on
    store_tile(head_of(grad_q, bh, T, H, K), grad_a + own * b, t0, T, H * K, k0, K, C, BK)
    grad_b += own * a
    # a second walk over V, and a third for the delta rule, rather than all these sums in registers at once
    written = tl.zeros((C, BK), tl.float32)
    passed = tl.zeros((BK,), tl.float32)
    for v0 in range(0, V, BV):
        u = load_tile(v, t0, T, H * V, v0, V, C, BV)
        D = load_tile(after, k0, K, V, v0, V, BK, BV)
        written += product(u, tl.trans(D), DOT, PRECISION)
        if DECAY != NONE:
            passed += tl.sum(load_tile(before, k0, K, V, v0, V, BK, BV) * D, 1)
    if DECAY != NONE:
        w, total = weights(decay, part, t0, T, H, k0, K, DECAY, False, C, BK)
        written *= w
        passed *= tl.sum(total, 1)
    grad_b += written
    if grad_kk is not None:
        grads = load_tile(grad_kk + tl.cast(pid, tl.int64) * C * C, 0, C, C, 0, C, C, C)
        row, column = score_gradients(grads, b, b, decay, part, t0, T, H, k0, K, DECAY, LEVELS, BK, DOT, PRECISION)
        grad_b += row + column
        since += b * (row - column)
        removed = tl.zeros((C, BK), tl.float32)
        grad_write = head_of(grad_write, bh, T, H, V)
        for v0 in range(0, V, BV):
            r = load_tile(grad_write, t0, T, H * V, v0, V, C, BV)
            S = load_tile(before, k0, K, V, v0, V, BK, BV)
            removed += product(r, tl.trans(S), DOT, PRECISION)
        if DECAY != NONE:
            w, total = weights(decay, part, t0, T, H, k0, K, DECAY, True, C, BK)
            removed *= w
        grad_b -= removed
        since -= b * removed
    store_tile(head_of(grad_k, bh, T, H, K), grad_b, t0, T, H * K, k0, K, C, BK)
    until = b * written
    if DECAY == CHANNEL:
        grad_g = tl.cumsum(since, 0, reverse=True) + (tl.cumsum(until, 0) - until) + passed[None, :]
        g = load_tile(head_of(log_decay, bh, T, H, K), t0, T, H * K, k0, K, C, BK)
        grad_g = tl.where(g < FLOOR, 0.0, grad_g)
        store_tile(head_of(grad_decay, bh, T, H, K), grad_g, t0, T, H * K, k0, K, C, BK)
    elif DECAY == HEAD:
        later, earlier = tl.sum(since, 1), tl.sum(until, 1)
        grad_g = tl.cumsum(later, 0, reverse=True) + (tl.cumsum(earlier, 0) - earlier) + tl.sum(passed, 0)
        g = load_column(head_of(log_decay, bh, T, H, 1), t0, T, H, C)
        grad_g = tl.where(g < FLOOR, 0.0, grad_g)
        grad_decay += tl.program_id(1).to(tl.int64) * B * T * H
        store_column(head_of(grad_decay, bh, T, H, 1), grad_g, t0, T, H, C)
