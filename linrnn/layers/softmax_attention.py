"""Softmax attention over more than torch's own fused call offers, in blocks of queries: no mask is ever T x T.

Keys stand in columns, those carried from earlier calls first, so that the distance of two tokens of a document is that
of their columns. What a query sees is how many columns before it, and how many after.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.ops._recompute import recomputed

# the numbers in the mask of a block
BLOCK = 2**22

# maps q (B, C, H, K), k (B, W, H_kv, K), columns (C), (W) and `far`, `near` to logits (B, H, C, W) of at least float32:
# the first `far` keys are beyond the far window of all queries, those from `near` on are within it
Scores = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


class Sinks(NamedTuple):
    """The first tokens of the document that is open when a call begins, seen from any distance.

    k, v (B, s, H_kv, K): of positions 0 ... s - 1. position (1 or B, T): of the queries. first (1 or B, T) bool: those
    of this document; None: all. In the columns these tokens are no longer seen; those of later documents are.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    first: Tensor | None


class Rule(NamedTuple):
    """Which keys are seen, and how.

    before, after (1 or B, T): how many columns a query sees before and after itself; after = None: none. back, ahead:
    the most that these can be, or None. slopes (H): of ALiBi. scores: logits other than scale q · k, that tell keys at
    distances below far_window from others.
    """

    before: Tensor
    after: Tensor | None
    back: int | None = None
    ahead: int | None = None
    sinks: Sinks | None = None
    slopes: Tensor | None = None
    scores: Scores | None = None
    far_window: int = 0


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Maps queries q (B, T, H, K) and the columns k, v (B, S + T, H_kv, K) to o (B, T, H, K), in blocks of queries.

    With gradients, blocks are computed again in the backward pass, so that their masks and weights are not kept.
    """
    B, T, H, _ = q.shape
    past = k.shape[1] - T
    sees_all = rule.sinks is not None and rule.sinks.first is not None  # sinks may be in any column
    back, ahead = None if sees_all else rule.back, rule.ahead
    # the columns that a query may see, where that is not most of them
    reach = None if back is None or (rule.after is not None and ahead is None) else back + (ahead or 0)
    weights = rule.scores is not None or keeps_weights(q, dropout)
    rows = 4 * B * H if weights else len(rule.before) * (1 if rule.slopes is None else 2 * H)
    if reach is None:
        size = BLOCK // max(rows * k.shape[1], 1)
    else:
        size = min(max(reach, 128), BLOCK // max(rows * (reach + max(reach, 128)), 1))
    size = min(max(size, 16), T)
    blocks = []
    for a in range(0, T, size):
        b = min(a + size, T)
        low = 0 if back is None else max(0, past + a - back)
        high = past + b if rule.after is None else past + T if ahead is None else min(past + T, past + b + ahead)
        run = functools.partial(_block, rule=rule, a=a, low=low, past=past, scale=scale, dropout=dropout)
        inputs = q[:, a:b], k[:, low:high], v[:, low:high]
        again = torch.is_grad_enabled() and size < T
        blocks.append(recomputed(run, *inputs) if again else run(*inputs))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _block(
    q: Tensor, k: Tensor, v: Tensor, *, rule: Rule, a: int, low: int, past: int, scale: float, dropout: float
) -> Tensor:
    """Attention of the queries q (B, C, H, K) from the a-th on, to the columns k, v (B, W, H_kv, K) from `low` on."""
    C, W = q.shape[1], k.shape[1]
    query = past + a + torch.arange(C, device=q.device)
    key = low + torch.arange(W, device=q.device)
    column = query[:, None]  # (C, 1); what is compared is never a matrix of integers
    visible = key >= column - rule.before[:, a : a + C, None]  # (1 or B, C, W)
    visible = visible & (key <= (column if rule.after is None else column + rule.after[:, a : a + C, None]))
    if rule.sinks is not None:
        sinks, s = rule.sinks, rule.sinks.k.shape[1]
        slot = torch.arange(s, device=q.device)
        position = sinks.position[:, a : a + C, None]  # (1 or B, C, 1)
        begun = column - position  # the column of the first token in the document of the query
        seen = slot <= position  # (1 or B, C, s)
        if sinks.first is None:
            visible = visible & (key >= begun + s)
        else:
            first = sinks.first[:, a : a + C, None]
            own = (key >= begun) & (key < begun + s) & (key <= column)
            visible = torch.where(first, visible & (key >= begun + s), visible | own)
            seen = seen & first
        k, v = torch.cat((sinks.k.to(k.dtype), k), 1), torch.cat((sinks.v.to(v.dtype), v), 1)
        visible = torch.cat((seen.expand(len(visible), -1, -1), visible), -1)
    mask = visible[:, None]  # (1 or B, 1, C, W)
    if rule.scores is not None:
        split = past + a - low - rule.far_window + 1  # keys before it are beyond the window of the first query
        far, near = (min(max(n, 0), W) for n in (split, split + C - 1))
        return _weigh(rule.scores(q, k, query, key, far, near).masked_fill(~mask, -torch.inf), v, dropout)
    if rule.slopes is not None:
        distance = (column.to(rule.slopes.dtype) - key).abs()[None]  # (1, C, W)
        if rule.sinks is not None:
            apart = (position - slot).to(distance.dtype)
            distance = torch.cat((apart, distance.expand(len(apart), -1, -1)), -1)
        bias = -rule.slopes[:, None, None] * distance[:, None]  # (1 or B, H, C, W), at least float32
        mask = bias.masked_fill(~mask, -torch.inf)
        if q.dtype != bias.dtype and q.device.type != "cpu":  # a bias in half precision cannot count to 1000
            return _weigh(scale * products(q, k) + mask, v, dropout)
    return fused(q, k, v, mask=mask, scale=scale, dropout=dropout)


def keeps_weights(q: Tensor, dropout: float) -> bool:
    """Returns whether torch's call on q writes the weights of all queries down: where no kernel of it drops any."""
    return dropout > 0 and (q.device.type != "cuda" or q.dtype == torch.float64)


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float, dropout: float
) -> Tensor:
    """torch's scaled_dot_product_attention of q (B, T, H, K), k (B, S, H_kv, K) and v (B, S, H_kv, V)."""
    B, T, H, K = q.shape
    groups = H // k.shape[2]
    if T == 1 and groups > 1:  # the queries of a group as so many tokens: keys are read once
        q = q.view(B, k.shape[2], groups, K)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.view(len(mask), k.shape[2], groups, -1)
    else:
        q = q.transpose(1, 2)
    o = F.scaled_dot_product_attention(
        q,
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[2],
    )
    return o.reshape(B, 1, H, v.shape[-1]) if T == 1 else o.transpose(1, 2)


def _weigh(logits: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Maps logits (B, H, C, W) and v (B, W, H_kv, V) to o (B, C, H, V)."""
    return mix(F.dropout(logits.softmax(-1), dropout), v).transpose(1, 2).to(v.dtype)


def mix(p: Tensor, v: Tensor) -> Tensor:
    """Returns Σ_j p_j v_j (B, H, C, V), in the dtype of p, of weights p (B, H, C, W) and v (B, W, H_kv, V)."""
    with torch.autocast(v.device.type, enabled=False):
        return (by_group(p, v.shape[2]) @ v.to(p.dtype).transpose(1, 2)).view(*p.shape[:3], v.shape[3])


def products(q: Tensor, k: Tensor) -> Tensor:
    """Returns q · k (B, H, C, W) of q (B, C, H, K) and k (B, W, H_kv, K), at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, C, H, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        rows = by_group(q.to(dtype).transpose(1, 2), k.shape[2])
        return (rows @ k.to(dtype).transpose(1, 2).mT).view(B, H, C, k.shape[1])


def by_group(x: Tensor, n_kv_heads: int) -> Tensor:
    """(B, H, C, ·) to (B, H_kv, H / H_kv C, ·): heads side by side share keys, as so many queries."""
    return x.unflatten(1, (n_kv_heads, x.shape[1] // n_kv_heads)).flatten(2, 3)
