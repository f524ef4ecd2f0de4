"""Rotary positions for linear attention, as a recurrence: S_t = R_{-1} S_{t-1} + k_t v_t^T, with R_1 a turn by θ.

q_t^T S_t = sum_j (R_t q_t)^T (R_j k_j) v_j^T, the rotary positions of arXiv:2104.09864. Written so, the state needs no
position beside it, never sees a large angle, and a reset needs no new count.
"""

import torch
from torch import Tensor

from linrnn.layers.attention import rotate


def count_real(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts real tokens: up to and with each, (1 or B, T), and in all, (1 or B), int64."""
    if mask is None:
        T = x.shape[1]
        return torch.arange(1, T + 1, device=x.device)[None], torch.full((1,), T, device=x.device)
    return mask.cumsum(1), mask.sum(1)


def rotate_features(q: Tensor, k: Tensor, position: Tensor, n: int, base: float) -> tuple[Tensor, Tensor]:
    """Turns the last n features of q and k (B, T, H, F) by positions (1 or B, T)."""
    qk = torch.stack((q, k), 2)  # (B, T, 2, H, F)
    fixed, turned = qk.split((qk.shape[-1] - n, n), -1)
    q, k = torch.cat((fixed, rotate(turned, position, base)), -1).unbind(2)
    return q, k


def rotate_back(S: Tensor, count: Tensor, n: int, base: float) -> Tensor:
    """Turns the last n features of a state (B, H, F, V) back by counts (1 or B): the next token is at position one."""
    rows = S.movedim(-1, 1)[:, None]  # (B, 1, V, H, F)
    fixed, turned = rows.split((S.shape[2] - n, n), -1)
    return torch.cat((fixed, rotate(turned, -count[:, None], base)), -1)[:, 0].movedim(1, -1)
