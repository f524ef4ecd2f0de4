"""What attention within documents and chunks needs: real tokens side by side, windows of keys, the keys to carry on.

Padding is moved behind the real tokens first. Then the distance of two tokens is that of their columns, and which keys
a token sees is two numbers: how many before it, how many after. Keys and values carried from earlier calls stand at the
end of their buffers, and their number says all about them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers.base import blank_padding
from linrnn.layers.documents import positions
from linrnn.layers.ring import last_of_document


class Packed(NamedTuple):
    """x (B, T, D) with padding, zeros, behind the real tokens; `reset` on the same; the rest is None without a mask.

    lengths (B,) int64: how many tokens are real; real (B, T) bool: which; place (B, T) int64: where each token went.
    """

    x: Tensor
    reset: Tensor | None
    lengths: Tensor | None = None
    real: Tensor | None = None
    place: Tensor | None = None


def pack(x: Tensor, reset: Tensor | None, mask: Tensor | None) -> Packed:
    """Moves padded tokens of x (B, T, D) behind the real ones; `reset` still separates the same documents."""
    if mask is None:
        return Packed(x, reset)
    lengths = mask.sum(1)
    place = torch.where(mask, mask.cumsum(1) - 1, lengths[:, None] + (~mask).cumsum(1) - 1)
    index = place[..., None].expand_as(x)
    x = torch.zeros_like(x).scatter(1, index, blank_padding(x, mask))
    if reset is not None:
        # padded tokens come last, so that the open document is theirs, wherever its reset was
        document = torch.zeros_like(place).scatter(1, place, reset.cumsum(1)).cummax(1).values
        reset = document.diff(dim=1, prepend=torch.zeros_like(document[:, :1])) > 0
    return Packed(x, reset, lengths, torch.arange(x.shape[1], device=x.device) < lengths[:, None], place)


def unpack(y: Tensor, place: Tensor | None) -> Tensor:
    """Moves the tokens of y (B, T, D) back to where `pack` took them from."""
    return y if place is None else y.gather(1, place[..., None].expand_as(y))


class Sight(NamedTuple):
    """How many tokens each one sees before and after itself, (1 or B, T) int64, or None for after: none.

    next (B,): how many the open document or chunk has, which are what the next call sees.
    """

    before: Tensor
    after: Tensor | None
    next: Tensor


def sight(packed: Packed, start: Tensor | None, chunk_size: int | None, causal: bool) -> Sight:
    """Returns what packed tokens see of their document, or of their chunk of it; `start` (B,) tokens are carried."""
    x, reset, _, real, _ = packed
    before, total = positions(x, start, reset, real)
    after = None
    if not causal:
        flipped = last_of_document(reset)
        flipped = None if flipped is None else flipped.flip(1)
        after = positions(x, None, flipped, None if real is None else real.flip(1))[0].flip(1)
    if chunk_size is not None:
        before, total = before % chunk_size, total % chunk_size
        after = None if after is None else torch.minimum(after, chunk_size - 1 - before)
    return Sight(before, after, total)


def in_sight(seen: Sight) -> Tensor:
    """Returns how many tokens each one sees, (1 or B, T) int64."""
    return seen.before + 1 if seen.after is None else seen.before + 1 + seen.after


def windows(k: Tensor, past: int, length: int, future: int) -> Tensor:
    """Cuts k (B, past + G length + future, K) into what G blocks of queries may see, views (B, G, W, K)."""
    return k.unfold(1, past + length + future, length).mT


def latest(k: Tensor, behind: Tensor | None, n: int, count: Tensor) -> Tensor:
    """Returns the last n columns of k (B, S, K) before `behind` (B,) padded ones: zeros but for the last count (B,)."""
    if behind is None:
        missing = max(n - k.shape[1], 0)
        k = F.pad(k, (0, 0, missing, 0)) if missing else k[:, k.shape[1] - n :]
    else:
        column = torch.arange(k.shape[1] - n, k.shape[1], device=k.device) - behind[:, None]  # (B, n)
        k = k.gather(1, column.clamp(min=0)[..., None].expand(-1, -1, k.shape[-1]))
    old = torch.arange(n, 0, -1, device=k.device) > count[:, None]
    return k.masked_fill(old[..., None], 0)
