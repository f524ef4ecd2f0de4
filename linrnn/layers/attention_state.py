"""The state of softmax attention: columns of keys and values, the last of which are the open document."""

from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.layers.base import State
from linrnn.layers.local_attention import Packed, Sight, latest
from linrnn.layers.softmax_attention import Sinks


class AttentionState(NamedTuple):
    """The tokens seen so far, or the last window - 1 of them.

    k (B, S, H_kv, K): keys, turned by RoPE, as they are for ReRoPE. v (B, S, H_kv, K): values. position (B,) int64: how
    many tokens the open document has, so that the last min(position, S) columns are real. With `sink`, sink_k and
    sink_v (B, sink, H_kv, K) are those of its first tokens.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None


def first_tokens(k: Tensor, v: Tensor, state: State, packed: Packed, seen: Sight, n: int) -> Sinks:
    """Returns the first n tokens of the document that is open when the call begins: carried, or in the columns.

    Args:
        k, v: the columns (B, S + T, H_kv, K).
        state: before the call, or None.
        packed, seen: the T tokens of the call, and what they see.
        n: how many.
    """
    past = k.shape[1] - seen.before.shape[1]
    slot = torch.arange(n, device=k.device)
    start = torch.zeros_like(seen.next) if state is None else state.position
    sink_k, sink_v = (pick(u, past + slot - start[:, None]) for u in (k, v))
    if state is not None:
        carried = (slot < start[:, None])[..., None, None]
        sink_k = torch.where(carried, state.sink_k.to(k.dtype), sink_k)
        sink_v = torch.where(carried, state.sink_v.to(v.dtype), sink_v)
    first = None if packed.reset is None else packed.reset.cumsum(1) == 0
    return Sinks(sink_k, sink_v, seen.before, first)


def next_state(
    k: Tensor, v: Tensor, state: State, packed: Packed, seen: Sight, sinks: Sinks | None, window: int | None
) -> AttentionState:
    """Returns the state after the columns k, v (B, S + T, H_kv, K); arguments as in `first_tokens`."""
    columns, T = k.shape[1], seen.before.shape[1]
    behind = None if packed.lengths is None else T - packed.lengths
    n = columns if window is None else window - 1
    last_k, last_v = k, v
    # a view is enough where the columns before it are few, and those of no document are zero already
    if behind is not None or (window is not None and (packed.reset is not None or state is None or T > n)):
        last_k, last_v = (latest(u.flatten(2), behind, n, seen.next).unflatten(2, u.shape[2:]) for u in (k, v))
    elif columns > n:
        last_k, last_v = (u[:, columns - n :] for u in (k, v))
    if sinks is None:
        return AttentionState(last_k, last_v, seen.next)
    slot = torch.arange(sinks.k.shape[1], device=k.device)
    begun = columns - (0 if behind is None else behind) - seen.next  # (B): where the open document began

    def open_document(u: Tensor, sink: Tensor) -> Tensor:
        if sinks.first is not None:
            sink = torch.where(sinks.first[:, -1, None, None, None], sink, pick(u, begun[:, None] + slot))
        return sink.masked_fill((slot >= seen.next[:, None])[..., None, None], 0)

    first = open_document(k, sinks.k), open_document(v, sinks.v)
    return AttentionState(last_k, last_v, seen.next, *first)


def pick(x: Tensor, column: Tensor) -> Tensor:
    """Returns the columns (B, n) of x (B, S, H, K), or the nearest there is."""
    index = column.clamp(0, x.shape[1] - 1)[..., None, None]
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
