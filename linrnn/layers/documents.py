"""Where a token stands in its document, counted over padding, resets and calls."""

import torch
from torch import Tensor


def positions(x: Tensor, start: Tensor | None, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts the real tokens before each token in its document, (1 or B, T), and before the next call's first, (B)."""
    B, T, _ = x.shape
    if start is None:
        start = torch.zeros(B, dtype=torch.int64, device=x.device)
        if reset is None and mask is None:
            return torch.arange(T, device=x.device)[None], start + T
    if T == 0:
        return start[:, None].expand(B, 0), start
    real = torch.ones(B, T, dtype=torch.int64, device=x.device) if mask is None else mask.long()
    count = start[:, None] + real.cumsum(1)  # up to and with token t, from the start of the carried document
    before = count - real
    if reset is None:
        return before, count[:, -1]
    base = torch.where(reset, before, 0).cummax(1).values  # the count at which the current document began
    return before - base, count[:, -1] - base[:, -1]
