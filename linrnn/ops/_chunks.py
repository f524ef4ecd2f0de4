"""Chunks of time for matrix states: decays between tokens, scores, triangular inverses, and the carry between chunks.

Sequences in chunks are (n, B, H, C, ...): chunk first, so that the state before every chunk is a slice of the states
after it. C is a power of two, since every sum of log decays here is built by doubling: blocks of s tokens are merged in
pairs by adding, never by subtracting. No sum of log decays is ever positive, so no exponential can overflow, nothing
cancels, and -inf (a reset) is a decay like any other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.ops.diagonal_scan import diagonal_scan


def chunk_length(T: int, chunk_size: int) -> int:
    """The power of two that covers min(T, chunk_size)."""
    C = 1
    while C < T and C < chunk_size:  # comparisons alone, so that a symbolic T stays one
        C *= 2
    return C


def to_chunks(x: Tensor, C: int) -> Tensor:
    """(B, T, H, ...) to (n, B, H, C, ...), padded with zeros at the end: tokens that neither decay nor write."""
    missing = -x.shape[1] % C
    if missing:
        x = torch.cat((x, x.new_zeros(()).expand(x.shape[0], missing, *x.shape[2:])), 1)
    return x.unflatten(1, (-1, C)).movedim((1, 3), (0, 2)).contiguous()


def from_chunks(o: Tensor, T: int) -> Tensor:
    """(n, B, H, C, V) to (B, T, H, V)."""
    return o.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :T]


class Row(NamedTuple):
    """What reads in a chunk: x (n, B, H, C, K), and which writes it sees.

    Token i sees the writes of tokens j <= i decayed by tokens j+1 to i; without `diagonal` those of j < i; `before`
    its own decay: decayed by tokens j+1 to i-1 (with one decay per channel only).
    """

    x: Tensor
    diagonal: bool = True
    before: bool = False


class Decays(NamedTuple):
    """Of one chunk, each (n, B, H, C, 1 or K), or None without decay; decayed products come with it."""

    into: Tensor | None  # from before the chunk to token i
    into_before: Tensor | None  # the same without token i
    out: Tensor | None  # from token j to the end of the chunk
    total: Tensor | None  # over the chunk, (n, B, H, 1 or K)


def decayed_scores(rows: tuple[Row, ...], keys: tuple[Tensor, ...], log_decay: Tensor | None):
    """Scores of every row with every key, [row][key] -> (n, B, H, C, C) lower triangular, and the decays of the chunk.

    log_decay: None, (n, B, H, C) for one decay per head, or (n, B, H, C, K) for one per channel.
    """
    C = keys[0].shape[-2]
    if log_decay is not None and log_decay.ndim == keys[0].ndim:
        return _channel_scores(rows, keys, log_decay)
    if log_decay is None:
        pairs, decays = keys[0].new_ones(C, C).tril(), Decays(None, None, None, None)
    else:
        pairs, decays = _head_decays(log_decay)
    scores = []
    for row in rows:
        seen = pairs if row.diagonal else pairs.tril(-1)
        scores.append([(row.x @ key.mT) * seen for key in keys])
    return scores, decays


def _head_decays(log_decay: Tensor) -> tuple[Tensor, Decays]:
    """exp of the sum over tokens j+1 to i for every pair i >= j, (..., C, C), and the decays of the chunk.

    Blocks of 8 sum up every pair; of two merged blocks, what lies below is an outer product.
    """
    C = log_decay.shape[-1]
    s = min(C, 8)
    blocks = log_decay.unflatten(-1, (-1, s))
    into = blocks.cumsum(-1)
    out = torch.cat((blocks[..., 1:], torch.zeros_like(blocks[..., :1])), -1).flip(-1).cumsum(-1).flip(-1)
    upper = torch.ones(s, s, dtype=blocks.real.dtype, device=blocks.device).triu()  # [j, i], for sums along i
    sums = torch.where(upper.triu(1).bool(), blocks[..., None, :], 0).cumsum(-1)
    pairs = (sums.exp() * upper).mT  # (..., blocks, s, s)
    while s < C:
        (into_a, into_b), (out_a, out_b) = _halves(into, -2), _halves(out, -2)
        pairs = _lower(pairs, into_b.exp()[..., :, None] * out_a.exp()[..., None, :])
        into, out = _merge(into_a, into_b, out_a, out_b, -1)
        s *= 2
    into, out = into.mT, out.mT  # the one block left becomes the channel: (..., C, 1)
    return pairs[..., 0, :, :], Decays(into.exp(), None, out.exp(), into[..., -1, :].exp())


def _channel_scores(rows: tuple[Row, ...], keys: tuple[Tensor, ...], log_decay: Tensor):
    """Scores by halving: a pair i > j meets in the one block where i is in the second half and j in the first.

    Both are taken to the boundary between the halves, i by the decays since then and j by those until then.
    """
    C = log_decay.shape[-2]
    into, out = log_decay[..., None, :], torch.zeros_like(log_decay)[..., None, :]  # (..., blocks, s, K)
    scores = [[_diagonal(row, key) for key in keys] for row in rows]  # (..., blocks, s, s)
    for _ in range(C.bit_length() - 1):
        (into_a, into_b), (out_a, out_b) = _halves(into, -3), _halves(out, -3)
        s = into.shape[-2]
        until = out_a.exp()
        writes = [_halves(key.unflatten(-2, (-1, s)), -3)[0] * until for key in keys]
        since = {before: (_shifted(into_b) if before else into_b).exp() for before in {row.before for row in rows}}
        for i, row in enumerate(rows):
            reads = _halves(row.x.unflatten(-2, (-1, s)), -3)[1] * since[row.before]
            for j, write in enumerate(writes):
                scores[i][j] = _lower(scores[i][j], _products(reads, write))
        into, out = _merge(into_a, into_b, out_a, out_b, -2)
    into, out = into[..., 0, :, :], out[..., 0, :, :]
    into_before = _shifted(into).exp() if any(row.before for row in rows) else None
    decays = Decays(into.exp(), into_before, out.exp(), into[..., -1, :].exp())
    return [[score[..., 0, :, :] for score in of_row] for of_row in scores], decays


def _diagonal(row: Row, key: Tensor) -> Tensor:
    product = (row.x * key).sum(-1)[..., None, None]
    return product if row.diagonal else torch.zeros_like(product)


def _products(reads: Tensor, writes: Tensor) -> Tensor:
    """reads @ writes^T; matrix products of one or two tokens cost more than elementwise ones."""
    if reads.shape[-2] > 2:
        return reads @ writes.mT
    return (reads[..., :, None, :] * writes[..., None, :, :]).sum(-1)


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The first and the second of every two blocks."""
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim)
    return first, second


def _merge(into_a: Tensor, into_b: Tensor, out_a: Tensor, out_b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The sums of a block of both halves: from its start to each token, and from each token to its end."""
    into = torch.cat((into_a, into_a.narrow(dim, -1, 1) + into_b), dim)
    return into, torch.cat((out_a + into_b.narrow(dim, -1, 1), out_b), dim)


def _shifted(into: Tensor) -> Tensor:
    """Sums up to the token before, (..., C, K)."""
    return torch.cat((torch.zeros_like(into[..., :1, :]), into[..., :-1, :]), -2)


def _lower(blocks: Tensor, low: Tensor) -> Tensor:
    """Lower triangular blocks (..., m, s, s) and what stands below each first of two, to (..., m/2, 2s, 2s)."""
    a, b = _halves(blocks, -3)
    return torch.cat((torch.cat((a, a.new_zeros(()).expand_as(a)), -1), torch.cat((low, b), -1)), -2)


def unit_lower_inverse(M: Tensor) -> Tensor:
    """(I + M)^{-1} for strictly lower triangular M (..., C, C), C a power of two.

    By doubling from blocks of 8, which are solved: [[A, 0], [L, B]]^{-1} = [[A', 0], [-B' L A', B']]. It is forward
    substitution in blocks: as stable, and made of matrix products.
    """
    C = M.shape[-1]
    s = min(C, 8)
    eye = torch.eye(s, dtype=M.dtype, device=M.device)
    diagonal = _diagonal_blocks(M, s)
    inverse = torch.linalg.solve_triangular(diagonal + eye, eye.expand_as(diagonal), upper=False, unitriangular=True)
    while s < C:
        a, b = _halves(inverse, -3)
        low = _diagonal_blocks(M, 2 * s)[..., s:, :s]
        inverse = _lower(inverse, -(b @ (low @ a)))
        s *= 2
    return inverse[..., 0, :, :]


def _diagonal_blocks(M: Tensor, s: int) -> Tensor:
    """The s x s blocks on the diagonal, (..., C / s, s, s)."""
    blocks = M.unflatten(-1, (-1, s)).unflatten(-3, (-1, s))  # (..., m, s, m, s)
    return blocks.diagonal(0, -4, -2).movedim(-1, -3)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def plus_product(x: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """x + a @ b (or minus), in one pass over x."""
    size = x.shape[:-2]
    flat = torch.baddbmm(x.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3), alpha=sign)
    return flat.unflatten(0, size)


def carry(total: Tensor | None, update: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """S <- total * S + update, chunk by chunk: the states before each, (n, B, H, K, V), and the last, (B, H, K, V).

    update: (n, B, H, K, V). total: None, or (n, B, H, 1 or K), where n and B may be 1. The states before are None if
    they are all zero. It is a diagonal scan over the chunks, one long row of states.
    """
    n, B, H, K, V = update.shape
    if n == 1:
        if state is None:
            return None, update[0]
        return state[None], update[0] + (state if total is None else total[0, ..., None] * state)
    if total is None:
        a = update.new_ones((), dtype=update.dtype).expand(B * H * K * V)
    elif total.shape[0] == 1:
        a = total[0, ..., None].expand(B, H, K, V).reshape(-1)
    else:
        a = total[..., None].expand(update.shape).reshape(1, n, -1)
    first = None if state is None else state.reshape(1, -1)
    states, last = diagonal_scan(a, update.reshape(1, n, -1), first)
    states = states.reshape(update.shape)
    first_state = torch.zeros_like(states[:1]) if state is None else state[None]
    return torch.cat((first_state, states[:-1])), last.view(B, H, K, V)


def matrix_carry(total: Tensor | None, P: Tensor, Q: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S <- (total + P) S + Q, chunk by chunk: the states before each, (n, B, H, K, V), and the last, (B, H, K, V).

    P: (n, B, H, K, K). Q: (n, B, H, K, V). total: None for 1, or (n, B, H, 1 or K). One step after another.
    """
    B, H, K, V = Q.shape[1:]
    eye = torch.eye(K, dtype=Q.dtype, device=Q.device)
    P = P + (eye if total is None else eye * total[..., None])
    S = Q.new_zeros(B * H, K, V) if state is None else state.reshape(B * H, K, V)
    before = []
    for P_c, Q_c in zip(P.flatten(1, 2).unbind(), Q.flatten(1, 2).unbind(), strict=True):
        before.append(S)
        S = torch.baddbmm(Q_c, P_c, S)
    return torch.stack(before).unflatten(1, (B, H)), S.unflatten(0, (B, H))


def step_decays(log_decay: Tensor, t: int) -> Tensor:
    """The decays of token t, to multiply states (B, H, K, V); log_decay (H,), (B, T, H) or (B, T, H, K)."""
    a = (log_decay if log_decay.ndim == 1 else log_decay[:, t]).exp()
    return a[..., None] if log_decay.ndim == 4 else a[..., None, None]
