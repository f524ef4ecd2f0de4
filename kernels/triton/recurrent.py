"""Triton kernel of the recurrence token by token, for decoding: read the state, update it, read it out, in one pass."""

import triton
import triton.language as tl

from linrnn.kernels.triton.tiles import CHANNEL, HEAD, head_of


@triton.jit(do_not_specialize=["T"])
def recurrent(
    q, k, v, beta, log_decay, first, last, out, T, H, K, V, scale, DECAY: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """S <- exp(log_decay) S; S <- S + k v^T, or with beta S + beta k (v - k^T S)^T; o = scale q^T S.

    BK covers K; first (B, H, K, V) may be None, and `last` may be the same memory. Grid (B H, V / BV).
    """
    bh = tl.program_id(0)
    i = tl.arange(0, BK)
    j = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = i < K, j < V
    cells = tl.cast(bh, tl.int64) * K * V + i[:, None] * V + j[None, :]
    if first is None:
        S = tl.zeros((BK, BV), tl.float32)
    else:
        S = tl.load(first + cells, mask=in_k[:, None] & in_v[None, :], other=0.0)
    q, k = head_of(q, bh, T, H, K) + i, head_of(k, bh, T, H, K) + i
    v, out = head_of(v, bh, T, H, V) + j, head_of(out, bh, T, H, V) + j
    if DECAY == CHANNEL:
        log_decay = head_of(log_decay, bh, T, H, K) + i
    elif DECAY == HEAD:
        log_decay = head_of(log_decay, bh, T, H, 1)
    if beta is not None:
        beta = head_of(beta, bh, T, H, 1)
    for _ in range(T):
        key = tl.load(k, mask=in_k, other=0.0).to(tl.float32)[:, None]
        query = tl.load(q, mask=in_k, other=0.0).to(tl.float32)[:, None]
        value = tl.load(v, mask=in_v, other=0.0).to(tl.float32)
        if DECAY == CHANNEL:
            S *= tl.exp(tl.load(log_decay, mask=in_k, other=0.0).to(tl.float32))[:, None]
            log_decay += H * K
        elif DECAY == HEAD:
            S *= tl.exp(tl.load(log_decay).to(tl.float32))
            log_decay += H
        if beta is not None:
            value = tl.load(beta).to(tl.float32) * (value - tl.sum(key * S, 0))
            beta += H
        S += key * value[None, :]
        tl.store(out, (scale * tl.sum(query * S, 0)).to(out.dtype.element_ty), mask=in_v)
        q += H * K
        k += H * K
        v += H * V
        out += H * V
    tl.store(last + cells, S, mask=in_k[:, None] & in_v[None, :])
