"""Triton kernels of the delta rule in chunks: what linear attention lacks.

With S the state before a chunk and (decayed k) S what its keys read there, the chunk writes
    u = A (beta (v - (decayed k) S)),   A = (I + M)^{-1},   M_ij = beta_i k_i . k_j decayed, j < i,
and is linear attention with the values u: the kernels of `chunks` and `gradients` do the rest.
"""

import triton
import triton.language as tl

from linrnn.kernels.triton.chunks import decay_of, decayed
from linrnn.kernels.triton.tiles import (
    chunk_scores,
    head_of,
    load_column,
    load_tile,
    met_at,
    product,
    store_column,
    store_tile,
)


@triton.jit
def unit_lower_inverse(M, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M)^{-1} of strictly lower triangular M (C, C): forward substitution in blocks of 1, 2, 4, ... tokens.

    [[A, 0], [L, B]]^{-1} = [[A', 0], [-B' L A', B']] for all blocks at once, since the other products are zero.
    """
    C: tl.constexpr = 1 << LEVELS
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    inverse = tl.where(i == j, 1.0, tl.where(met_at(0, C), -M, 0.0))
    for level in tl.range(1, LEVELS, num_stages=1):
        low = product(tl.where(met_at(level, C), M, 0.0), inverse, tl.float32, PRECISION)
        inverse -= product(inverse, low, tl.float32, PRECISION)
    return inverse


@triton.jit(do_not_specialize=["T", "n"])
def inverse_of_chunks(
    k, beta, decay, part, inverse, T, H, K, n, DECAY: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A of every chunk, (B, H, n, C, C) in float32. Grid (B H n,)."""
    C: tl.constexpr = 1 << LEVELS
    pid = tl.program_id(0)
    bh, t0 = pid // n, pid % n * C
    k = head_of(k, bh, T, H, K)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    M = chunk_scores(k, k, decay, part, t0, T, H, K, DECAY, False, LEVELS, BK, DOT, PRECISION)
    M *= load_column(head_of(beta, bh, T, H, 1), t0, T, H, C)[:, None]
    A = unit_lower_inverse(M, LEVELS, PRECISION)
    store_tile(inverse + tl.cast(pid, tl.int64) * C * C, A, 0, C, C, 0, C, C, C)


@triton.jit(do_not_specialize=["T", "n"])
def write(
    k, v, beta, decay, part, inverse, first, states, last, u, T, H, K, V, n, DECAY: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk what is written, u (B, T, H, V), the states before each, and the last.

    WHOLE: BK covers K, and the state stays in registers; else it passes from chunk to chunk through `states`.
    Grid (B H, V / BV).
    """
    C: tl.constexpr = 1 << LEVELS
    bh = tl.cast(tl.program_id(0), tl.int64)
    v0 = tl.program_id(1) * BV
    k, beta = head_of(k, bh, T, H, K), head_of(beta, bh, T, H, 1)
    v, u = head_of(v, bh, T, H, V), head_of(u, bh, T, H, V)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    before = states + bh * n * K * V
    S = start(first, before, bh, K, V, v0, BK, BV)
    for c in range(n):
        t0 = c * C
        wanted = load_tile(v, t0, T, H * V, v0, V, C, BV).to(tl.float32)
        if WHOLE:
            store_tile(before, S, 0, K, V, v0, V, BK, BV)
        for k0 in range(0, BK if WHOLE else K, BK):
            if not WHOLE:
                S = load_tile(before, k0, K, V, v0, V, BK, BV)
            key, total = decayed(k, decay, part, t0, T, H, k0, K, DECAY, True, C, BK)
            wanted -= product(key, S, DOT, PRECISION)
        wanted *= load_column(beta, t0, T, H, C)[:, None]
        A = load_tile(inverse + (bh * n + c) * C * C, 0, C, C, 0, C, C, C)
        written = product(A, wanted, DOT, PRECISION)
        store_tile(u, written, t0, T, H * V, v0, V, C, BV)
        after = last + bh * K * V if c == n - 1 else before + K * V
        for k0 in range(0, BK if WHOLE else K, BK):
            if not WHOLE:
                S = load_tile(before, k0, K, V, v0, V, BK, BV)
            key, total = decayed(k, decay, part, t0, T, H, k0, K, DECAY, False, C, BK)
            S = S * total + product(tl.trans(key), written, DOT, PRECISION)
            if not WHOLE:
                store_tile(after, S, k0, K, V, v0, V, BK, BV)
        if not WHOLE:
            tl.debug_barrier()  # other threads of the block read what these wrote
        before = after
    if WHOLE:
        store_tile(last + bh * K * V, S, 0, K, V, v0, V, BK, BV)


@triton.jit
def start(first, states, bh, K, V, v0, BK: tl.constexpr, BV: tl.constexpr):
    """The first of `states`, out of `first` (B, H, K, V) or zero if that is None; returns its last block of keys."""
    S = tl.zeros((BK, BV), tl.float32)
    for k0 in range(0, K, BK):
        if first is not None:
            S = load_tile(first + bh * K * V, k0, K, V, v0, V, BK, BV)
        store_tile(states, S, k0, K, V, v0, V, BK, BV)
    tl.debug_barrier()
    return S


@triton.jit(do_not_specialize=["T", "n"])
def write_backward(
    q, k, beta, grad_o, grad_u, decay, part, inverse, grad_last, grad_states, grad_first, grad_v, T, H, K, V, n, scale,
    DECAY: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Backwards: gradients of the states after each chunk, of u (completed in place), of v, and of the first state.

    grad_u holds what comes from the outputs of the chunk itself. grad_last may be None. WHOLE as for `write`.
    Grid (B H, V / BV).
    """
    C: tl.constexpr = 1 << LEVELS
    bh = tl.cast(tl.program_id(0), tl.int64)
    v0 = tl.program_id(1) * BV
    q, k, beta = head_of(q, bh, T, H, K), head_of(k, bh, T, H, K), head_of(beta, bh, T, H, 1)
    grad_o, grad_u, grad_v = head_of(grad_o, bh, T, H, V), head_of(grad_u, bh, T, H, V), head_of(grad_v, bh, T, H, V)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    after = grad_states + (bh * n + n - 1) * K * V
    D = start(grad_last, after, bh, K, V, v0, BK, BV)
    for step in range(n):
        c = n - 1 - step
        t0 = c * C
        of_u = load_tile(grad_u, t0, T, H * V, v0, V, C, BV).to(tl.float32)
        if WHOLE:
            store_tile(after, D, 0, K, V, v0, V, BK, BV)
        for k0 in range(0, BK if WHOLE else K, BK):
            if not WHOLE:
                D = load_tile(after, k0, K, V, v0, V, BK, BV)
            key, total = decayed(k, decay, part, t0, T, H, k0, K, DECAY, False, C, BK)
            of_u += product(key, D, DOT, PRECISION)
        tl.debug_barrier()  # all of the tile is read before any of it is overwritten
        store_tile(grad_u, of_u, t0, T, H * V, v0, V, C, BV)
        A = load_tile(inverse + (bh * n + c) * C * C, 0, C, C, 0, C, C, C)
        of_v = product(tl.trans(A), of_u, DOT, PRECISION) * load_column(beta, t0, T, H, C)[:, None]
        store_tile(grad_v, of_v, t0, T, H * V, v0, V, C, BV)
        before = grad_first + bh * K * V if c == 0 else after - K * V
        for k0 in range(0, BK if WHOLE else K, BK):
            if not WHOLE:
                D = load_tile(after, k0, K, V, v0, V, BK, BV)
            query, total = decayed(q, decay, part, t0, T, H, k0, K, DECAY, True, C, BK)
            of_o = load_tile(grad_o, t0, T, H * V, v0, V, C, BV)
            D = D * total + scale * product(tl.trans(query), of_o, DOT, PRECISION)
            key, total = decayed(k, decay, part, t0, T, H, k0, K, DECAY, True, C, BK)
            D -= product(tl.trans(key), of_v, DOT, PRECISION)
            if not WHOLE:
                store_tile(before, D, k0, K, V, v0, V, BK, BV)
        if not WHOLE:
            tl.debug_barrier()  # other threads of the block read what these wrote
        after = before
    if WHOLE:
        store_tile(grad_first + bh * K * V, D, 0, K, V, v0, V, BK, BV)


@triton.jit(do_not_specialize=["T", "n"])
def inverse_backward(
    k, v, beta, grad_u, decay, part, inverse, states, grad_kk, grad_beta, T, H, K, V, n, DECAY: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of beta (B, T, H), and of the scores of keys with keys (B, H, n, C, C). Grid (B H n,)."""
    C: tl.constexpr = 1 << LEVELS
    pid = tl.program_id(0)
    bh, t0 = pid // n, pid % n * C
    k, beta = head_of(k, bh, T, H, K), head_of(beta, bh, T, H, 1)
    v, grad_u = head_of(v, bh, T, H, V), head_of(grad_u, bh, T, H, V)
    decay = decay_of(decay, bh, T, H, K, n, DECAY, C)
    states += tl.cast(pid, tl.int64) * K * V
    A = load_tile(inverse + tl.cast(pid, tl.int64) * C * C, 0, C, C, 0, C, C, C)
    b = load_column(beta, t0, T, H, C)[:, None]
    of_A = tl.zeros((C, C), tl.float32)
    of_beta = tl.zeros((C,), tl.float32)
    for v0 in range(0, V, BV):
        wanted = load_tile(v, t0, T, H * V, v0, V, C, BV).to(tl.float32)
        for k0 in range(0, K, BK):
            key, _ = decayed(k, decay, part, t0, T, H, k0, K, DECAY, True, C, BK)
            wanted -= product(key, load_tile(states, k0, K, V, v0, V, BK, BV), DOT, PRECISION)
        of_u = load_tile(grad_u, t0, T, H * V, v0, V, C, BV)
        of_A += product(of_u, tl.trans(wanted * b), DOT, PRECISION)
        of_beta += tl.sum(product(tl.trans(A), of_u, DOT, PRECISION) * wanted, 1)
    # of M: -A^T (gradient of A) A^T
    of_M = -product(tl.trans(A), product(of_A, tl.trans(A), tl.float32, PRECISION), tl.float32, PRECISION)
    kk = chunk_scores(k, k, decay, part, t0, T, H, K, DECAY, False, LEVELS, BK, DOT, PRECISION)
    store_column(head_of(grad_beta, bh, T, H, 1), of_beta + tl.sum(of_M * kk, 1), t0, T, H, C)
    store_tile(grad_kk + tl.cast(pid, tl.int64) * C * C, of_M * b, 0, C, C, 0, C, C, C)
