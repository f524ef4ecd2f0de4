"""Documents packed into rows, with padding anywhere, for tests that compare a row with its documents alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from linrnn.layers import RecurrentLayer

Starts = list[list[int]]  # of the documents of each row; the first is 0


def packed_rows(starts: Starts, T: int, d_model: int, keep: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, d_model) float64, NaN at padded tokens; reset and mask (B, T).

    A token is real with probability `keep`, but for the last two documents, which are padding alone; all are if None.
    """
    B = len(starts)
    reset, mask = torch.zeros(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    for row, first in enumerate(starts):
        reset[row, first[1:]] = True
    if keep is not None:
        mask = torch.rand(B, T) < keep
        mask[-1, starts[-1][-2] :] = False
    x = torch.randn(B, T, d_model, dtype=torch.float64)
    return torch.where(mask[..., None], x, torch.nan), reset, mask


def documents(starts: Starts, mask: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The row and the real tokens (their places) of each document that has any, in order."""
    for row, first in enumerate(starts):
        for begin, end in zip(first, [*first[1:], mask.shape[1]], strict=True):
            real = begin + mask[row, begin:end].nonzero()[:, 0]
            if len(real):
                yield row, real


def run_in_pieces(layer: RecurrentLayer, x: Tensor, reset: Tensor, mask: Tensor | None, lengths: list[int]) -> Tensor:
    """y (B, T, d_model) of pieces of these lengths, with the state carried."""
    ys, state = [], None
    for part in torch.arange(x.shape[1]).split(lengths):
        y, state = layer(x[:, part], state, reset=reset[:, part], mask=None if mask is None else mask[:, part])
        ys.append(y)
    return torch.cat(ys, 1)
