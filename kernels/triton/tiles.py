"""What the Triton kernels share: tiles of memory, products, decays between the tokens of a chunk.

A chunk is C tokens, a power of two from 16 to 64. Sequences are contiguous (B, T, H, width), states (B, H, n, K, V),
one for each of the n chunks. Log decays are summed from the start of the chunk in two parts, multiples of 2^-10 and
what is left: the first add up without rounding, so that the difference of two sums is exact however large they are.
A decay of e^-104, zero in float32, stands for all below it. Every exponent is a sum of log decays, never positive.
"""

import triton
import triton.language as tl

# kinds of decay: none, (B, T, H) one per head, (B, T, H, K) one per key channel
NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
CHANNEL = tl.constexpr(2)

FLOOR = tl.constexpr(-104.0)  # exp rounds to zero
STEP = tl.constexpr(1024.0)  # 64 tokens of at most 104 are 2^13: with 10 more bits, 23 of the 24 of a float32


@triton.jit
def load_tile(base, r0, rows, stride, c0, columns, R: tl.constexpr, BLOCK: tl.constexpr):
    """(R, BLOCK) from row r0 and column c0 of a matrix (rows, columns), zero outside."""
    r = tl.arange(0, R)[:, None]
    c = c0 + tl.arange(0, BLOCK)[None, :]
    pointers = base + tl.cast(r0, tl.int64) * stride + r * stride + c
    return tl.load(pointers, mask=(r0 + r < rows) & (c < columns), other=0.0)


@triton.jit
def store_tile(base, tile, r0, rows, stride, c0, columns, R: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.arange(0, R)[:, None]
    c = c0 + tl.arange(0, BLOCK)[None, :]
    pointers = base + tl.cast(r0, tl.int64) * stride + r * stride + c
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(r0 + r < rows) & (c < columns))


@triton.jit
def load_column(base, t0, T, stride, C: tl.constexpr):
    """(C,) tokens of one number per head, in float32, zero after the end."""
    t = tl.arange(0, C)
    return tl.load(base + tl.cast(t0, tl.int64) * stride + t * stride, mask=t0 + t < T, other=0.0).to(tl.float32)


@triton.jit
def store_column(base, column, t0, T, stride, C: tl.constexpr):
    t = tl.arange(0, C)
    tl.store(base + tl.cast(t0, tl.int64) * stride + t * stride, column.to(base.dtype.element_ty), mask=t0 + t < T)


@triton.jit
def head_of(x, bh, T, H, width):
    """The address of (b, 0, h, 0) in a sequence (B, T, H, width)."""
    return x + (tl.cast(bh // H, tl.int64) * T * H + bh % H) * width


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, operands in DOT, sums in float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def split(log_decay):
    """A log decay as a multiple of 1 / STEP and the rest. NaN stays."""
    g = tl.where(log_decay < FLOOR, FLOOR, log_decay)
    whole = tl.floor(g * STEP + 0.5) / STEP
    return whole, g - whole


@triton.jit
def load_head_sums(log_decay, t0, T, H, C: tl.constexpr):
    """Sums up to each token of a chunk, (C,), in both parts, and over the chunk."""
    whole, rest = split(load_column(log_decay, t0, T, H, C))
    return tl.cumsum(whole, 0), tl.cumsum(rest, 0), tl.sum(whole, 0), tl.sum(rest, 0)


@triton.jit
def load_channel_sums(sums, part, t0, stride, k0, K, C: tl.constexpr, BK: tl.constexpr):
    """The same of BK channels from what `channel_sums` wrote: (C, BK) in both parts, and (BK,) over the chunk."""
    end = t0 + C  # the sums are padded to whole chunks
    whole = load_tile(sums, t0, end, stride, k0, K, C, BK)
    rest = load_tile(sums + part, t0, end, stride, k0, K, C, BK)
    k = k0 + tl.arange(0, BK)
    last = sums + tl.cast(end - 1, tl.int64) * stride + k
    return whole, rest, tl.load(last, mask=k < K, other=0.0), tl.load(last + part, mask=k < K, other=0.0)


@triton.jit
def head_pairs(log_decay, t0, T, H, C: tl.constexpr):
    """(C, C): the decay over tokens j+1 to i for i >= j, else 0."""
    i = tl.arange(0, C)
    whole, rest, _, _ = load_head_sums(log_decay, t0, T, H, C)
    exponent = (whole[:, None] - whole[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp(tl.where(i[:, None] >= i[None, :], exponent, float("-inf")))


@triton.jit
def level_weights(sums, part, level, t0, stride, k0, K, C: tl.constexpr, BK: tl.constexpr):
    """(C, BK): decays between each token and the middle of its block of 2^(level + 1) tokens.

    Tokens i > j that differ in bit `level`, and in no higher one, lie on the two sides of that middle: the product of
    both weights is the decay over tokens j+1 to i.
    """
    i = tl.arange(0, C)[:, None]
    k = k0 + tl.arange(0, BK)[None, :]
    middle = ((i >> (level + 1)) << (level + 1)) + (1 << level) - 1
    base = sums + tl.cast(t0, tl.int64) * stride + k
    inside = (k < K) & (i < C)
    whole = tl.load(base + i * stride, mask=inside, other=0.0) - tl.load(base + middle * stride, mask=inside, other=0.0)
    base += part
    rest = tl.load(base + i * stride, mask=inside, other=0.0) - tl.load(base + middle * stride, mask=inside, other=0.0)
    return tl.exp(-tl.abs(whole + rest))


@triton.jit
def met_at(level, C: tl.constexpr):
    """(C, C): the pairs i > j whose highest differing bit is `level`."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (((i ^ j) >> level) == 1) & (i > j)


@triton.jit
def chunk_scores(
    x, y, decay, part, t0, T, H, K, DECAY: tl.constexpr, DIAGONAL: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(C, C), lower triangular: x_i . y_j decayed over tokens j+1 to i; x, y, decay at their head."""
    C: tl.constexpr = 1 << LEVELS
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    scores = tl.zeros((C, C), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=1):
        a = load_tile(x, t0, T, H * K, k0, K, C, BK)
        b = load_tile(y, t0, T, H * K, k0, K, C, BK)
        if DECAY == CHANNEL:
            for level in tl.range(0, LEVELS, num_stages=1):
                w = level_weights(decay, part, level, t0, H * K, k0, K, C, BK)
                scores += tl.where(met_at(level, C), product(a * w, tl.trans(b * w), DOT, PRECISION), 0.0)
            if DIAGONAL:
                scores += tl.where(i == j, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[:, None], 0.0)
        else:
            scores += product(a, tl.trans(b), DOT, PRECISION)
    if DECAY == HEAD:
        scores *= head_pairs(decay, t0, T, H, C)
    return tl.where((i >= j) if DIAGONAL else (i > j), scores, 0.0)


@triton.jit
def score_gradients(
    grad, x, y, decay, part, t0, T, H, k0, K, DECAY: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of tiles x and y (C, BK) out of that of the scores (C, C), of the pairs i > j; decay at its head."""
    C: tl.constexpr = 1 << LEVELS
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if DECAY == CHANNEL:
        grad_x = tl.zeros((C, BK), tl.float32)
        grad_y = tl.zeros((C, BK), tl.float32)
        for level in tl.range(0, LEVELS, num_stages=1):
            w = level_weights(decay, part, level, t0, H * K, k0, K, C, BK)
            met = tl.where(met_at(level, C), grad, 0.0)
            grad_x += w * product(met, y * w, DOT, PRECISION)
            grad_y += w * product(tl.trans(met), x * w, DOT, PRECISION)
    else:
        lower = tl.where(i > j, grad, 0.0)
        if DECAY == HEAD:
            lower *= head_pairs(decay, t0, T, H, C)
        grad_x = product(lower, y, DOT, PRECISION)
        grad_y = product(tl.trans(lower), x, DOT, PRECISION)
    return grad_x, grad_y
